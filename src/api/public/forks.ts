/** Routes for clients: forks, images, waiting processes. */
import type { FastifyInstance } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import { toMigrationError } from '../../domain/errors.js';
import { errorJson } from '../../schemas/error.js';
import {
  drainBody,
  forkBody,
  forkDryRunView,
  forkRequest,
  type StoppedView,
  stoppedView,
  warmBody,
  warmRequest,
  warmSetView,
} from '../../schemas/fork.js';
import {
  flattenView,
  imageParams,
  imageView,
  loadBody,
  pruneBody,
  pruneView,
  removalView,
  removeBody,
  saveBody,
} from '../../schemas/image.js';
import { jobView } from '../../schemas/job.js';
import { list } from '../../schemas/of.js';
import { emptyBody, stopImageBody, vmParams } from '../../schemas/vm.js';
import type { ApiServices, ApiVms } from '../contract/ports.js';

const failures = { '4xx': errorJson, '5xx': errorJson };
/** How many VMs are ended at the same time. */
const STOPS_MAX = 16;

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
    async ({ body }, reply) => {
      const request = forkRequest(body, host, peers.names);
      if (!body.dryRun) return reply.code(202).send(await jobs.submitFork(request));
      const { plan, refusals } = await jobs.dryRunFork(request);
      return reply.code(200).send({ plan, refusals: [...refusals] });
    },
  );
  imageRoutes(fastify, services);
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
    async ({ body }, reply) => reply.code(201).send(await pool.warm(warmRequest(body))),
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
    ({ body }) => pool.drain(body?.vm ?? null),
  );
}

function imageRoutes(fastify: FastifyInstance, { images, vms }: ApiServices): void {
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  app.get(
    '/v1/images',
    { schema: { summary: 'List the images on this host', response: { 200: list(imageView), ...failures } } },
    () => [...images.list()],
  );
  app.post(
    '/v1/images/load',
    {
      schema: {
        summary: 'Load an image from a file that save has written',
        body: loadBody,
        response: { 201: imageView, ...failures },
      },
    },
    async ({ body }, reply) => reply.code(201).send(await images.load(body.path, { isAssumed: body.assumeDisks })),
  );
  app.post(
    '/v1/images/prune',
    {
      schema: {
        summary: 'Remove the images that no clone, fork or saved file needs, or (dryRun) say which',
        body: pruneBody,
        response: { 200: pruneView, ...failures },
      },
    },
    ({ body }) => images.prune({ isDryRun: body?.dryRun ?? false }),
  );
  app.post(
    '/v1/vms/:name/flatten',
    {
      schema: {
        summary: 'Merge the disk overlays that forks of a VM have left, as far as nobody needs them',
        params: vmParams,
        body: emptyBody,
        response: { 200: flattenView, ...failures },
      },
    },
    ({ params }) => images.flatten(params.name),
  );
  const oneImage = { params: imageParams, response: { 200: imageView, ...failures } };
  app.get('/v1/images/:id', { schema: { summary: 'Show one image', ...oneImage } }, ({ params }) =>
    images.find(params.id),
  );
  app.delete(
    '/v1/images/:id',
    {
      schema: {
        summary: 'Remove an image on which no clone runs; disk layers that somebody needs are kept',
        params: imageParams,
        body: removeBody,
        response: { 200: removalView, ...failures },
      },
    },
    ({ params, body }) =>
      images.remove(params.id, { isForced: body?.force ?? false, isDroppingSaved: body?.dropSaved ?? false }),
  );
  app.post(
    '/v1/images/:id/save',
    {
      schema: {
        summary: 'Write an image to a file on this host',
        params: imageParams,
        body: saveBody,
        response: { 200: z.object({ fileBytes: z.number() }), ...failures },
      },
    },
    ({ params, body }) => images.save(params.id, body.path, { withDisks: body.withDisks }),
  );
  app.post(
    '/v1/images/:id/stop',
    {
      schema: {
        summary: 'End all clones that run on an image, and remove those that have ended',
        params: imageParams,
        body: stopImageBody,
        response: { 200: stoppedView, ...failures },
      },
    },
    ({ params, body }) => {
      const { clones } = images.find(params.id);
      const ended = vms.list().filter(({ image }) => image === params.id);
      return stopAll(vms, new Set([...clones, ...ended.map(({ name }) => name)]), body?.force ?? false);
    },
  );
}

/** Ends the VMs. Those that cannot be ended are reported; the others end all the same. */
async function stopAll(vms: ApiVms, names: ReadonlySet<string>, isForced: boolean): Promise<StoppedView> {
  const waiting = [...names];
  const result: { stopped: string[]; failures: StoppedView['failures'] } = { stopped: [], failures: [] };
  const work = async (): Promise<void> => {
    for (let name = waiting.shift(); name !== undefined; name = waiting.shift()) {
      try {
        await vms.stop(name, { isForced, gracefulMs: 0 });
        result.stopped.push(name);
      } catch (thrown) {
        const error = toMigrationError(thrown);
        // The VM has ended and was removed since it was listed.
        if (error.code === 'NOT_FOUND') result.stopped.push(name);
        else result.failures.push({ name, error: error.toJSON() });
      }
    }
  };
  await Promise.all(Array.from({ length: STOPS_MAX }, work));
  return result;
}
