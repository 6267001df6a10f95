import type { JobState, JobView } from '../domain.js';
import type { EngineLimits, StepContext } from '../engine/context.js';
import { type History, isCommittedByJournal } from '../engine/history.js';
import type { EnginePorts, JournalEntry } from '../engine/ports.js';

/** A job as this daemon has it in its hands. */
export interface Job {
  readonly history: History;
  view: JobView;
  readonly cancel: AbortController;
  isCommitBegun: boolean;
  /** The present walk; settles when the job rests. Never rejects. */
  walk: Promise<void>;
}

const FINAL_STATES: ReadonlySet<JobState> = new Set(['done', 'failed', 'cancelled', 'lost']);

export function isFinal(state: JobState): boolean {
  return FINAL_STATES.has(state);
}

export function newJob(history: History): Job {
  const { record, state, report, error, updatedAt } = history;
  const { request, source } = record.plan;
  const isCommitted = isCommittedByJournal(history) || ['done', 'lost', 'needsRecovery'].includes(state ?? '');
  return {
    history,
    view: {
      id: record.job,
      kind: 'migrate',
      vm: request.vm,
      source,
      target: request.target,
      state: state ?? 'queued',
      step: null,
      isCommitted,
      progress: null,
      report: report ?? null,
      error: error ?? null,
      createdAt: record.createdAt,
      updatedAt,
    },
    cancel: new AbortController(),
    isCommitBegun: isCommitted,
    walk: Promise.resolve(),
  };
}

/** What the engine needs to walk the job. What the journal takes is noted in the history too, so that a later walk of this daemon knows it. */
export function contextOf(
  { history, cancel }: Job,
  ports: EnginePorts,
  limits: EngineLimits,
  halt: AbortSignal,
): Omit<StepContext, 'observer'> {
  const append = async (entry: JournalEntry): Promise<void> => {
    await ports.journal.append(entry);
    if (entry.type === 'begin') for (const step of [entry.step, ...(entry.group ?? [])]) history.begun.add(step);
    if (entry.type === 'end') history.ended.add(entry.step);
  };
  return {
    record: history.record,
    ports: { ...ports, journal: { append } },
    limits,
    cancel: cancel.signal,
    halt,
    findings: history.findings,
    phases: history.phases,
    marks: { startedAtMs: null, stoppedAtMs: null, advancedAtMs: ports.clock.nowMs(), advancedTo: -1 },
    endpoint: null,
  };
}
