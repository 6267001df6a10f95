/** Routes for clients: images, and the clones that run on them. */
import type { FastifyInstance } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import type { Right } from '../../domain/caller.js';
import {
  clonesOnHosts,
  fetchBody,
  hostsQuery,
  imagesOnHosts,
  removedOnHosts,
  stopClonesBody,
  stoppedOnHosts,
} from '../../schemas/all-hosts.js';
import { errorJson } from '../../schemas/error.js';
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
import { list } from '../../schemas/of.js';
import { emptyBody, stopImageBody, vmParams } from '../../schemas/vm.js';
import type { ApiServices } from '../contract/ports.js';
import * as hosts from './all-hosts.js';

const failures = { '4xx': errorJson, '5xx': errorJson };

export function imageRoutes(fastify: FastifyInstance, services: ApiServices): void {
  const { images } = services;
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  app.get(
    '/v1/images',
    {
      schema: {
        summary: 'List the images on this host, or (allHosts) also those on the hosts it knows',
        querystring: hostsQuery,
        response: { 200: z.union([list(imageView), imagesOnHosts]), ...failures },
      },
    },
    async ({ query }) => (query.allHosts ? hosts.imagesOnHosts(services, null) : [...images.list()]),
  );
  app.post(
    '/v1/images/load',
    {
      // Also a signed file can have the state of a guest that attacks QEMU, and QEMU runs as root.
      config: { right: 'admin' satisfies Right },
      schema: {
        summary: 'Load an image from a file that save has written',
        body: loadBody,
        response: { 201: imageView, ...failures },
      },
    },
    async (request, reply) => {
      const { path, assumeDisks, trust } = request.body;
      request.auditObject = path;
      return reply.code(201).send(await images.load(path, { isAssumed: assumeDisks, isTrusted: trust }));
    },
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
        summary: 'Remove an image on which no clone runs (allHosts: everywhere); layers that somebody needs are kept',
        params: imageParams,
        body: removeBody,
        response: { 200: z.union([removalView, removedOnHosts]), ...failures },
      },
    },
    async ({ params, body }) => {
      const options = { isForced: body?.force ?? false, isDroppingSaved: body?.dropSaved ?? false };
      if (body?.allHosts === true) return hosts.removeImage(services, params.id, options);
      return images.remove(params.id, options);
    },
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
    async (request) => {
      const { params, body, caller } = request;
      request.auditObject = `${params.id} to ${body.path}`;
      await services.policy.refusePath(body.path, caller);
      return images.save(params.id, body.path, { withDisks: body.withDisks });
    },
  );
  app.post(
    '/v1/images/:id/stop',
    {
      schema: {
        summary: 'End all clones that run on an image (allHosts: everywhere), and remove those that have ended',
        params: imageParams,
        body: stopImageBody,
        response: { 200: stoppedOnHosts, ...failures },
      },
    },
    ({ params, body }) => {
      const options = { isForced: body?.force ?? false, isEverywhere: body?.allHosts ?? false };
      return hosts.stopImage(services, params.id, options);
    },
  );
  app.post(
    '/v1/images/:id/fetch',
    {
      schema: {
        summary: 'Read the rest of an image that this host, or another one, reads on demand; returns at once',
        params: imageParams,
        body: fetchBody,
        response: { 200: imageView, ...failures },
      },
    },
    ({ params, body }) => hosts.fetchImage(services, params.id, body?.host ?? services.host),
  );
  app.get(
    '/v1/images/:id/clones',
    {
      schema: {
        summary: 'List the clones on an image, on this host and on those it knows',
        params: imageParams,
        response: { 200: clonesOnHosts, ...failures },
      },
    },
    ({ params }) => hosts.clonesOnHosts(services, params.id),
  );
  app.post(
    '/v1/clones/stop',
    {
      schema: {
        summary: 'End clones by name and UUID, on whichever host they are, and remove those that have ended',
        body: stopClonesBody,
        response: { 200: stoppedOnHosts, ...failures },
      },
    },
    (request) => {
      const { clones, force } = request.body;
      request.auditObject = clones.map(({ name }) => name).join(', ');
      return hosts.stopClones(services, clones, force);
    },
  );
}
