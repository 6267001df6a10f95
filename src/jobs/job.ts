import type { ForkReport } from '../domain/fork.js';
import { type ForkJobView, isFinal, type JobState, type JobView, type MigrationJobView } from '../domain/job.js';
import type { MigrationReport } from '../domain/migration.js';
import { type ForkHistory, type History, isCommittedByJournal, type MigrationHistory } from './history.js';

/** A job in the memory of this daemon. */
export interface Job {
  readonly history: History;
  view: JobView;
  readonly cancel: AbortController;
  isCommitBegun: boolean;
  /** Aborted, with the reason, when a user gives up a committed job: it ends as lost. */
  giveUp: AbortController;
  /** Time of the request by this daemon's monotonic clock. Null if an earlier daemon accepted the job. */
  readonly submittedAtMs: number | null;
  /** The current walk. It resolves when the job has ended or needs recovery, and never rejects. */
  walk: Promise<void>;
}

/** A change of a view of either kind. It has no fields that do not fit the job's kind. */
export type ViewChange = Partial<Omit<MigrationJobView, 'kind' | 'step' | 'report'>> & {
  readonly waitsFor?: string | null;
  readonly step?: JobView['step'];
  readonly report?: MigrationReport | ForkReport | null;
};

export function newJob(history: History, submittedAtMs: number | null): Job {
  const isCommitted = isCommittedByJournal(history) || ['done', 'lost', 'needsRecovery'].includes(history.state ?? '');
  return {
    history,
    view: history.kind === 'fork' ? forkView(history, isCommitted) : migrationView(history, isCommitted),
    cancel: new AbortController(),
    giveUp: new AbortController(),
    isCommitBegun: isCommitted,
    submittedAtMs,
    walk: Promise.resolve(),
  };
}

/** The figures of a job in which nothing advances: what has arrived, without a rate. */
export function standing({ progress }: JobView): Pick<ViewChange, 'progress'> {
  return progress === null ? {} : { progress: { ...progress, bytesPerS: 0, secondsLeft: null } };
}

export function isHeldUp(state: JobState): boolean {
  return state === 'recovering' || state === 'needsRecovery';
}

/** Returns whether a cancel would be accepted now. */
export function isCancellable({ view, isCommitBegun }: Job): boolean {
  return !isFinal(view.state) && !isCommitBegun;
}

/** The VM that the job holds: no other job may hold it at the same time. */
export function vmOf({ history }: Job): string | null {
  return history.record.plan.request.vm;
}

export function changed(job: Job, change: ViewChange, updatedAt: string): JobView {
  const next = { ...job.view, ...change, updatedAt } as JobView;
  return job.history.kind === 'fork' ? { ...next, ...forkFacts(job.history, next.state) } : next;
}

function common({ record, state, error, updatedAt }: History, isCommitted: boolean) {
  return {
    id: record.job,
    state: state ?? 'queued',
    step: null,
    isCommitted,
    progress: null,
    error: error ?? null,
    createdAt: record.createdAt,
    updatedAt,
  };
}

function migrationView(history: MigrationHistory, isCommitted: boolean): MigrationJobView {
  const { request, source } = history.record.plan;
  return {
    kind: 'migrate',
    vm: request.vm,
    source,
    target: request.target,
    report: history.report ?? null,
    ...common(history, isCommitted),
  };
}

function forkView(history: ForkHistory, isCommitted: boolean): ForkJobView {
  const { request, parent, host } = history.record.plan;
  return {
    kind: 'fork',
    vm: parent,
    source: host,
    cloneCount: request.cloneCount,
    waitsFor: null,
    report: history.report ?? null,
    ...common(history, isCommitted),
    ...forkFacts(history, history.state),
  };
}

/**
 * Returns the image and the clones that run. They come from the findings of the steps, and from the report once the job
 * has ended. A job that was undone has left no clones.
 */
function forkFacts(
  { record, findings, report }: ForkHistory,
  state: JobState | null,
): Pick<ForkJobView, 'image' | 'clones'> {
  if (state === 'failed' || state === 'cancelled') return { image: record.plan.request.image, clones: [] };
  const ready = new Set(findings.ready.map(({ index }) => index));
  const running = report?.clones ?? findings.clones.filter(({ index }) => ready.has(index));
  return {
    image: report?.image ?? findings.image ?? record.plan.request.image,
    clones: running.map(({ name }) => name),
  };
}
