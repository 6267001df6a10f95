/** Routes for clients: who they are, and the bearer tokens of this host. */
import type { FastifyInstance } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import type { Right } from '../../domain/caller.js';
import { errorJson } from '../../schemas/error.js';
import { list } from '../../schemas/of.js';
import { callerView, newToken, tokenBody, tokenParams, tokenView } from '../../schemas/token.js';
import type { ApiServices } from '../contract/ports.js';

const failures = { '4xx': errorJson, '5xx': errorJson };
/** Whoever can make a token can make one for every role. */
const ADMIN: { readonly right: Right } = { right: 'admin' };

export function tokenRoutes(fastify: FastifyInstance, { host, tokens }: ApiServices): void {
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  app.get(
    '/v1/whoami',
    { schema: { summary: 'Show as whom this request is made', response: { 200: callerView, ...failures } } },
    ({ caller }) => ({ host, name: caller?.name ?? '', role: caller?.role ?? 'viewer', from: caller?.from ?? '' }),
  );
  app.get(
    '/v1/tokens',
    {
      config: ADMIN,
      schema: {
        summary: 'List the tokens of this host, without their secrets',
        response: { 200: list(tokenView), ...failures },
      },
    },
    () => tokens.list(),
  );
  app.post(
    '/v1/tokens',
    {
      config: ADMIN,
      schema: {
        summary: 'Make a token for clients of this host; its secret is shown this once',
        body: tokenBody,
        response: { 201: newToken, ...failures },
      },
    },
    async (request, reply) => {
      request.auditObject = `${request.body.name} as ${request.body.role}`;
      return reply.code(201).send(await tokens.create({ ...request.body, createdBy: request.caller?.name ?? '' }));
    },
  );
  app.delete(
    '/v1/tokens/:name',
    {
      config: ADMIN,
      schema: {
        summary: 'Revoke a token, by name or id',
        params: tokenParams,
        response: { 200: list(tokenView), ...failures },
      },
    },
    ({ params }) => tokens.revoke(params.name),
  );
}
