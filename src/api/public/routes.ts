/**
 * Routes for clients: hosts, VMs, jobs. A handler only translates and calls a port; the ports decide what may happen.
 */

import type { FastifyInstance } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import { toMigrationError } from '../../domain/errors.js';
import { hostsQuery, serialQuery, vmsOnHosts } from '../../schemas/all-hosts.js';
import { errorJson } from '../../schemas/error.js';
import { type DaemonView, daemonView, doctorCheck, type HostView, hostView } from '../../schemas/host.js';
import { jobParams, jobView } from '../../schemas/job.js';
import { dryRunView, migrationBody, migrationOrder } from '../../schemas/migration.js';
import { emptyBody, runQuery, stopBody, stopView, vmParams, vmView } from '../../schemas/vm.js';
import { readSpec, userSpecSchema } from '../../schemas/vm-spec.js';
import { check } from '../contract/http-errors.js';
import type { ApiServices } from '../contract/ports.js';
import { openSerialLog, SerialLogs } from '../contract/serial-logs.js';
import * as hosts from './all-hosts.js';
import { doctor } from './doctor.js';
import { type EventStreams, eventRoutes } from './events.js';
import { forkRoutes } from './forks.js';
import { imageRoutes } from './images.js';
import { METRICS_CONTENT_TYPE, type Metrics } from './metrics.js';
import { tokenRoutes } from './tokens.js';

export const YAML = 'application/yaml';

/** Responses that every route may return besides its own. */
const failures = { '4xx': errorJson, '5xx': errorJson };

export function publicRoutes(fastify: FastifyInstance, services: ApiServices, metrics: Metrics, streams: EventStreams) {
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  hostRoutes(app, services);
  vmRoutes(app, services);
  forkRoutes(app, services);
  imageRoutes(app, services);
  jobRoutes(app, services);
  tokenRoutes(app, services);
  eventRoutes(app, services, streams);
  app.get('/metrics', { schema: { summary: 'Counters in Prometheus’s text format' } }, (_, reply) =>
    reply.type(METRICS_CONTENT_TYPE).send(metrics.render()),
  );
}

type App = FastifyInstance & { withTypeProvider: unknown };
type TypedApp = ReturnType<typeof typed>;
function typed(app: App) {
  return app.withTypeProvider<ZodTypeProvider>();
}

function hostRoutes(app: TypedApp, services: ApiServices): void {
  app.get(
    '/v1/host',
    { schema: { summary: 'Show this host and its daemon', response: { 200: daemonView, ...failures } } },
    async (): Promise<DaemonView> => ({
      host: services.host,
      version: services.version,
      pid: process.pid,
      startedAt: services.startedAt,
      residentBytes: process.memoryUsage.rss(),
      inventory: await services.agent.inventory.inventory(),
    }),
  );
  app.get(
    '/v1/hosts',
    { schema: { summary: 'List this host and the hosts it knows', response: { 200: z.array(hostView), ...failures } } },
    () => Promise.all([selfView(services), ...services.peers.names.map((name) => peerView(services, name))]),
  );
  app.get(
    '/v1/doctor',
    {
      schema: { summary: 'Check what this host can do', response: { 200: z.array(doctorCheck), ...failures } },
    },
    () => doctor(services),
  );
}

async function selfView(services: ApiServices): Promise<HostView> {
  const inventory = await services.agent.inventory.inventory();
  return { host: services.host, url: null, isSelf: true, isReachable: true, roundTripMs: 0, error: null, inventory };
}

async function peerView(services: ApiServices, host: string): Promise<HostView> {
  const base = { host, url: services.peers.url(host), isSelf: false };
  try {
    const inventory = await services.peers.agent(host).inventory.inventory();
    const { roundTripMs } = await services.peers.check(host);
    return { ...base, isReachable: true, roundTripMs, error: null, inventory };
  } catch (thrown) {
    const error = toMigrationError(thrown).toJSON();
    return { ...base, isReachable: false, roundTripMs: null, error, inventory: null };
  }
}

