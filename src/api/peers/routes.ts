/** The routes for other hosts: one for each call of the table in methods.ts, and those for what is a stream. */
import type { Socket } from 'node:net';
import { type Readable, Transform } from 'node:stream';
import { TLSSocket } from 'node:tls';
import type { FastifyInstance } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import { errorJson } from '../../schemas/error.js';
import { vmParams } from '../../schemas/vm.js';
import { imageId, sessionId } from '../../schemas/words.js';
import { checkKept } from '../contract/http-errors.js';
import type { ApiServices } from '../contract/ports.js';
import { openSerialLog, SerialLogs } from '../contract/serial-logs.js';
import { callOn, HOST_CALLS } from './methods.js';

export const OCTETS = 'application/octet-stream';
export const serialPath = (vm: string): string => `/agent/v1/vms/${vm}/serial`;
export const PING_PATH = '/agent/v1/ping';
export const callPath = (method: string): string => `/agent/v1/call/${method}`;
export const statePath = (session: string): string => `/agent/v1/sessions/${session}/state`;
export const STATE_ROUTE = statePath(':session');
export const forkStatePath = (fork: string): string => `/agent/v1/forks/${fork}/state`;
export const FORK_STATE_ROUTE = forkStatePath(':fork');
/** Their bodies are streams of any length up to DEVICE_STATE_BYTES_MAX. */
export const STATE_ROUTES: ReadonlySet<string> = new Set([STATE_ROUTE, FORK_STATE_ROUTE]);

/** Device state without RAM has some 0.3 MB, or tens of MB with VGA memory and flash. A longer stream is cut off. */
export const DEVICE_STATE_BYTES_MAX = 256 * 2 ** 20;

/** Calls whose second argument is the host that reads an image. A host speaks for itself only. */
const OF_READER: ReadonlySet<string> = new Set([
  ...['serveImage', 'serveHeld', 'joinMulticast', 'imageDigests', 'digestsHash', 'touchOrder', 'endImage'],
]);

function refuseOtherReader(reader: unknown, socket: Socket, { tls }: ApiServices): void {
  const caller = socket instanceof TLSSocket ? (tls?.peerOf(socket)?.name ?? null) : null;
  if (caller === reader) return;
  throw new MigrationError('NOT_PERMITTED', `host ${String(caller)} cannot read an image as ${String(reader)}`);
}

export function agentRoutes(fastify: FastifyInstance, services: ApiServices): void {
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  const failures = { '4xx': errorJson, '5xx': errorJson };

  app.post(PING_PATH, { schema: { summary: 'An empty call', tags: ['hosts'] } }, () => ({ result: null }));

  for (const call of HOST_CALLS) {
    const { name, args, result } = call;
    app.post(
      callPath(name),
      {
        schema: { tags: ['hosts'], body: args, response: { 200: z.object({ result }), ...failures } },
        // A host of a newer version may send keys that this one does not know.
        validatorCompiler:
          ({ httpPart }) =>
          (body: unknown) => {
            try {
              return { value: checkKept(args, body, httpPart ?? 'request') };
            } catch (error) {
              return { error: error as MigrationError };
            }
          },
      },
      async (request) => {
        if (OF_READER.has(name)) refuseOtherReader(request.body[1], request.raw.socket, services);
        return { result: (await callOn(services.agent, call, request.body)) ?? null };
      },
    );
  }

  const logs = new SerialLogs();
  app.get(
    serialPath(':name'),
    { schema: { summary: 'The serial output that is kept of a VM', tags: ['hosts'], params: vmParams } },
    ({ params }, reply) => logs.send(reply, () => openSerialLog(services.vms, params.name)),
  );

  acceptStreams(app, STATE_ROUTE, z.strictObject({ session: sessionId }), ({ session }, state) =>
    services.agent.target.acceptState(session, state),
  );
  acceptStreams(app, FORK_STATE_ROUTE, z.strictObject({ fork: imageId }), ({ fork }, state) =>
    services.agent.forks.acceptForkState(fork, state),
  );
}

/** A route that takes device state as a stream. */
function acceptStreams<Params>(
  app: FastifyInstance,
  route: string,
  params: z.ZodType<Params>,
  accept: (params: Params, state: Readable) => Promise<unknown>,
): void {
  app.put(
    route,
    { schema: { tags: ['hosts'], params, consumes: [OCTETS] }, bodyLimit: DEVICE_STATE_BYTES_MAX },
    async (request) => {
      if (!isStream(request.body)) throw new MigrationError('USAGE', `the device state must be sent as ${OCTETS}`);
      const { body } = request;
      const limited = limit(DEVICE_STATE_BYTES_MAX);
      // If the peer vanishes in the middle, the stream ends with an error, so the state does not look complete.
      body.once('error', (error) => limited.destroy(error));
      body.once('close', () => {
        if (!body.readableEnded) limited.destroy(new MigrationError('DISCONNECTED', 'the device state was cut off'));
      });
      try {
        return { result: (await accept(request.params as Params, body.pipe(limited))) ?? null };
      } finally {
        // The order matters. A pipe with a destroyed end stops its source, and a body that is not read to its end
        // blocks the connection for later calls.
        body.unpipe(limited);
        limited.destroy();
        body.resume();
      }
    },
  );
}

function isStream(value: unknown): value is Readable {
  return typeof (value as Readable | undefined)?.pipe === 'function';
}

function limit(bytesMax: number): Transform {
  let seenBytes = 0;
  return new Transform({
    transform(chunk: Buffer, _, done) {
      seenBytes += chunk.length;
      if (seenBytes <= bytesMax) return done(null, chunk);
      return done(new MigrationError('PEER_PROTOCOL', `the device state exceeds ${bytesMax / 2 ** 20} MiB`));
    },
  });
}
