/** Hosts' routes: one for each call of the table in methods.ts, and the device state as a stream. */
import { type Readable, Transform } from 'node:stream';
import type { FastifyInstance } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import { errorJson } from '../../schemas/error.js';
import { sessionId } from '../../schemas/words.js';
import type { ApiServices } from '../contract/ports.js';
import { callOn, HOST_CALLS } from './methods.js';

export const OCTETS = 'application/octet-stream';
export const PING_PATH = '/agent/v1/ping';
export const callPath = (method: string): string => `/agent/v1/call/${method}`;
export const statePath = (session: string): string => `/agent/v1/sessions/${session}/state`;

/** Device state without RAM is some 0.3 MB; VGA memory and flash make it tens. A peer that sends more is cut off. */
export const DEVICE_STATE_BYTES_MAX = 256 * 2 ** 20;

export function agentRoutes(fastify: FastifyInstance, services: ApiServices): void {
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  const failures = { '4xx': errorJson, '5xx': errorJson };

  app.post(PING_PATH, { schema: { summary: 'An empty call', tags: ['hosts'] } }, () => ({ result: null }));

  for (const call of HOST_CALLS) {
    const { name, args, result } = call;
    app.post(
      callPath(name),
      { schema: { tags: ['hosts'], body: args, response: { 200: z.object({ result }), ...failures } } },
      async (request) => ({ result: (await callOn(services.agent, call, request.body)) ?? null }),
    );
  }

  app.put(
    statePath(':session'),
    {
      schema: { tags: ['hosts'], params: z.strictObject({ session: sessionId }), consumes: [OCTETS] },
      bodyLimit: DEVICE_STATE_BYTES_MAX,
    },
    async (request) => {
      if (!isStream(request.body)) throw new MigrationError('USAGE', `the device state travels as ${OCTETS}`);
      const { body } = request;
      const limited = limit(DEVICE_STATE_BYTES_MAX);
      // A peer that vanishes in the middle ends the stream with an error, not as if that had been all of it.
      body.once('error', (error) => limited.destroy(error));
      body.once('close', () => {
        if (!body.readableEnded) limited.destroy(new MigrationError('DISCONNECTED', 'the device state was cut off'));
      });
      try {
        await services.agent.target.acceptState(request.params.session, body.pipe(limited));
      } finally {
        // In this order: a pipe whose end is destroyed stops its source, and what is not read to its end blocks the
        // connection for later calls.
        body.unpipe(limited);
        limited.destroy();
        body.resume();
      }
      return { result: null };
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
      return done(new MigrationError('PEER_PROTOCOL', `more than ${bytesMax} bytes of device state`));
    },
  });
}
