/**
 * The jobs of this daemon, each one state machine:
 *
 *   queued -> running -> done
 *      |        |-----> failed | cancelled            before the commit: undone, the VM runs where it was
 *      |        |-----> recovering <-> running        after it: something does not answer and is tried again
 *      |        |-----> needsRecovery -> recovering   `recover`, or the daemon's next start
 *      |        `-----> lost
 *      `-----> cancelled
 *
 * A job is durable before `submit` answers. What a dead daemon has left is finished or undone by `start`.
 */
import type { JobView, MigrationOrder, MigrationPlan, Refusal, StepName } from '../domain.js';
import { ENGINE_LIMITS, type EngineLimits, type JobRecord, type StepContext } from '../engine/context.js';
import { emptyHistory, type History, isCommittedByJournal, readHistories } from '../engine/history.js';
import type { AgentPort, Clock, FaultPort, JournalEntry, Random, Registry } from '../engine/ports.js';
import { isWorthAnotherTry, type Outcome, runAgain, runFromStart, undoStep } from '../engine/run.js';
import { MigrationError, toMigrationError } from '../errors.js';
import { planMigration } from '../planner/plan.js';
import { gatherFacts } from './facts.js';
import { contextOf, isFinal, type Job, newJob } from './job.js';
import type { ReplayableJournal } from './journal.js';
import { Subscribers } from './subscribers.js';
import { agentOrUnreachable } from './unreachable-agent.js';

export interface JobLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

export interface JobLimits extends EngineLimits {
  /** Jobs that move something at the same time; others are queued. */
  readonly runningJobsMax: number;
  /** Backoff of what is left over on a host that does not answer. */
  readonly leftoverMsFirst: number;
  readonly leftoverMsMax: number;
}

export const JOB_LIMITS: JobLimits = {
  ...ENGINE_LIMITS,
  runningJobsMax: 4,
  leftoverMsFirst: 500,
  leftoverMsMax: 30_000,
};

export interface JobManagerOptions {
  /** This host: the source of every job here. */
  readonly host: string;
  /** Throws for a host that is no peer. */
  readonly agent: (host: string) => AgentPort;
  readonly registry: Registry;
  readonly journal: ReplayableJournal;
  readonly clock: Clock;
  readonly random: Random;
  readonly faults: FaultPort;
  readonly log: JobLog;
  readonly limits?: Partial<JobLimits>;
}

