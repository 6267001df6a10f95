/** The routes of events: one job's, and all of jobs and VMs. */
import type { FastifyInstance, FastifyReply } from 'fastify';
import type { ZodTypeProvider } from 'fastify-type-provider-zod';
import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import { isEnded } from '../../domain/job.js';
import { errorJson } from '../../schemas/error.js';
import { jobParams } from '../../schemas/job.js';
import { eventsQuery, vmEvent } from '../../schemas/vm-event.js';
import type { ApiServices } from '../contract/ports.js';
import { EventStream } from './sse.js';

const EVENT_STREAMS_MAX = 256;

/** Open event streams; the server ends them when it closes. */
export class EventStreams {
  private readonly open = new Set<EventStream>();

  start(reply: FastifyReply, onEnd: () => void): EventStream {
    if (this.open.size >= EVENT_STREAMS_MAX) {
      throw new MigrationError('CONFLICT', `${EVENT_STREAMS_MAX} event streams are open, and there may be no more`, {
        remedy: 'end some of the commands and programs that follow jobs or events, then try again',
      });
    }
    reply.hijack();
    const stream = new EventStream(reply.raw, () => {
      this.open.delete(stream);
      onEnd();
    });
    this.open.add(stream);
    return stream;
  }

  close(): void {
    for (const stream of this.open) stream.finish();
  }
}

export function eventRoutes(fastify: FastifyInstance, services: ApiServices, streams: EventStreams): void {
  const app = fastify.withTypeProvider<ZodTypeProvider>();
  const { jobs, vmEvents } = services;
  const produces = ['text/event-stream'];
  app.get(
    '/v1/jobs/:id/events',
    { schema: { summary: 'Server-sent events: the job’s view after each change', produces, params: jobParams } },
    ({ params }, reply) => {
      const { id } = params;
      const first = jobs.get(id); // NOT_FOUND before the stream begins
      let unsubscribe = (): void => undefined;
      const stream = streams.start(reply, () => unsubscribe());
      const show = (view: typeof first): void => {
        stream.push(view);
        if (isEnded(view.state)) stream.finish();
      };
      if (isEnded(first.state)) return show(first);
      unsubscribe = jobs.subscribe(id, show);
      // The job is read again, because it may have changed before the subscription.
      return show(jobs.get(id));
    },
  );
  app.get(
    '/v1/events',
    {
      schema: {
        summary: 'Server-sent events: `job`, its view after each change, and `vm`, what has happened to a VM',
        produces,
        querystring: eventsQuery,
      },
    },
    ({ query, headers }, reply) => {
      const unsubscribes: (() => void)[] = [];
      const stream = streams.start(reply, () => {
        for (const unsubscribe of unsubscribes) unsubscribe();
      });
      unsubscribes.push(
        jobs.subscribe('*', (view) => stream.push(view)),
        vmEvents.subscribe(() => stream.wake()),
      );
      for (const view of jobs.list()) stream.push(view);
      const seen = headers['last-event-id'];
      stream.showVms((after) => vmEvents.list(after), query.after ?? (typeof seen === 'string' ? seen : undefined));
    },
  );
  app.get(
    '/v1/events/vms',
    {
      schema: {
        summary: 'List what has happened to the VMs on this host, as far as it is kept, oldest first',
        querystring: eventsQuery,
        response: { 200: z.array(vmEvent), '4xx': errorJson, '5xx': errorJson },
      },
    },
    ({ query }) => [...vmEvents.list(query.after)],
  );
}
