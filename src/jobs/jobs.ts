/**
 * The jobs of this daemon. Each job is a state machine:
 *
 *   queued -> running -> done
 *      |        |-----> failed | cancelled            before the commit: undone; the VM runs on the source, no clone
 *      |        |-----> recovering <-> running        after the commit: a host does not answer; the job retries
 *      |        |-----> needsRecovery                nothing has advanced for long; the job retries all the same
 *      |        |          |-> recovering, running   something advances again, `recover`, or the daemon's next start
 *      |        |          `-> done | lost
 *      |        `-----> lost
 *      `-----> cancelled
 *
 * A job is durable before `submit` resolves. `start` finishes or undoes the jobs that a dead daemon has left.
 */

import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { ForkPlan, ForkReport, ForkRequest } from '../domain/fork.js';
import { isFinal, type JobView } from '../domain/job.js';
import type { MigrationOrder, MigrationPlan, MigrationReport } from '../domain/migration.js';
import type { ForkJobRecord } from '../engine/fork/context.js';
import type { MigrationRecord } from '../engine/migration/context.js';
import type { AnyStepName, JournalEntry } from '../engine/ports/journal.js';
import type { Outcome } from '../engine/walk.js';
import { givenUp, hasArrived, stillNeeded } from './give-up.js';
import { emptyHistory, readHistories } from './history.js';
import { changed, type Job, newJob, standing, type ViewChange, vmOf } from './job.js';
import { Leftovers } from './leftovers.js';
import { observerOf } from './observer.js';
import { JOB_LIMITS, type JobLimits, type JobManagerOptions } from './options.js';
import { JobQueue, mayFollow } from './queue.js';
import {
  forkRecord,
  migrationRecord,
  type Planned,
  planForkJob,
  planMigrationJob,
  reasonAgainst,
  refused,
  whatOf,
} from './requests.js';
import { StalledJobs } from './stalled.js';
import { JobTable } from './table.js';
import { type JobWalk, walkOf } from './walks.js';

type JobReport = MigrationReport | ForkReport;

export class JobManager {
  readonly #options: JobManagerOptions;
  readonly #limits: JobLimits;
  readonly #jobs: JobTable;
  readonly #queue = new JobQueue();
  #runningCount = 0;
  readonly #halt = new AbortController();
  readonly #leftovers: Leftovers;
  readonly #stalled: StalledJobs;
  /** The current walk of each job that is under way. */
  readonly #walks = new Map<Job, JobWalk>();

