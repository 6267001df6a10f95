/** Makes the engine's walk for a job: that of its kind, on this daemon's ports. */

import type { ForkReport } from '../domain/fork.js';
import type { MigrationReport } from '../domain/migration.js';
import { forkWalk } from '../engine/fork/procedure.js';
import { migrationWalk } from '../engine/migration/procedure.js';
import type { HostPort } from '../engine/ports/host.js';
import type { AnyStepName, JournalEntry } from '../engine/ports/journal.js';
import type { Registry } from '../engine/ports/registry.js';
import type { Outcome } from '../engine/walk.js';
import type { EngineLimits, Marks, RunObserver, WalkPorts } from '../engine/walk-context.js';
import { type History, isCommittedByJournal } from './history.js';
import type { Job } from './job.js';
import { hostOrUnreachable } from './unreachable-host.js';

export interface JobWalk {
  fromStart(): Promise<Outcome<MigrationReport | ForkReport>>;
  again(): Promise<Outcome<MigrationReport | ForkReport>>;
  undoStep(step: AnyStepName): Promise<void>;
}

export interface WalkParts extends WalkPorts {
  readonly host: string;
  /** Throws for a host that is not a peer. */
  readonly agent: (host: string) => HostPort;
  readonly registry: Registry;
  readonly limits: EngineLimits;
  readonly halt: AbortSignal;
  readonly observer: RunObserver;
}

/** Ending many QEMU processes takes longer than the undo of a migration. The parent runs again before that begins. */
const FORK_UNDO_MS_MAX = 30_000;

export function walkOf(job: Job, parts: WalkParts): JobWalk {
  const { history, cancel, submittedAtMs } = job;
  const { host, agent, registry, clock, inject, limits, halt, observer } = parts;
  const local = agent(host);
  const ports = { journal: { append: appendTo(history, parts) }, clock, inject };
  const marks: Marks = {
    startedAtMs: history.kind === 'fork' ? submittedAtMs : null,
    stoppedAtMs: null,
    advancedAtMs: clock.nowMs(),
    advancedTo: -1,
    trouble: null,
  };
  const common = { cancel: cancel.signal, halt, observer, phases: history.phases, marks };
  const journal = { begun: history.begun, ended: history.ended, isCommitProven: isCommittedByJournal(history) };
  if (history.kind === 'fork') {
    const { record, findings } = history;
    const context = {
      ...common,
      ...{ record, findings },
      limits: { ...limits, undoCallMsMax: Math.max(limits.undoCallMsMax, FORK_UNDO_MS_MAX) },
      ports: { ...ports, parent: local.source, forks: local.forks },
    };
    return {
      fromStart: () => forkWalk.fromStart(context),
      again: () => forkWalk.again(context, journal),
      undoStep: (step) => forkWalk.undoStep(context, step),
    };
  }
  const { record, findings } = history;
  const { target } = hostOrUnreachable(agent, record.plan.request.target);
  const context = {
    ...common,
    ...{ record, findings, limits },
    ports: { ...ports, source: local.source, sourceInventory: local.inventory, target, registry },
    endpoint: null,
  };
  return {
    fromStart: () => migrationWalk.fromStart(context),
    again: () => migrationWalk.again(context, journal),
    undoStep: (step) => migrationWalk.undoStep(context, step),
  };
}

/** Appends to the journal, and notes each entry in the history for a later walk of this daemon. */
function appendTo(history: History, { journal }: WalkParts) {
  return async (entry: JournalEntry): Promise<void> => {
    await journal.append(entry);
    if (entry.type === 'begin') for (const step of [entry.step, ...(entry.group ?? [])]) history.begun.add(step);
    if (entry.type === 'end') history.ended.add(entry.step);
  };
}
