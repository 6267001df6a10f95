import type { CloneFailure, CloneIdentity, ForkStep } from '../../domain/fork.js';
import type { ForkPort } from '../ports/fork.js';
import type { JournalEntry } from '../ports/journal.js';
import type { SourcePort } from '../ports/source.js';
import type { Executor, WalkContext, WalkPorts } from '../walk-context.js';

/**
 * What the job of a fork is, fixed when it is submitted: its first journal entry. The agent keeps a record of its own
 * (src/agent/fork/record.ts).
 */
export type ForkJobRecord = Extract<JournalEntry, { type: 'fork' }>;

/** What steps have learned and later ones (or the report) need. The journal keeps it with each step's end. */
export interface ForkFindings {
  image: string | null;
  isWarm: boolean;
  clones: readonly CloneIdentity[];
  failures: readonly CloneFailure[];
  parentPauseMs: number;
  pauseParts: readonly { readonly name: string; readonly ms: number }[];
  deviceStateBytes: number;
  /** Counted from the request. */
  ready: readonly { readonly index: number; readonly readyMs: number }[];
  pageBytes: number;
  counters: Readonly<Record<string, number>>;
}

export function noForkFindings(): ForkFindings {
  return {
    image: null,
    isWarm: false,
    clones: [],
    failures: [],
    parentPauseMs: 0,
    pauseParts: [],
    deviceStateBytes: 0,
    ready: [],
    pageBytes: 0,
    counters: {},
  };
}

export interface ForkPorts extends WalkPorts {
  /** Both of the host that has the parent, or the image. */
  readonly parent: Pick<SourcePort, 'reserve' | 'unreserve'>;
  readonly forks: ForkPort;
}

export interface ForkStepContext extends WalkContext<ForkStep> {
  readonly record: ForkJobRecord;
  readonly ports: ForkPorts;
  readonly findings: ForkFindings;
}

export type ForkExecutor = Executor<ForkStepContext, ForkFindings>;
