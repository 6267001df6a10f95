/** The jobs that this daemon lists, with their views, and the subscriptions to their changes. */

import { MigrationError } from '../domain/errors.js';
import { isFinal, type JobView } from '../domain/job.js';
import type { Clock } from '../engine/ports/clock.js';
import { Subscribers } from '../kit/subscribers.js';
import { changed, type Job, type ViewChange } from './job.js';

/** The number of listed jobs. Beyond it the oldest finished jobs are forgotten. */
const JOBS_MAX = 1_000;

export class JobTable {
  /** In the order of their creation. */
  readonly #jobs = new Map<string, Job>();
  readonly #subscribers: Subscribers<JobView>;
  readonly #clock: Clock;

  constructor(clock: Clock, onSubscriberFailure: (error: unknown) => void) {
    this.#clock = clock;
    this.#subscribers = new Subscribers(onSubscriberFailure);
  }

  add(job: Job): void {
    this.#jobs.set(job.view.id, job);
  }

  /** Throws NOT_FOUND if there is no such job. */
  get(id: string): Job {
    const job = this.#jobs.get(id);
    if (job === undefined) throw new MigrationError('NOT_FOUND', `there is no job ${id}`);
    return job;
  }

  find(id: string): Job | undefined {
    return this.#jobs.get(id);
  }

  /** Oldest first. */
  all(): Job[] {
    return [...this.#jobs.values()];
  }

  /** Subscribes to one job, or to all jobs ('*'). Returns a function that ends the subscription. */
  subscribe(id: string, onChange: (view: JobView) => void): () => void {
    if (id !== '*') this.get(id);
    return this.#subscribers.add(id, onChange);
  }

  change(job: Job, change: ViewChange, at = this.#clock.isoNow()): void {
    job.view = changed(job, change, at);
    this.#subscribers.tell(job.view);
  }

  /** Forgets the oldest finished job without leftovers if there are too many jobs. */
  forgetOldest(): void {
    if (this.#jobs.size <= JOBS_MAX) return;
    for (const [id, { view, history }] of this.#jobs) {
      if (!isFinal(view.state) || history.leftovers.size > 0) continue;
      this.#jobs.delete(id);
      return;
    }
  }
}
