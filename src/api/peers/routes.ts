/** The routes for other hosts: one for each call of the table in methods.ts, and those for what is a stream. */
import { type Readable, Transform } from 'node:stream';
import type { FastifyInstance, FastifyRequest } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import { hostNameOf } from '../../domain/caller.js';
import { MigrationError } from '../../domain/errors.js';
import type { ImagesPort, StoppedVms } from '../../engine/ports/images.js';
import { errorJson } from '../../schemas/error.js';
import { vmParams } from '../../schemas/vm.js';
import { imageId, sessionId } from '../../schemas/words.js';
import { checkKept } from '../contract/http-errors.js';
import type { ApiServices } from '../contract/ports.js';
import { openSerialLog, SerialLogs } from '../contract/serial-logs.js';
import { callOn, HOST_CALLS } from './methods.js';
import {
  clonesOfOthers,
  isChange,
  type PeerCall,
  refuseLogOf,
  refuseStateOfOthers,
  refuseWithoutRight,
} from './peer-rights.js';

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

/** What the request is, for the audit log and for the check of rights. */
function peerCall(
  request: FastifyRequest,
  { agent, host }: ApiServices,
  { name, object, isChange }: { readonly name: string; readonly object: string | null; readonly isChange: boolean },
): PeerCall {
  request.hostCall = { name, isChange };
  request.auditObject = object;
  const caller = hostNameOf(request.caller);
  if (caller === null) throw new MigrationError('NOT_PERMITTED', 'this call is reserved for hosts');
  return { caller, host, ties: agent.ties };
}

/** The session, fork, image or VM of a call, by its first argument. */
function objectOf([first]: readonly unknown[]): string | null {
  if (typeof first === 'string') return first;
  const { session, fork } = (first ?? {}) as { session?: unknown; fork?: unknown };
  if (typeof session === 'string') return session;
  if (typeof fork === 'string') return fork;
  if (!Array.isArray(first)) return null;
  return first.flatMap((each: unknown) => (each as { name?: string } | null)?.name ?? []).join(' ') || null;
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
        const { body } = request;
        const peer = peerCall(request, services, { name, object: objectOf(body), isChange: isChange(name) });
        refuseWithoutRight(peer, name, body);
        if (name === 'stopClones') return { result: await stopClonesFor(peer, request, services) };
        return { result: (await callOn(services.agent, call, body)) ?? null };
      },
    );
  }

  const logs = new SerialLogs();
  app.get(
    serialPath(':name'),
    { schema: { summary: 'The serial output that is kept of a VM', tags: ['hosts'], params: vmParams } },
    (request, reply) => {
      const { name } = request.params;
      refuseLogOf(peerCall(request, services, { name: 'serialLog', object: name, isChange: false }), name);
      return logs.send(reply, () => openSerialLog(services.vms, name));
    },
  );

  acceptStreams(app, services, STATE_ROUTE, z.strictObject({ session: sessionId }), ({ session }, state) =>
    services.agent.target.acceptState(session, state),
  );
  acceptStreams(app, services, FORK_STATE_ROUTE, z.strictObject({ fork: imageId }), ({ fork }, state) =>
    services.agent.forks.acceptForkState(fork, state),
  );
}

/** Stops those that the caller may stop, and says of the others why not. Throws NOT_PERMITTED if he may stop none. */
async function stopClonesFor(
  peer: PeerCall,
  { body, caller, raw }: FastifyRequest,
  { agent, audit }: ApiServices,
): Promise<StoppedVms> {
  const [clones, isForced] = body as Parameters<ImagesPort['stopClones']>;
  const others = clonesOfOthers(peer, clones);
  const [first] = others;
  if (first !== undefined && others.length === clones.length) throw first.error;
  const names = new Set(others.map(({ name }) => name));
  if (first !== undefined) {
    audit.note({
      ...{ who: caller?.name ?? '', from: raw.socket.remoteAddress ?? '', what: 'stopClones' },
      ...{ object: [...names].join(' ').slice(0, 512), result: first.error.code, message: first.error.message },
    });
  }
  const { stopped, failures } = await agent.images.stopClones(
    clones.filter(({ name }) => !names.has(name)),
    isForced,
  );
  return { stopped, failures: [...failures, ...others.map(({ name, error }) => ({ name, error: error.toJSON() }))] };
}

/** A route that takes device state as a stream. */
function acceptStreams<Params extends { readonly session: string } | { readonly fork: string }>(
  app: FastifyInstance,
  services: ApiServices,
  route: string,
  params: z.ZodType<Params>,
  accept: (params: Params, state: Readable) => Promise<unknown>,
): void {
  app.put(
    route,
    { schema: { tags: ['hosts'], params, consumes: [OCTETS] }, bodyLimit: DEVICE_STATE_BYTES_MAX },
    async (request) => {
      const params = request.params as Params;
      const object = 'session' in params ? params.session : params.fork;
      refuseStateOfOthers(peerCall(request, services, { name: 'acceptState', object, isChange: true }), params);
      return accepted(request.body, (state) => accept(params, state));
    },
  );
}

async function accepted(body: unknown, accept: (state: Readable) => Promise<unknown>): Promise<{ result: unknown }> {
  if (!isStream(body)) throw new MigrationError('USAGE', `the device state must be sent as ${OCTETS}`);
  const limited = limit(DEVICE_STATE_BYTES_MAX);
  // If the peer vanishes in the middle, the stream ends with an error, so the state does not look complete.
  body.once('error', (error) => limited.destroy(error));
  body.once('close', () => {
    if (!body.readableEnded) limited.destroy(new MigrationError('DISCONNECTED', 'the device state was cut off'));
  });
  try {
    return { result: (await accept(body.pipe(limited))) ?? null };
  } finally {
    // The order matters. A pipe with a destroyed end stops its source, and a body that is not read to its end
    // blocks the connection for later calls.
    body.unpipe(limited);
    limited.destroy();
    body.resume();
  }
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
