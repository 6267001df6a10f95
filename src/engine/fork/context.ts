import type { CloneFailure, CloneIdentity, ForkStep } from '../../domain/fork.js';
import type { FanoutPort } from '../ports/fanout.js';
import type { ForkPort } from '../ports/fork.js';
import type { JournalEntry } from '../ports/journal.js';
import type { SourcePort } from '../ports/source.js';
import type { Executor, WalkContext, WalkPorts } from '../walk-context.js';

/**
 * The definition of a fork, fixed when it is submitted: its first journal entry. The agent keeps a record of its own
 * (src/agent/fork/record.ts).
 */
export type ForkJobRecord = Extract<JournalEntry, { type: 'fork' }>;

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
  /** Of the root. */
  counters: Readonly<Record<string, number>>;
  /** The counters of the hosts that joined, by host. */
  joined: Readonly<Record<string, Readonly<Record<string, number>>>>;
  /** Bytes of pages that each of them has got from other hosts than the root, by host and by that other host. */
  near: Readonly<Record<string, Readonly<Record<string, number>>>>;
  /** What the root has sent as a multicast. */
  multicastBytes: number;
  /** Hosts of the plan that have failed before the commit, and take no part any more. */
  leftOut: readonly string[];
  /** Hosts that joined whose clones have run. The others have not answered since the commit. */
  ran: readonly string[];
  /** Hosts that have lost their part after the commit. Their clones are among the failures. */
  lost: readonly string[];
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
    joined: {},
    near: {},
    multicastBytes: 0,
    leftOut: [],
    ran: [],
    lost: [],
  };
}

export interface ForkPorts extends WalkPorts {
  /** These are ports of the host that has the parent, or the image. */
  readonly parent: Pick<SourcePort, 'reserve' | 'unreserve'>;
  readonly forks: ForkPort;
  readonly fanout: Pick<FanoutPort, 'multicastSent'>;
  /** Those of a host that joins the fork. One that is not a peer any more has nothing of the fork. */
  readonly forksOf: (host: string) => ForkPort;
}

export interface ForkStepContext extends WalkContext<ForkStep> {
  readonly record: ForkJobRecord;
  readonly ports: ForkPorts;
  readonly findings: ForkFindings;
}

export type ForkExecutor = Executor<ForkStepContext, ForkFindings>;
