import { MigrationError } from '../domain/errors.js';
import type { ForkReport } from '../domain/fork.js';
import type { JobState } from '../domain/job.js';
import type { MigrationReport } from '../domain/migration.js';
import { type ForkFindings, type ForkJobRecord, noForkFindings } from '../engine/fork/context.js';
import { type Findings, type MigrationRecord, noFindings } from '../engine/migration/context.js';
import type { AnyStepName, JournalEntry } from '../engine/ports/journal.js';
import { FORK_STEPS_AFTER_COMMIT, UNGROUPED_FORK_STEPS } from '../planner/fork/plan.js';
import { PLAN_STEPS_AFTER_COMMIT } from '../planner/migration/plan.js';

interface AnyHistory {
  /** Announced steps, which may or may not have taken effect. */
  readonly begun: Set<AnyStepName>;
  readonly ended: Set<AnyStepName>;
  readonly leftovers: Set<AnyStepName>;
  readonly phases: { name: string; ms: number }[];
  state: JobState | null;
  error: unknown;
  updatedAt: string;
}

export interface MigrationHistory extends AnyHistory {
  readonly kind: 'migrate';
  readonly record: MigrationRecord;
  readonly findings: Findings;
  report: MigrationReport | undefined;
}

export interface ForkHistory extends AnyHistory {
  readonly kind: 'fork';
  readonly record: ForkJobRecord;
  readonly findings: ForkFindings;
  report: ForkReport | undefined;
}

/** The state of one job according to the journal: the fold of its entries. */
export type History = MigrationHistory | ForkHistory;

export function emptyHistory(record: MigrationRecord | ForkJobRecord): History {
  const empty = {
    begun: new Set<AnyStepName>(),
    ended: new Set<AnyStepName>(),
    leftovers: new Set<AnyStepName>(),
    phases: [],
    state: null,
    report: undefined,
    error: null,
    updatedAt: record.createdAt,
  };
  return record.type === 'fork'
    ? { kind: 'fork', record, findings: noForkFindings(), ...empty }
    : { kind: 'migrate', record, findings: noFindings(), ...empty };
}

/** Returns whether the journal itself proves the commit. If not, the registry decides, or the host for a fork. */
export function isCommittedByJournal({ kind, begun, ended }: History): boolean {
  const proofs: readonly AnyStepName[] =
    kind === 'fork' ? ['commitFork', ...FORK_STEPS_AFTER_COMMIT] : ['commit', ...PLAN_STEPS_AFTER_COMMIT];
  // These steps are announced by themselves, after the commit.
  const begins: readonly AnyStepName[] = kind === 'fork' ? UNGROUPED_FORK_STEPS : [];
  return proofs.some((step) => ended.has(step)) || begins.some((step) => begun.has(step));
}

/**
 * Folds the entries of the journal, in order, into one history for each job. An entry without an earlier first line of
 * its job is ignored, because that job was compacted away. Throws CORRUPT for a line that does not fit the kind of its
 * job.
 */
export function readHistories(entries: readonly JournalEntry[]): Map<string, History> {
  const histories = new Map<string, History>();
  for (const entry of entries) {
    if (entry.type === 'job' || entry.type === 'fork') {
      histories.set(entry.job, emptyHistory(entry));
      continue;
    }
    const history = histories.get(entry.job);
    if (history !== undefined) note(history, entry);
  }
  return histories;
}

function note(history: History, entry: Exclude<JournalEntry, { type: 'job' | 'fork' }>): void {
  switch (entry.type) {
    case 'begin':
      for (const step of [entry.step, ...(entry.group ?? [])]) history.begun.add(checked(history, step));
      if (typeof entry.found === 'object' && entry.found !== null) Object.assign(history.findings, entry.found);
      if (history.kind === 'migrate' && entry.at !== undefined && entry.step === blackoutBegin(history)) {
        history.findings.stoppedAt = entry.at;
      }
      break;
    case 'end':
      history.ended.add(checked(history, entry.step));
      history.phases.push({ name: entry.step, ms: entry.ms });
      // This engine wrote the result and the journal checks its checksum, so its keys are those of the findings.
      if (typeof entry.result === 'object' && entry.result !== null) Object.assign(history.findings, entry.result);
      break;
    case 'undo':
      break;
    case 'leftover':
      history.leftovers.add(checked(history, entry.step));
      break;
    case 'cleared':
      history.leftovers.delete(entry.step);
      break;
    case 'state':
      history.state = entry.state;
      noteReport(history, entry.report);
      history.error = entry.error ?? null;
      if (entry.at !== undefined) history.updatedAt = entry.at;
      break;
  }
}

/** Returns the step that stops the VM. The other steps of the blackout are announced with it (engine/walk.ts). */
function blackoutBegin({ record }: MigrationHistory): AnyStepName | undefined {
  return record.plan.steps.find(({ isInBlackout }) => isInBlackout)?.name;
}

function checked({ record }: History, step: AnyStepName): AnyStepName {
  if (record.plan.steps.some(({ name }) => name === step)) return step;
  throw new MigrationError(
    'CORRUPT',
    `the journal has an entry for step ${step} of job ${record.job}, whose plan has no such step`,
  );
}

function noteReport(history: History, report: MigrationReport | ForkReport | undefined): void {
  if (report === undefined) {
    history.report = undefined;
  } else if (history.kind === 'fork' && 'image' in report) {
    history.report = report;
  } else if (history.kind === 'migrate' && !('image' in report)) {
    history.report = report;
  } else {
    throw new MigrationError(
      'CORRUPT',
      `the report of ${history.kind} job ${history.record.job} in the journal is of the other kind`,
    );
  }
}
