import type { MigrationRequest, StepName } from '../../domain/migration.js';
import type { InventoryPort } from '../ports/inventory.js';
import type { JournalEntry } from '../ports/journal.js';
import type { Registry } from '../ports/registry.js';
import type { SourceEndpointInfo } from '../ports/session.js';
import type { SourcePort } from '../ports/source.js';
import type { TargetPort } from '../ports/target.js';
import type { Executor, WalkContext, WalkPorts, WalkStep } from '../walk-context.js';

/** What a migration is, fixed when it is submitted: its first journal entry, whose type is 'job' on disk. */
export type MigrationRecord = Extract<JournalEntry, { type: 'job' }>;

/**
 * What steps have learned and later ones (or the report) need. The journal keeps it with each step's end, so it
 * survives the daemon.
 */
export interface Findings {
  nativeUri: string | null;
  deviceStateBytes: number;
  /** Wall clock of the stop: the only one that two daemon lives share. */
  stoppedAt: string | null;
  /** QEMU's own wall clocks at stop and resume. */
  stoppedAtUs: number | null;
  resumedAtUs: number | null;
  blackoutMs: number | null;
  pageBytes: number;
  rounds: number;
  pushBytes: number;
  targetCounters: Readonly<Record<string, number>>;
  sourceCounters: Readonly<Record<string, number>>;
}

export function noFindings(): Findings {
  return {
    nativeUri: null,
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
  };
}

/** A migration's walk. */
export interface StepContext extends WalkContext<WalkStep<StepName>> {
  readonly record: MigrationRecord;
  readonly ports: EnginePorts;
  readonly findings: Findings;
  /** Present keys of the source; secrets, so the journal does not hold them. */
  endpoint: SourceEndpointInfo | null;
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

export interface EngineRequest {
  readonly job: string;
  readonly session: string;
  readonly token: string;
  readonly request: MigrationRequest;
}
