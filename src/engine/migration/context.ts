import type { GuestEnd } from '../../domain/guest-end.js';
import type { StepName } from '../../domain/migration.js';
import type { DifferentChunk, MemoryVerification } from '../../domain/verification.js';
import type { InventoryPort } from '../ports/inventory.js';
import type { JournalEntry } from '../ports/journal.js';
import type { Registry } from '../ports/registry.js';
import type { SourceEndpointInfo } from '../ports/session.js';
import type { SourcePort } from '../ports/source.js';
import type { TargetPort } from '../ports/target.js';
import type { Executor, WalkContext, WalkPorts, WalkStep } from '../walk-context.js';

/** The definition of a migration, fixed when it is submitted: its first journal entry, of type 'job' on disk. */
export type MigrationRecord = Extract<JournalEntry, { type: 'job' }>;

/**
 * Results of steps that later steps or the report need. The journal stores them with each step's end, so they survive
 * the daemon.
 */
export interface Findings {
  deviceStateBytes: number;
  /** Time of the stop by the wall clock, the only clock that two lives of the daemon share. */
  stoppedAt: string | null;
  /** Times of stop and resume by the wall clocks of the two QEMUs. */
  stoppedAtUs: number | null;
  resumedAtUs: number | null;
  blackoutMs: number | null;
  pageBytes: number;
  rounds: number;
  pushBytes: number;
  targetCounters: Readonly<Record<string, number>>;
  sourceCounters: Readonly<Record<string, number>>;
  /** Set if the guest has ended by itself on the target. */
  guestEnd: GuestEnd | null;
  verified: MemoryVerification | null;
}

export function noFindings(): Findings {
  return {
    deviceStateBytes: 0,
    stoppedAt: null,
    stoppedAtUs: null,
    resumedAtUs: null,
    blackoutMs: null,
    pageBytes: 0,
    rounds: 0,
    pushBytes: 0,
    targetCounters: {},
    sourceCounters: {},
    guestEnd: null,
    verified: null,
  };
}

/** How far the comparison of one move has come. Kept over attempts, so that a lost connection costs one call. */
export interface Comparison {
  readonly beganAtMs: number;
  /** The next region and chunk. */
  region: number;
  chunk: number;
  /** Of chunks that are equal. */
  chunksEqual: number;
  pagesEqual: number;
  /** The first of them. */
  readonly different: DifferentChunk[];
  differentCount: number;
  isCondemned: boolean;
}

/** What a pre-copy has to fetch while the VM stands still, and how fast it has fetched until then. */
export interface Left {
  readonly bytes: number;
  readonly fetchedBytesPerS: number;
  readonly pageBytes: number;
}

/** The context of a migration's walk. */
export interface StepContext extends WalkContext<WalkStep<StepName>> {
  readonly record: MigrationRecord;
  readonly ports: EnginePorts;
  readonly findings: Findings;
  /** The source's current keys. They are secret, so the journal does not hold them. */
  endpoint: SourceEndpointInfo | null;
  comparison: Comparison | null;
  /** Of a pre-copy: what is left to fetch when the VM stops. */
  left: Left | null;
}

export type StepExecutor = Executor<StepContext, Findings>;

export interface EnginePorts extends WalkPorts {
  /** Both of the host that the VM leaves. */
  readonly source: SourcePort;
  readonly sourceInventory: Pick<InventoryPort, 'vmInventory'>;
  /** Of the host that it arrives at. */
  readonly target: TargetPort;
  readonly registry: Registry;
}
