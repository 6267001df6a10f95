import type { CloneFailure, CloneIdentity, ForkStep } from '../../domain/fork.js';
import type { AgentPort } from '../ports/agent.js';
import type { ForkAgentPort } from '../ports/fork.js';
import type { JournalEntry } from '../ports/journal.js';
import type { Executor, WalkContext, WalkPorts } from '../walk-context.js';

/** The definition of a fork, fixed when it is submitted: its first journal entry. */
export type ForkRecord = Extract<JournalEntry, { type: 'fork' }>;

/** Results of steps that later steps or the report need. The journal stores them with each step's end. */
export interface ForkFindings {
  image: string | null;
  isWarm: boolean;
  clones: readonly CloneIdentity[];
  failures: readonly CloneFailure[];
  parentPauseMs: number;
  pauseParts: readonly { readonly name: string; readonly ms: number }[];
  deviceStateBytes: number;
  /** The time until each clone was ready, counted from the request. */
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
  /** Both ports are those of this host. */
  readonly agent: AgentPort;
  readonly forks: ForkAgentPort;
}

export interface ForkStepContext extends WalkContext<ForkStep> {
  readonly record: ForkRecord;
  readonly ports: ForkPorts;
  readonly findings: ForkFindings;
}

export type ForkExecutor = Executor<ForkStepContext, ForkFindings>;
