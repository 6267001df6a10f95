import type { JobState, StepName } from '../domain.js';
import { PLAN_STEPS_AFTER_COMMIT } from '../planner/plan.js';
import { type Findings, type JobRecord, noFindings } from './context.js';
import type { JournalEntry } from './ports.js';

/** What the journal says of one job: the fold of its entries. */
export interface History {
  readonly record: JobRecord;
  /** Announced; may or may not have taken effect. */
  readonly begun: Set<StepName>;
  readonly ended: Set<StepName>;
  readonly leftovers: Set<StepName>;
  readonly findings: Findings;
  readonly phases: { name: string; ms: number }[];
  state: JobState | null;
  report: Extract<JournalEntry, { type: 'state' }>['report'];
  error: unknown;
  updatedAt: string;
}

export function emptyHistory(record: JobRecord): History {
  return {
    record,
    begun: new Set(),
    ended: new Set(),
    leftovers: new Set(),
    findings: noFindings(),
    phases: [],
    state: null,
    report: undefined,
    error: null,
    updatedAt: record.createdAt,
  };
}

/** Does the journal itself prove the commit? If not, the registry is asked. */
export function isCommittedByJournal(history: History): boolean {
  return history.ended.has('commit') || PLAN_STEPS_AFTER_COMMIT.some((step) => history.ended.has(step));
}

/** Entries of one job in the order of the journal; entries of jobs that the journal does not introduce are ignored (their job was compacted). */
export function readHistories(entries: readonly JournalEntry[]): Map<string, History> {
  const histories = new Map<string, History>();
  for (const entry of entries) {
    if (entry.type === 'job') {
      histories.set(entry.job, emptyHistory(entry));
      continue;
    }
    const history = histories.get(entry.job);
    if (history !== undefined) note(history, entry);
  }
  return histories;
}

function note(history: History, entry: Exclude<JournalEntry, { type: 'job' }>): void {
  switch (entry.type) {
    case 'begin':
      for (const step of [entry.step, ...(entry.group ?? [])]) history.begun.add(step);
      if (entry.at !== undefined && (entry.step === 'stopSource' || entry.step === 'nativeSwitchover')) {
        history.findings.stoppedAt = entry.at;
      }
      break;
    case 'end':
      history.ended.add(entry.step);
      history.phases.push({ name: entry.step, ms: entry.ms });
      // Written by this engine and checksummed by the journal: the keys are those of Findings.
      if (typeof entry.result === 'object' && entry.result !== null) Object.assign(history.findings, entry.result);
      break;
    case 'undo':
      break;
    case 'leftover':
      history.leftovers.add(entry.step);
      break;
    case 'cleared':
      history.leftovers.delete(entry.step);
      break;
    case 'state':
      history.state = entry.state;
      history.report = entry.report;
      history.error = entry.error ?? null;
      if (entry.at !== undefined) history.updatedAt = entry.at;
      break;
  }
}
