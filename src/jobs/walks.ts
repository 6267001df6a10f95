/** Makes the engine's walk for a job: that of its kind, on this daemon's ports. */

import type { MigrationError } from '../domain/errors.js';
import type { ForkReport } from '../domain/fork.js';
import type { MigrationReport } from '../domain/migration.js';
import { forkWalk } from '../engine/fork/procedure.js';
import { migrationWalk } from '../engine/migration/procedure.js';
import type { HostPort } from '../engine/ports/host.js';
import type { AnyStepName, JournalEntry } from '../engine/ports/journal.js';
import type { Registry } from '../engine/ports/registry.js';
import type { Outcome } from '../engine/walk.js';
import { type EngineLimits, newMarks, type RunObserver, type WalkPorts } from '../engine/walk-context.js';
import { type History, isCommittedByJournal } from './history.js';
import type { Job } from './job.js';
import { hostOrGone, hostOrUnreachable } from './unreachable-host.js';

export interface JobWalk {
  fromStart(): Promise<Outcome<MigrationReport | ForkReport>>;
  again(): Promise<Outcome<MigrationReport | ForkReport>>;
  /** Ends a job that cannot be finished, and frees what it holds. */
  giveUp(error: MigrationError): Promise<Outcome<MigrationReport | ForkReport>>;
  /** Gives the job the full time again in which nothing need advance. */
  refresh(): void;
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
  const { host, agent, registry, clock, inject, limits, observer } = parts;
  const halt = AbortSignal.any([parts.halt, job.giveUp.signal]);
  const local = agent(host);
  const ports = { journal: { append: appendTo(history, parts) }, clock, inject };
  const marks = newMarks(history.kind === 'fork' ? submittedAtMs : null, clock.nowMs());
  const refresh = (): void => {
    marks.isStalled = false;
    marks.advancedAtMs = clock.nowMs();
  };
  const common = { cancel: cancel.signal, halt, observer, phases: history.phases, marks };
  const journal = {
    begun: history.begun,
    ended: history.ended,
    get isCommitProven() {
      return isCommittedByJournal(history);
    },
  };
  if (history.kind === 'fork') {
    const { record, findings } = history;
    const context = {
      ...common,
      ...{ record, findings },
      limits: { ...limits, undoCallMsMax: Math.max(limits.undoCallMsMax, FORK_UNDO_MS_MAX) },
      ports: {
        ...{ ...ports, parent: local.source, forks: local.forks, fanout: local.fanout },
        forksOf: (name: string) => hostOrGone(agent, name).forks,
      },
    };
    return {
      fromStart: () => forkWalk.fromStart(context),
      again: () => forkWalk.again(context, journal),
      giveUp: (error) => forkWalk.giveUp(context, error),
      refresh,
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
    comparison: null,
    left: null,
  };
  return {
    fromStart: () => migrationWalk.fromStart(context),
    again: () => migrationWalk.again(context, journal),
    giveUp: (error) => migrationWalk.giveUp(context, error),
    refresh,
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