type DryRun =
  | { readonly plan: MigrationPlan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

/** Jobs that are listed; older ones that are over are forgotten. */
const JOBS_MAX = 1_000;

export class JobManager {
  readonly #options: JobManagerOptions;
  readonly #limits: JobLimits;
  readonly #jobs = new Map<string, Job>();
  /** VM -> job that has it. */
  readonly #busy = new Map<string, string>();
  readonly #queue: Job[] = [];
  #runningCount = 0;
  readonly #halt = new AbortController();
  readonly #subscribers: Subscribers;
  readonly #background = new Set<Promise<void>>();

  constructor(options: JobManagerOptions) {
    this.#options = options;
    this.#limits = { ...JOB_LIMITS, ...options.limits };
    this.#subscribers = new Subscribers((error) => this.#warn('a subscriber failed', error));
  }

  /** Takes up every job that the journal shows unfinished; resolves when all are under way again. */
  start(): Promise<void> {
    for (const history of readHistories(this.#options.journal.entries()).values()) {
      const job = this.#adopt(history);
      if (isFinal(job.view.state)) {
        this.#clearLeftovers(job);
        continue;
      }
      this.#busy.set(history.record.plan.request.vm, history.record.job);
      this.#walkAgain(job);
    }
    return Promise.resolve();
  }

  /** What `submit` would do, and every reason why it would not. */
  async dryRun(request: MigrationOrder): Promise<DryRun> {
    const { plan, refusals } = await this.#plan(request);
    return plan === null ? { plan, refusals } : { plan, refusals: [] };
  }

  /** Resolves when the job is durable. PREFLIGHT_REFUSED carries the refusals as details. */
  async submit(request: MigrationOrder): Promise<JobView> {
    const { journal, clock, random, host } = this.#options;
    if (this.#halt.signal.aborted) throw new MigrationError('UNREACHABLE', `the daemon on ${host} is closing`);
    const planned = await this.#plan(request);
    if (planned.plan === null) {
      const reasons = planned.refusals.map(({ reason }) => reason).join('; ');
      throw new MigrationError('PREFLIGHT_REFUSED', `${request.vm} cannot move to ${request.target}: ${reasons}`, {
        details: planned.refusals,
      });
    }
    // Between the question and now another submit may have been faster; from here to the journal nothing else runs.
    const other = this.#busy.get(request.vm);
    if (other !== undefined) throw new MigrationError('VM_BUSY', `${request.vm} is part of job ${other}`);
    const record: JobRecord = {
      type: 'job',
      job: `job-${random.hex(6)}`,
      session: random.hex(16),
      token: random.hex(32),
      plan: planned.plan,
      spec: planned.vm.spec,
      epoch: planned.vm.epoch,
      accel: planned.vm.accel,
      createdAt: clock.isoNow(),
    };
    this.#busy.set(request.vm, record.job);
    try {
      await journal.append(record);
    } catch (error) {
      this.#busy.delete(request.vm);
      throw error;
    }
    const job = this.#adopt(emptyHistory(record));
    this.#options.log.info({ job: record.job, vm: request.vm, target: request.target }, 'job accepted');
    this.#queue.push(job);
    this.#startQueued();
    return job.view;
  }

  get(id: string): JobView {
    return this.#job(id).view;
  }

  /** Oldest first. */
  list(): JobView[] {
    return [...this.#jobs.values()].map(({ view }) => view);
  }

  /** Resolves when the VM runs on the source again; CONFLICT once the commit has begun. */
  async cancel(id: string): Promise<JobView> {
    const job = this.#job(id);
    if (isFinal(job.view.state)) {
      if (job.view.state === 'cancelled') return job.view;
      throw new MigrationError('CONFLICT', `job ${id} is ${job.view.state} already`);
    }
    if (job.isCommitBegun) {
      throw new MigrationError('CONFLICT', `execution has moved to ${job.view.target}: job ${id} can only be finished`);
    }
    job.cancel.abort(new MigrationError('CANCELLED', 'cancelled on request'));
    const position = this.#queue.indexOf(job);
    if (position >= 0) {
      this.#queue.splice(position, 1);
      await this.#settle(job, { kind: 'undone', error: toMigrationError(job.cancel.signal.reason), leftovers: [] });
    }
    await job.walk;
    return job.view;
  }

  /** Starts the retries of a job that needs recovery again; harmless for one that is under way. */
  recover(id: string): Promise<JobView> {
    const job = this.#job(id);
    if (isFinal(job.view.state)) {
      const error = new MigrationError('CONFLICT', `job ${id} is ${job.view.state}: there is nothing to recover`);
      return Promise.reject(error);
    }
    if (job.view.state === 'needsRecovery') this.#walkAgain(job);
    return Promise.resolve(job.view);
  }

  /** Each change of one job, or ('*') of all. Returns what ends the subscription. */
  subscribe(id: string, onChange: (view: JobView) => void): () => void {
    if (id !== '*') this.#job(id);
    return this.#subscribers.add(id, onChange);
  }

  /** Undoes what is not committed, leaves the rest to the next daemon, and resolves when nothing of ours is under way any more. */
  async close(): Promise<void> {
    const closing = new MigrationError('CANCELLED', 'the daemon is closing');
    this.#halt.abort(closing);
    this.#queue.length = 0;
    for (const job of this.#jobs.values()) if (!job.isCommitBegun) job.cancel.abort(closing);
    await Promise.all([...this.#jobs.values()].map(({ walk }) => walk));
    await Promise.all(this.#background);
  }

  // ---- planning ---------------------------------------------------------------------------------------------------------------------------

  async #plan(request: MigrationOrder) {
    const { host, agent, registry, clock } = this.#options;
    const facts = await gatherFacts(request, { host, agent, registry, clock, callMsMax: this.#limits.callMsMax });
    if ('ownerElsewhere' in facts) {
      const { ownerElsewhere: owner } = facts;
      const reason = `${request.vm} belongs to ${owner}, not to ${host}`;
      return {
        plan: null,
        refusals: [{ code: 'VM_NOT_OWNED', reason, remedy: `ask the daemon on ${owner}` }],
      } as const;
    }
    const job = facts.vm.job ?? this.#busy.get(request.vm) ?? null;
    const vm = { ...facts.vm, job };
    return { ...planMigration(request, { ...facts, vm }), vm };
  }

  // ---- walking ----------------------------------------------------------------------------------------------------------------------------

  #adopt(history: History): Job {
    const job = newJob(history);
    this.#jobs.set(job.view.id, job);
    return job;
  }

  #startQueued(): void {
    while (this.#runningCount < this.#limits.runningJobsMax) {
      const job = this.#queue.shift();
      if (job === undefined) return;
      this.#runningCount++;
      job.walk = this.#walk(job, (context) => runFromStart(context)).finally(() => {
        this.#runningCount--;
        this.#startQueued();
      });
    }
  }

  /** Outside the limit: what has begun must not wait for what has not. */
  #walkAgain(job: Job): void {
    const { begun, ended } = job.history;
    // A cancel could not tell any more whether it comes before or after the commit.
    job.isCommitBegun = true;
    this.#change(job, { state: 'recovering' });
    job.walk = this.#walk(job, (context) =>
      runAgain(context, { begun, ended, isCommitProven: isCommittedByJournal(job.history) }),
    );
  }

  async #walk(job: Job, run: (context: StepContext) => Promise<Outcome>): Promise<void> {
    let outcome: Outcome;
    try {
      if (job.view.state === 'queued') this.#change(job, { state: 'running' });
      outcome = await run(this.#context(job));
    } catch (error) {
      // The engine turns every failure into an outcome; what gets here is a bug, and the registry still decides at the next recover.
      outcome = { kind: 'stalled', error: toMigrationError(error) };
    }
    await this.#settle(job, outcome);
  }

  async #settle(job: Job, outcome: Outcome): Promise<void> {
    const { record } = job.history;
    if (outcome.kind === 'halted') return;
    if (outcome.kind !== 'stalled') this.#busy.delete(record.plan.request.vm);
    switch (outcome.kind) {
      case 'done':
        await this.#rest(job, { state: 'done', report: outcome.report, error: null });
        break;
      case 'undone': {
        const isCancelled = outcome.error.code === 'CANCELLED';
        for (const step of outcome.leftovers) job.history.leftovers.add(step);
        await this.#rest(job, { state: isCancelled ? 'cancelled' : 'failed', error: outcome.error.toJSON() });
        this.#clearLeftovers(job);
        break;
      }
      case 'stalled':
        await this.#rest(job, { state: 'needsRecovery', error: outcome.error.toJSON() });
        break;
      case 'lost':
        await this.#rest(job, { state: 'lost', error: outcome.error.toJSON() });
        break;
    }
  }

  async #rest(job: Job, change: Pick<JobView, 'state' | 'error'> & Partial<Pick<JobView, 'report'>>): Promise<void> {
    const { journal, clock, log } = this.#options;
    const { state, error, report } = change;
    const entry: JournalEntry = {
      type: 'state',
      job: job.view.id,
      state,
      at: clock.isoNow(),
      ...(report ? { report } : {}),
      ...(error === null ? {} : { error }),
    };
    // Without this line the next daemon repeats the end of the job, which every agent call allows.
    await journal.append(entry).catch((failure: unknown) => this.#warn('the journal lacks the end of a job', failure));
    this.#change(job, { ...change, step: null });
    this.#forgetOldest();
    log.info({ job: job.view.id, vm: job.view.vm, state, error }, 'job rests');
  }

  /** In the order of their creation; a map keeps it. */
  #forgetOldest(): void {
    if (this.#jobs.size <= JOBS_MAX) return;
    for (const [id, { view, history }] of this.#jobs) {
      if (!isFinal(view.state) || history.leftovers.size > 0) continue;
      this.#jobs.delete(id);
      return;
    }
  }

  #context(job: Job): StepContext {
    const { registry, journal, clock, faults, agent, host } = this.#options;
    const target = agentOrUnreachable(agent, job.view.target);
    const ports = { source: agent(host), target, registry, journal, clock, faults };
    const change = (changed: Partial<JobView>): void => this.#change(job, changed);
    return {
      ...contextOf(job, ports, this.#limits, this.#halt.signal),
      observer: {
        onStep: (step) => change({ step }),
        onProgress: (progress) => change({ progress }),
        onCommitBegun: () => {
          job.isCommitBegun = true;
        },
        onCommitted: () => {
          job.isCommitBegun = true;
          change({ isCommitted: true });
        },
        onRecovering: (error) => {
          if (error !== null) change({ state: 'recovering', error: error.toJSON() });
          else if (job.view.state === 'recovering') change({ state: 'running', error: null });
        },
        onWarning: (message, error) => this.#warn(message, error, job.view.id),
      },
    };
  }

  // ---- leftovers --------------------------------------------------------------------------------------------------------------------------

  #clearLeftovers(job: Job): void {
    for (const step of job.history.leftovers) {
      const clearing: Promise<void> = this.#clear(job, step).finally(() => this.#background.delete(clearing));
      this.#background.add(clearing);
    }
  }

  async #clear(job: Job, step: StepName): Promise<void> {
    const { clock, journal } = this.#options;
    const { signal } = this.#halt;
    for (
      let waitMs = this.#limits.leftoverMsFirst;
      !signal.aborted;
      waitMs = Math.min(waitMs * 2, this.#limits.leftoverMsMax)
    ) {
      await clock.sleep(waitMs, signal).catch(() => undefined);
      if (signal.aborted) return;
      try {
        await undoStep(this.#context(job), step);
      } catch (thrown) {
        const error = toMigrationError(thrown);
        if (isWorthAnotherTry(error)) continue;
        this.#warn(`${step} stays as it is`, error, job.view.id);
      }
      try {
        await journal.append({ type: 'cleared', job: job.view.id, step });
        job.history.leftovers.delete(step);
        return;
      } catch (error) {
        this.#warn('the journal lacks an entry (cleared)', error, job.view.id);
      }
    }
  }

  // ---- views ------------------------------------------------------------------------------------------------------------------------------

  #job(id: string): Job {
    const job = this.#jobs.get(id);
    if (job === undefined) throw new MigrationError('NOT_FOUND', `there is no job ${id}`);
    return job;
  }

  #change(job: Job, change: Partial<JobView>): void {
    job.view = { ...job.view, ...change, updatedAt: this.#options.clock.isoNow() };
    this.#subscribers.tell(job.view);
  }

  #warn(message: string, thrown: unknown, job?: string): void {
    this.#options.log.warn(
      { ...(job === undefined ? {} : { job }), error: toMigrationError(thrown).toJSON() },
      message,
    );
  }
}
