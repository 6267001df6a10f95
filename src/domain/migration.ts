/**
 * The terms of migration as types. Imports only its neighbours in domain/; every layer may import it. Names of amounts
 * end with their unit. Numbers of bytes stay below 2^53, because the spec refuses a VM of more than 16 TiB.
 */
import type { DataSecurity } from './data-security.js';
import type { GuestEnd } from './guest-end.js';
import type { PhaseTime } from './progress.js';
import type { SharedStorage } from './storage.js';
import type { Transport, TransportChoice } from './transport.js';
import type { MemoryVerification } from './verification.js';

export const MIGRATION_MODES = ['postcopy', 'hybrid', 'precopy', 'native-precopy', 'native-postcopy'] as const;
export type MigrationMode = (typeof MIGRATION_MODES)[number];

export interface ModeTraits {
  /** What moves guest memory: vmigrate's pager, or the back end itself (QEMU's own migration). */
  readonly mover: 'pager' | 'backend';
  /** Memory crosses in rounds before the switchover. */
  readonly pushes: boolean;
  /** Pages are missing on the target when the VM resumes there; they are fetched after that. */
  readonly fetches: boolean;
}

/** The properties of each mode. Code asks for a property, never for a mode by name. */
export const MODE_TRAITS: Readonly<Record<MigrationMode, ModeTraits>> = {
  postcopy: { mover: 'pager', pushes: false, fetches: true },
  hybrid: { mover: 'pager', pushes: true, fetches: true },
  precopy: { mover: 'pager', pushes: true, fetches: false },
  'native-precopy': { mover: 'backend', pushes: true, fetches: false },
  'native-postcopy': { mover: 'backend', pushes: true, fetches: true },
};

/** The source notes which pages the VM writes, because the target fetches them while the VM still runs there. */
export function tracksWrites(mode: MigrationMode): boolean {
  const { mover, pushes } = MODE_TRAITS[mode];
  return mover === 'pager' && pushes;
}

/** The pager brings every page before the VM resumes on the target, while it stands still if need be. */
export function bringsAllFirst(mode: MigrationMode): boolean {
  return tracksWrites(mode) && !MODE_TRAITS[mode].fetches;
}

export interface MigrationRequest {
  readonly vm: string;
  readonly target: string;
  readonly mode: MigrationMode;
  readonly transport: Transport;
  readonly bandwidthBytesPerS: number;
  /** How long the VM may stand still, in modes in which no page is missing when it resumes. Others ignore it. */
  readonly downtimeMsMax: number;
  /** Absent in records of build 0.1.0, which compared nothing. A new request without it is to prove. */
  readonly sharedStorage?: SharedStorage;
  /**
   * How the pages are protected on their way. Of an order: the least. Of a plan: what both hosts demand, too. Absent:
   * nothing is said, as for a transport whose bytes this project does not send.
   */
  readonly dataSecurity?: DataSecurity;
  /** Prove in the end that the memory of the target was that of the source. Absent: do not. */
  readonly verifyMemory?: boolean;
}

/** A user's order. The planner turns it into a request: `auto` becomes rdma if both hosts have it, else tcp. */
export type MigrationOrder = Omit<MigrationRequest, 'transport'> & { readonly transport: TransportChoice };

/**
 * The steps of migrations. The engine has exactly one executor (and one undo) for each name; a new name without an
 * executor does not compile.
 */
export const MIGRATION_STEPS = [
  'reserve',
  'prepareTarget',
  'exposeSource',
  'connectTarget',
  'push',
  'stopSource',
  'pushLast',
  'transferState',
  'commit',
  'resumeTarget',
  'drain',
  'verifyMemory',
  'releaseSource',
  'nativeStart',
  'nativeSwitchover',
] as const;
export type StepName = (typeof MIGRATION_STEPS)[number];

export interface PlanStep {
  readonly name: StepName;
  /** The host on which the step acts. */
  readonly host: string;
  /** One line for --dry-run. */
  readonly text: string;
  /** The VM is stopped during this step, or stops in it, so the step counts towards the blackout. */
  readonly isInBlackout: boolean;
  readonly timeoutMs: number;
}

export interface MigrationPlan {
  readonly request: MigrationRequest;
  /** Why this transport was chosen, for a person. */
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
  /** Whether the hosts have proven that they share the VM's disks. Absent in reports of build 0.1.0. */
  readonly sharedStorage?: SharedStorage;
  /** As in the plan's request. */
  readonly dataSecurity?: DataSecurity;
  /** Set if the request has asked for it. */
  readonly verified?: MemoryVerification;
  /**
   * Time in which no vCPU ran: from just before the stop was sent to QEMU until the target acknowledged the resume, by
   * the coordinator's clock.
   */
  readonly blackoutMs: number;
  /**
   * Time from QEMU's STOP event to QEMU's RESUME event by the hosts' wall clocks. It is exact if the clocks agree (one
   * machine, or PTP).
   */
  readonly blackoutByEventsMs: number;
  /** Time from resume until the last 10 ms window in which vCPUs waited for pages more than a tenth of the time. */
  readonly degradedMs: number;
  readonly totalMs: number;
  /** How often the source has said which pages were written since: before the stop, and once after it. */
  readonly rounds: number;
  readonly bytes: {
    readonly push: number;
    readonly demand: number;
    readonly prefetch: number;
    /** Bytes of pages known to be zero, which are never fetched. */
    readonly zeroSkipped: number;
    readonly deviceState: number;
  };
  readonly faults: { readonly count: number; readonly p50Us: number; readonly p99Us: number; readonly maxUs: number };
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
  readonly reconnects: number;
  /** Set if the guest ended by itself on the target while its pages still came. The other pages were given up then. */
  readonly guestEnd?: GuestEnd | null;
  readonly phases: readonly PhaseTime[];
}
