/**
 * Server-sent events of jobs and VMs. A slow reader gets the latest view of each job, not a backlog: at most one view
 * of each job waits, and views of at most EVENT_JOBS_MAX jobs. Events of VMs wait in the history that all readers
 * share, so a reader that is too slow for it misses some.
 */

import type { ServerResponse } from 'node:http';
import { isEnded, type JobView } from '../../domain/job.js';
import type { VmEvent } from '../../domain/vm-event.js';

const KEEP_ALIVE_MS = 15_000;
/** Views of a running job that follow each other faster than this are coalesced. */
const INTERVAL_MS = 100;
const EVENT_JOBS_MAX = 1024;

/** Returns the events after the one with this id, or all that are kept. */
export type VmHistory = (after?: string) => readonly VmEvent[];

export class EventStream {
  private readonly waiting = new Map<string, JobView>();
  private readonly keepAlive: NodeJS.Timeout;
  private flushing: NodeJS.Timeout | null = null;
  private isBlocked = false;
  private isOver = false;
  private vmHistory: VmHistory | null = null;
  private lastVmEvent: string | undefined;

  constructor(
    private readonly response: ServerResponse,
    private readonly onEnd: () => void,
  ) {
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' });
    response.write(':\n\n');
    response.on('drain', () => {
      this.isBlocked = false;
      this.flush();
    });
    response.on('close', () => this.stop());
    response.on('error', () => this.stop());
    this.keepAlive = setInterval(() => {
      if (!this.isBlocked) this.isBlocked = !response.write(':\n\n');
    }, KEEP_ALIVE_MS);
  }

  push(view: JobView): void {
    if (this.isOver) return;
    this.waiting.set(view.id, view);
    if (this.waiting.size > EVENT_JOBS_MAX) {
      const oldest = this.waiting.keys().next().value;
      if (oldest !== undefined) this.waiting.delete(oldest);
    }
    if (isEnded(view.state)) this.flush();
    else this.flushing ??= setTimeout(() => this.flush(), INTERVAL_MS);
  }

  /** Sends the events of VMs too: those after the event `after`, at first and at each `wake`. */
  showVms(history: VmHistory, after: string | undefined): void {
    this.vmHistory = history;
    this.lastVmEvent = after;
    this.flush();
  }

  /** There are new events of VMs. */
  wake(): void {
    if (!this.isOver) this.flush();
  }

  /** Sends what waits, then ends the response. */
  finish(): void {
    this.isBlocked = false;
    this.flush();
    this.response.end();
    this.stop();
  }

  private flush(): void {
    if (this.flushing !== null) clearTimeout(this.flushing);
    this.flushing = null;
    for (const event of this.vmHistory?.(this.lastVmEvent) ?? []) {
      if (this.isBlocked || this.isOver) return;
      this.lastVmEvent = event.id;
      this.write('vm', event, event.id);
    }
    for (const [id, view] of this.waiting) {
      if (this.isBlocked || this.isOver) return;
      this.waiting.delete(id);
      this.write('job', view);
    }
  }

  /** Only events of VMs have an id, so the last one that a reader has seen tells where it may go on. */
  private write(type: 'job' | 'vm', data: object, id?: string): void {
    const head = id === undefined ? '' : `id: ${id}\n`;
    this.isBlocked = !this.response.write(`event: ${type}\n${head}data: ${JSON.stringify(data)}\n\n`);
  }

  private stop(): void {
    if (this.isOver) return;
    this.isOver = true;
    clearInterval(this.keepAlive);
    if (this.flushing !== null) clearTimeout(this.flushing);
    this.waiting.clear();
    this.onEnd();
  }
}
