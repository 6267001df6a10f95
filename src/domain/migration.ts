/**
 * The words of the project as types. Imports nothing; every layer may import it. Amounts carry their unit in the name;
 * bytes that may exceed 2^53 do not occur (a VM of 8 PiB is refused by the spec).
 */
import type { PhaseTime } from './progress.js';
import type { Transport, TransportChoice } from './transport.js';

export const MIGRATION_MODES = ['postcopy', 'native-precopy', 'native-postcopy'] as const;
export type MigrationMode = (typeof MIGRATION_MODES)[number];

export interface ModeTraits {
  /** Who moves guest memory: our pager, or the back end by itself (QEMU's own migration). */
  readonly mover: 'pager' | 'backend';
  /** Memory crosses in rounds before the switchover. */
  readonly pushes: boolean;
  /** Pages are missing on the target when the VM resumes there; they are fetched after that. */
  readonly fetches: boolean;
}

/** What is asked of a mode is asked here, never by its name. */
export const MODE_TRAITS: Readonly<Record<MigrationMode, ModeTraits>> = {
  postcopy: { mover: 'pager', pushes: false, fetches: true },
  'native-precopy': { mover: 'backend', pushes: true, fetches: false },
  'native-postcopy': { mover: 'backend', pushes: true, fetches: true },
};

export interface MigrationRequest {
  readonly vm: string;
  readonly target: string;
  readonly mode: MigrationMode;
  readonly transport: Transport;
  readonly bandwidthBytesPerS: number;
  readonly downtimeMsMax: number;
}

/** What a user asks for. The planner makes a request of it: `auto` is rdma where both hosts have it, else tcp. */
export type MigrationOrder = Omit<MigrationRequest, 'transport'> & { readonly transport: TransportChoice };

/**
 * One step of a migration. The engine has exactly one executor (and one undo) for each name; a new name without one
 * does not compile.
 */
export const MIGRATION_STEPS = [
  'reserve',
  'prepareTarget',
  'exposeSource',
  'connectTarget',
  'stopSource',
  'transferState',
  'commit',
  'resumeTarget',
  'drain',
  'releaseSource',
  'nativeStart',
  'nativeSwitchover',
] as const;
export type StepName = (typeof MIGRATION_STEPS)[number];

export interface PlanStep {
  readonly name: StepName;
  /** Where it acts. */
  readonly host: string;
  /** One line for --dry-run. */
  readonly text: string;
  /** Source stops in it or has stopped before it: it counts to the blackout. */
  readonly isInBlackout: boolean;
  readonly timeoutMs: number;
}

export interface MigrationPlan {
  readonly request: MigrationRequest;
  /** Why it is this transport, for a person. */
  readonly transportReason: string;
  readonly source: string;
  readonly memoryBytes: number;
  readonly steps: readonly PlanStep[];
  readonly notes: readonly string[];
}

export interface MigrationReport {
  readonly job: string;
  readonly vm: string;
  readonly mode: MigrationMode;
  readonly transport: Transport;
  readonly transportReason: string;
  readonly source: string;
  readonly target: string;
  readonly memoryBytes: number;
  /**
   * No vCPU ran: from just before the stop was sent to QEMU until the target's resume was acknowledged, by the
   * coordinator's clock.
   */
  readonly blackoutMs: number;
  /**
   * From QEMU's STOP event to QEMU's RESUME event, by the hosts' wall clocks: exact where these agree (one machine,
   * PTP).
   */
  readonly blackoutByEventsMs: number;
  /** From resume until the last 10 ms window in which vCPUs waited for pages more than a tenth of the time. */
  readonly degradedMs: number;
  readonly totalMs: number;
  readonly rounds: number;
  readonly bytes: {
    readonly push: number;
    readonly demand: number;
    readonly prefetch: number;
    /** Bytes of pages known to be zero, never fetched. */
    readonly zeroSkipped: number;
    readonly deviceState: number;
  };
  readonly faults: { readonly count: number; readonly p50Us: number; readonly p99Us: number; readonly maxUs: number };
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
  readonly reconnects: number;
  readonly phases: readonly PhaseTime[];
}