function vmRoutes(app: TypedApp, services: ApiServices): void {
  const { vms } = services;
  app.post(
    '/v1/vms',
    {
      // The spec's parser, which also accepts YAML, checks the body. The schema is here only for the document.
      schema: {
        summary: 'Start a VM',
        querystring: runQuery,
        body: userSpecSchema,
        response: { 201: vmView, ...failures },
      },
      validatorCompiler: () => (value: unknown) => ({ value }),
    },
    async (request, reply) => {
      const { forceName } = check(runQuery, request.query, 'querystring');
      const spec = await readSpec(request.body);
      request.auditObject = spec.name;
      await services.policy.refuseSpec(spec, request.caller);
      return reply.code(201).send(await vms.run(spec, { isNameForced: forceName }));
    },
  );
  app.get(
    '/v1/vms',
    {
      schema: {
        summary: 'List the VMs on this host, or (allHosts) also those on the hosts it knows',
        querystring: hostsQuery,
        response: { 200: z.union([z.array(vmView), vmsOnHosts]), ...failures },
      },
    },
    async ({ query }) => (query.allHosts ? hosts.vmsOnHosts(services) : [...vms.list()]),
  );
  const oneVm = { params: vmParams, response: { 200: vmView, ...failures } };
  app.get('/v1/vms/:name', { schema: { summary: 'Show one VM', ...oneVm } }, (request) =>
    vms.locate(request.params.name),
  );
  const logs = new SerialLogs();
  app.get(
    '/v1/vms/:name/serial',
    {
      schema: {
        summary: 'The serial output that is kept of a VM of this host, or of another one',
        params: vmParams,
        querystring: serialQuery,
      },
    },
    ({ params, query: { host = services.host } }, reply) =>
      logs.send(reply, () =>
        host === services.host ? openSerialLog(vms, params.name) : services.peers.serialLog(host, params.name),
      ),
  );
  app.post(
    '/v1/vms/:name/pause',
    { schema: { summary: 'Stop the vCPUs of a VM', body: emptyBody, ...oneVm } },
    async ({ params }) => {
      await vms.pause(params.name);
      return vms.find(params.name);
    },
  );
  app.post(
    '/v1/vms/:name/resume',
    { schema: { summary: 'Let the vCPUs of a VM run again', body: emptyBody, ...oneVm } },
    async ({ params }) => {
      await vms.resume(params.name);
      return vms.find(params.name);
    },
  );
  app.post(
    '/v1/vms/:name/reset',
    { schema: { summary: 'Restart the guest, as its reset button does', body: emptyBody, ...oneVm } },
    async ({ params }) => {
      await vms.reset(params.name);
      return vms.find(params.name);
    },
  );
  app.post(
    '/v1/vms/:name/stop',
    {
      schema: {
        summary: 'Press the power button of a VM, then end it and remove its memory',
        params: vmParams,
        body: stopBody,
        response: { 200: stopView, ...failures },
      },
    },
    ({ params, body }) => vms.stop(params.name, { isForced: body.force, gracefulMs: body.timeoutMs }),
  );
}

function jobRoutes(app: TypedApp, services: ApiServices): void {
  const { jobs } = services;
  app.post(
    '/v1/migrations',
    {
      schema: {
        summary: 'Move a VM to another host, or (dryRun) return the plan',
        body: migrationBody,
        response: { 200: dryRunView, 202: jobView, ...failures },
      },
    },
    async (request, reply) => {
      const { body } = request;
      request.auditObject = `${body.vm} to ${body.target}`;
      const order = migrationOrder(body);
      if (!body.dryRun) return reply.code(202).send(await jobs.submit(order));
      const { plan, refusals } = await jobs.dryRun(order);
      return reply.code(200).send({ plan, refusals: [...refusals] });
    },
  );
  app.get(
    '/v1/jobs',
    {
      schema: {
        summary: 'List the jobs that this daemon coordinates, and those that bring VMs to this host',
        response: { 200: z.array(jobView), ...failures },
      },
    },
    () => [...jobs.list()],
  );
  const oneJob = { params: jobParams, response: { 200: jobView, ...failures } };
  app.get('/v1/jobs/:id', { schema: { summary: 'Show one job', ...oneJob } }, ({ params }) => jobs.get(params.id));
  app.post(
    '/v1/jobs/:id/cancel',
    { schema: { summary: 'Cancel and undo a job that is not committed', body: emptyBody, ...oneJob } },
    ({ params }) => jobs.cancel(params.id),
  );
  app.post(
    '/v1/jobs/:id/recover',
    { schema: { summary: 'Make the next attempt of a job that needs recovery at once', body: emptyBody, ...oneJob } },
    ({ params }) => jobs.recover(params.id),
  );
}