  constructor(options: JobManagerOptions) {
    this.#options = options;
    this.#limits = { ...JOB_LIMITS, ...options.limits };
    this.#jobs = new JobTable(options.clock, (error) => this.#warn('a subscriber failed', error));
    this.#leftovers = new Leftovers({
      ...options,
      limits: this.#limits,
      signal: this.#halt.signal,
      undoStep: (job, step) => this.#walkOf(job).undoStep(step),
      warn: (message, error, job) => this.#warn(message, error, job),
    });
    this.#stalled = new StalledJobs({ ...options, limits: this.#limits, signal: this.#halt.signal });
  }

  /** Resumes every unfinished job in the journal. Resolves when all of them run again. */
  start(): Promise<void> {
    for (const history of readHistories(this.#options.journal.entries()).values()) {
      const job = newJob(history, null);
      this.#jobs.add(job);
      if (isFinal(job.view.state)) {
        this.#leftovers.clear(job);
        continue;
      }
      this.#queue.hold(job);
      this.#walkAgain(job);
    }
    return Promise.resolve();
  }

  /** Returns the plan that `submit` would run, or every reason for a refusal. */
  async dryRun(request: MigrationOrder): Promise<Planned<MigrationPlan>> {
    const { plan, refusals } = await planMigrationJob(request, this.#sources());
    return plan === null ? { plan, refusals } : { plan: plan.plan, refusals: [] };
  }

  dryRunFork(request: ForkRequest): Promise<Planned<ForkPlan>> {
    return planForkJob(request, this.#sources());
  }

  /** Resolves when the job is durable. PREFLIGHT_REFUSED carries the refusals as details. */
  async submit(request: MigrationOrder): Promise<JobView> {
    const submittedAtMs = this.#options.clock.nowMs();
    this.#refuseWhenClosing();
    const { plan, refusals } = await planMigrationJob(request, this.#sources());
    if (plan === null) throw refused(`${request.vm} cannot move to ${request.target}`, refusals);
    return this.#accept(submittedAtMs, migrationRecord(plan, this.#options));
  }

  /** The same for a fork. It waits if another fork holds its VM, until that has ended. */
  async submitFork(request: ForkRequest): Promise<JobView> {
    const submittedAtMs = this.#options.clock.nowMs();
    this.#refuseWhenClosing();
    const { plan, refusals } = await this.dryRunFork(request);
    if (plan === null) throw refused(whatOf(request), refusals);
    return this.#accept(submittedAtMs, forkRecord(plan, this.#options));
  }

  #refuseWhenClosing(): void {
    const { host } = this.#options;
    if (this.#halt.signal.aborted) throw new MigrationError('UNREACHABLE', `the daemon on ${host} is closing`);
  }

  #sources() {
    const holderOf = (vm: string) => this.#queue.holderOf(vm);
    return { ...this.#options, callMsMax: this.#limits.callMsMax, holderOf };
  }

  /** Makes the job durable, then queues it. */
  async #accept(submittedAtMs: number, record: MigrationRecord | ForkJobRecord): Promise<JobView> {
    const job = newJob(emptyHistory(record), submittedAtMs);
    const { id, kind } = job.view;
    const vm = vmOf(job);
    // Another submit may have taken the VM while pre-flight waited. From here to the journal nothing else runs.
    const other = vm === null ? undefined : this.#queue.holderOf(vm);
    if (other !== undefined && !mayFollow(job, other)) {
      throw new MigrationError('VM_BUSY', `${vm} is part of job ${other.view.id}`);
    }
    this.#queue.hold(job);
    if (other !== undefined) job.view = changed(job, { waitsFor: other.view.id }, job.view.updatedAt);
    try {
      await this.#options.journal.append(record);
    } catch (error) {
      this.#queue.release(job);
      throw error;
    }
    this.#jobs.add(job);
    this.#options.log.info({ job: id, kind, vm: job.view.vm }, 'job accepted');
    this.#queue.push(job);
    this.#startQueued();
    return job.view;
  }

  /** Throws NOT_FOUND if there is no such job. */
  get(id: string): JobView {
    return this.#jobs.get(id).view;
  }

  find(id: string): JobView | undefined {
    return this.#jobs.find(id)?.view;
  }

  /** Returns the job that holds the VM. */
  jobOf(vm: string): JobView | undefined {
    return this.#queue.holderOf(vm)?.view;
  }

  /** Oldest first. */
  list(): JobView[] {
    return this.#jobs.all().map(({ view }) => view);
  }

  /** Resolves when the VM runs on the source again. Throws CONFLICT once the commit has begun. */
  async cancel(id: string): Promise<JobView> {
    const job = this.#jobs.get(id);
    if (isFinal(job.view.state)) {
      if (job.view.state === 'cancelled') return job.view;
      throw new MigrationError('CONFLICT', `job ${id} is already ${job.view.state}`);
    }
    if (job.isCommitBegun) {
      const why = job.view.kind === 'fork' ? 'the fork is committed' : `execution has moved to ${job.view.target}`;
      throw new MigrationError('CONFLICT', `${why}: job ${id} can only be finished`);
    }
    job.cancel.abort(new MigrationError('CANCELLED', 'cancelled on request'));
    if (this.#queue.remove(job)) {
      await this.#settle(job, { kind: 'undone', error: toMigrationError(job.cancel.signal.reason), leftovers: [] });
    }
    await job.walk;
    return job.view;
  }

  /** Makes the next attempt of a job that needs recovery at once. It has no effect on a running job. */
  recover(id: string): Promise<JobView> {
    const job = this.#jobs.get(id);
    if (isFinal(job.view.state)) {
      const error = new MigrationError('CONFLICT', `job ${id} is ${job.view.state}: there is nothing to recover`);
      return Promise.reject(error);
    }
    if (job.view.state === 'needsRecovery') {
      this.#walks.get(job)?.refresh();
      this.#jobs.change(job, { state: 'recovering' });
      this.#stalled.hurry(job);
    }
    return Promise.resolve(job.view);
  }

  /**
   * Ends a committed migration whose VM a user gives up on this host. Resolves when the end of the job is durable and
   * nothing holds the VM's memory any more. Throws CONFLICT if the memory has all arrived, so that nothing is lost.
   */
  async giveUp(id: string): Promise<void> {
    const job = this.#jobs.get(id);
    const { view, history } = job;
    if (history.kind !== 'migrate' || view.kind !== 'migrate' || isFinal(view.state)) return;
    if (!view.isCommitted || hasArrived(history)) throw stillNeeded(view);
    job.giveUp.abort(givenUp(view));
    this.#stalled.hurry(job);
    // A walk that has just stalled is followed by the walk of its retries.
    for (let walk = null; walk !== job.walk; ) {
      walk = job.walk;
      await walk;
    }
    if (job.view.state !== 'lost') throw stillNeeded(view);
  }

  /** Calls `onChange` for each change of one job, or of all ('*'). Returns a function that ends the subscription. */
  subscribe(id: string, onChange: (view: JobView) => void): () => void {
    return this.#jobs.subscribe(id, onChange);
  }

  /**
   * Undoes the jobs that are not committed and leaves the others to the next daemon. Resolves when no walk and no retry
   * runs any more.
   */
  async close(): Promise<void> {
    const closing = new MigrationError('CANCELLED', 'the daemon is closing');
    this.#halt.abort(closing);
    this.#queue.clear();
    for (const job of this.#jobs.all()) if (!job.isCommitBegun) job.cancel.abort(closing);
    await Promise.all(this.#jobs.all().map(({ walk }) => walk));
    await this.#leftovers.rest();
  }

  // ---- walking

  #startQueued(): void {
    while (this.#runningCount < this.#limits.runningJobsMax) {
      const job = this.#queue.take();
      if (job === undefined) return;
      this.#runningCount++;
      for (const other of this.#queue.behind(job)) this.#jobs.change(other, { waitsFor: job.view.id });
      job.walk = this.#walk(job, (walk) => this.#fromStart(job, walk)).finally(() => {
        this.#runningCount--;
        this.#startQueued();
      });
    }
  }

  /** Starts a job. A fork that has waited is checked again first, because the VM may have changed meanwhile. */
  async #fromStart(job: Job, walk: JobWalk): Promise<Outcome<JobReport>> {
    if (job.history.kind === 'fork' && job.view.kind === 'fork' && job.view.waitsFor !== null) {
      const error = await reasonAgainst(job.history.record.plan.request, this.#sources());
      if (error !== null) return { kind: 'undone', error, leftovers: [] };
    }
    this.#jobs.change(job, { state: 'running', progress: null, waitsFor: null });
    return walk.fromStart();
  }

  /** Resumes a job. The limit of running jobs does not apply: a job that has begun must not wait for queued jobs. */
  #walkAgain(job: Job): void {
    // A cancel could no longer tell whether it comes before or after the commit.
    job.isCommitBegun = true;
    this.#jobs.change(job, { state: 'recovering' });
    job.walk = this.#walk(job, (walk) => walk.again()).finally(() => this.#startQueued());
  }

  async #walk(job: Job, run: (walk: JobWalk) => Promise<Outcome<JobReport>>): Promise<void> {
    const walk = this.#walkOf(job);
    this.#walks.set(job, walk);
    await this.#settle(job, await this.#outcomeOf(job, walk, () => run(walk)));
  }

  async #outcomeOf(job: Job, walk: JobWalk, run: () => Promise<Outcome<JobReport>>): Promise<Outcome<JobReport>> {
    const { signal } = job.giveUp;
    try {
      const outcome = signal.aborted ? ({ kind: 'halted' } as const) : await run();
      if (outcome.kind !== 'halted' || !signal.aborted || this.#halt.signal.aborted) return outcome;
      if (!hasArrived(job.history)) return await walk.giveUp(toMigrationError(signal.reason));
      job.giveUp = new AbortController(); // The last page came at the same moment, so nothing is given up.
      return await this.#walkOf(job).again();
    } catch (error) {
      // The engine turns every failure into an outcome, so an error here is a bug. The registry still decides at the
      // next attempt.
      return { kind: 'stalled', error: toMigrationError(error) };
    }
  }

  /** Goes on with a job that needs recovery, outside the limit of running jobs: it may take for ever. */
  async #retry(job: Job): Promise<void> {
    const walk = this.#walks.get(job) ?? this.#walkOf(job);
    const attempt = () => this.#outcomeOf(job, walk, () => walk.again());
    const onFailure = (outcome: { error: MigrationError }): void => this.#stillStalled(job, outcome.error);
    await this.#settle(job, await this.#stalled.retry(job, attempt, onFailure));
  }

  #stillStalled(job: Job, error: MigrationError): void {
    const { code, message } = toMigrationError(error);
    const known = job.view.error as { code?: unknown; message?: unknown } | null;
    const isKnown = job.view.state === 'needsRecovery' && known?.code === code && known.message === message;
    if (isKnown) return;
    this.#jobs.change(job, { state: 'needsRecovery', error: error.toJSON(), step: null, ...standing(job.view) });
    this.#options.log.info({ job: job.view.id, vm: job.view.vm, error }, 'job still needs recovery');
  }

  async #settle(job: Job, outcome: Outcome<JobReport>): Promise<void> {
    if (outcome.kind === 'halted') return;
    if (outcome.kind !== 'stalled') {
      this.#queue.release(job);
      this.#walks.delete(job);
    }
    switch (outcome.kind) {
      case 'done':
        await this.#rest(job, { state: 'done', report: outcome.report, error: null });
        break;
      case 'undone': {
        const isCancelled = outcome.error.code === 'CANCELLED';
        for (const step of outcome.leftovers) job.history.leftovers.add(step);
        await this.#rest(job, { state: isCancelled ? 'cancelled' : 'failed', error: outcome.error.toJSON() });
        this.#leftovers.clear(job);
        break;
      }
      case 'stalled':
        await this.#rest(job, { state: 'needsRecovery', error: outcome.error.toJSON(), ...standing(job.view) });
        job.walk = this.#retry(job);
        break;
      case 'lost':
        for (const step of outcome.leftovers) await this.#noteLeftover(job, step);
        await this.#rest(job, { state: 'lost', error: outcome.error.toJSON() });
        this.#leftovers.clear(job);
        break;
    }
  }

  async #noteLeftover(job: Job, step: AnyStepName): Promise<void> {
    job.history.leftovers.add(step);
    const entry: JournalEntry = { type: 'leftover', job: job.view.id, step };
    await this.#options.journal.append(entry).catch((failure: unknown) => this.#warn('cannot journal it', failure));
  }

  async #rest(job: Job, change: Required<Pick<ViewChange, 'state' | 'error'>> & ViewChange): Promise<void> {
    const { journal, clock, log } = this.#options;
    const { state, error, report } = change;
    const at = clock.isoNow();
    const entry: JournalEntry = {
      type: 'state',
      job: job.view.id,
      state,
      at,
      ...(report ? { report } : {}),
      ...(error === null ? {} : { error }),
    };
    // Without this entry the next daemon repeats the end of the job. Every agent call may be repeated.
    await journal.append(entry).catch((failure: unknown) => this.#warn('cannot journal the end of a job', failure));
    // The view has the time of the journal entry, so that the next daemon shows the same time.
    this.#jobs.change(job, { ...change, step: null }, at);
    this.#jobs.forgetOldest();
    const message = isFinal(state) ? 'job ended' : 'job needs recovery';
    log.info({ job: job.view.id, vm: job.view.vm, state, error }, message);
  }

  #walkOf(job: Job): JobWalk {
    return walkOf(job, {
      ...this.#options,
      limits: this.#limits,
      halt: this.#halt.signal,
      observer: observerOf(job, {
        jobs: this.#jobs,
        queue: this.#queue,
        warn: (message, error) => this.#warn(message, error, job.view.id),
      }),
    });
  }

  #warn(message: string, thrown: unknown, job?: string): void {
    this.#options.log.warn(
      { ...(job === undefined ? {} : { job }), error: toMigrationError(thrown).toJSON() },
      message,
    );
  }
}
