/**
 * The jobs that the API shows: those that this daemon coordinates, and those of other hosts that bring VMs to this one.
 * The latter can be watched here, and hurried, but only their coordinator can cancel them.
 */
import { MigrationError } from '../domain/errors.js';
import { isFinal, type JobView, type MigrationJobView } from '../domain/job.js';
import type { JobManager } from './jobs.js';

/** The jobs of other hosts that bring VMs to this one, as this host sees them. */
export interface Incoming {
  list(): readonly MigrationJobView[];
  find(id: string): MigrationJobView | undefined;
  /** Tries again at once what the job waits for here. */
  hurry(id: string): void;
  subscribe(id: string, listener: (view: MigrationJobView) => void): () => void;
}

type Own = Pick<
  JobManager,
  'dryRun' | 'submit' | 'dryRunFork' | 'submitFork' | 'find' | 'get' | 'list' | 'cancel' | 'recover' | 'subscribe'
>;

export class JobsOfBothEnds {
  readonly #own: Own;
  readonly #incoming: Incoming;

  constructor(own: Own, incoming: Incoming) {
    this.#own = own;
    this.#incoming = incoming;
  }

  readonly dryRun: Own['dryRun'] = (request) => this.#own.dryRun(request);
  readonly submit: Own['submit'] = (request) => this.#own.submit(request);
  readonly dryRunFork: Own['dryRunFork'] = (request) => this.#own.dryRunFork(request);
  readonly submitFork: Own['submitFork'] = (request) => this.#own.submitFork(request);

  /** Throws NOT_FOUND if there is no such job. */
  get(id: string): JobView {
    return this.#own.find(id) ?? this.#incoming.find(id) ?? this.#own.get(id);
  }

  /** Oldest first. */
  list(): JobView[] {
    const incoming = this.#incoming.list().filter(({ id }) => this.#own.find(id) === undefined);
    return [...this.#own.list(), ...incoming].sort((a, b) => Date.parse(a.createdAt) - Date.parse(b.createdAt));
  }

  async cancel(id: string): Promise<JobView> {
    const view = this.#foreign(id);
    if (view === undefined) return this.#own.cancel(id);
    if (isFinal(view.state)) throw new MigrationError('CONFLICT', `job ${id} is already ${view.state}`);
    if (view.isCommitted) {
      throw new MigrationError('CONFLICT', `${view.vm} already runs here: job ${id} can only be finished`);
    }
    throw new MigrationError('CONFLICT', `${view.source} coordinates job ${id}`, {
      remedy: `run "vmctl cancel ${id}" on ${view.source}`,
    });
  }

  async recover(id: string): Promise<JobView> {
    const view = this.#foreign(id);
    if (view === undefined) return this.#own.recover(id);
    if (isFinal(view.state)) {
      throw new MigrationError('CONFLICT', `job ${id} is ${view.state}: there is nothing to recover`);
    }
    this.#incoming.hurry(id);
    return this.get(id);
  }

  /** Throws NOT_FOUND if there is no such job. */
  subscribe(id: string, listener: (view: JobView) => void): () => void {
    if (id !== '*') {
      const isForeign = this.#foreign(id) !== undefined;
      return isForeign ? this.#incoming.subscribe(id, listener) : this.#own.subscribe(id, listener);
    }
    const ends = [this.#own.subscribe(id, listener), this.#incoming.subscribe(id, listener)];
    return () => {
      for (const end of ends) end();
    };
  }

  #foreign(id: string): MigrationJobView | undefined {
    return this.#own.find(id) === undefined ? this.#incoming.find(id) : undefined;
  }
}
