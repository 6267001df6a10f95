/** Routes for clients: forks and waiting processes. */
import type { FastifyInstance } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import { errorJson } from '../../schemas/error.js';
import {
  drainBody,
  forkBody,
  forkDryRunView,
  forkRequest,
  warmBody,
  warmRequest,
  warmSetView,
} from '../../schemas/fork.js';
import { jobView } from '../../schemas/job.js';
import { list } from '../../schemas/of.js';
import type { ApiServices } from '../contract/ports.js';

const failures = { '4xx': errorJson, '5xx': errorJson };

export function forkRoutes(fastify: FastifyInstance, services: ApiServices): void {
  const { host, jobs, peers, pool } = services;
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  app.post(
    '/v1/forks',
    {
      schema: {
        summary: 'Start clones of a running VM or of an image, or (dryRun) return the plan',
        body: forkBody,
        response: { 200: forkDryRunView, 202: jobView, ...failures },
      },
    },
    async (request, reply) => {
      const { body } = request;
      request.auditObject = body.vm ?? body.image ?? null;
      const order = forkRequest(body, host, peers.names);
      if (!body.dryRun) return reply.code(202).send(await jobs.submitFork(order));
      const { plan, refusals } = await jobs.dryRunFork(order);
      return reply.code(200).send({ plan, refusals: [...refusals] });
    },
  );
  app.get(
    '/v1/pool',
    {
      schema: {
        summary: 'List the QEMU processes that wait for forks',
        response: { 200: list(warmSetView), ...failures },
      },
    },
    () => [...pool.list()],
  );
  app.post(
    '/v1/pool',
    {
      schema: {
        summary: 'Start a set of waiting processes before the fork that will use it',
        body: warmBody,
        response: { 201: warmSetView, ...failures },
      },
    },
    async (request, reply) => {
      request.auditObject = request.body.vm;
      return reply.code(201).send(await pool.warm(warmRequest(request.body)));
    },
  );
  app.post(
    '/v1/pool/drain',
    {
      schema: {
        summary: 'End the waiting processes of one VM, or of all VMs',
        body: drainBody,
        response: { 200: z.object({ endedCount: z.number() }), ...failures },
      },
    },
    (request) => {
      request.auditObject = request.body?.vm ?? null;
      return pool.drain(request.auditObject);
    },
  );
}
