/** Views of jobs of both kinds. Imports only its neighbours in domain/; every layer may import it. */
import type { ForkReport, ForkStepName } from './fork.js';
import type { MigrationReport, StepName } from './migration.js';
import type { MigrationProgress } from './progress.js';

/**
 * running: under way · recovering: committed, something is unreachable and is retried · done · failed: the VM runs on
 * the source · needsRecovery: committed, and nothing has advanced for long; it is retried all the same, less often, and
 * goes on by itself when the cause is gone · lost: committed, and the VM's memory is lost
 */
export const JOB_STATES = [
  'queued',
  'running',
  'recovering',
  'done',
  'failed',
  'cancelled',
  'needsRecovery',
  'lost',
] as const;
export type JobState = (typeof JOB_STATES)[number];

/** States of jobs that cannot continue. A job that needs recovery is retried, but a command waits no longer for it. */
const FINAL: ReadonlySet<JobState> = new Set(['done', 'failed', 'cancelled', 'lost']);

export function isFinal(state: JobState): boolean {
  return FINAL.has(state);
}

/** True if nobody should wait for the job any longer: it has ended, or needs recovery. */
export function isEnded(state: JobState): boolean {
  return isFinal(state) || state === 'needsRecovery';
}

interface AnyJobView {
  readonly id: string;
  /**
   * The VM that the job holds. For a fork of an existing image: the VM of which the image was taken, which the job does
   * not hold.
   */
  readonly vm: string;
  /** The host on which the VM runs when the job begins. */
  readonly source: string;
  readonly state: JobState;
  readonly isCommitted: boolean;
  /** Progress of the pages that are moved, or copied into the image. */
  readonly progress: MigrationProgress | null;
  readonly error: unknown;
  readonly createdAt: string;
  readonly updatedAt: string;
  /** The host that coordinates the job. Absent: this host does. */
  readonly coordinator?: string;
}

export interface MigrationJobView extends AnyJobView {
  readonly kind: 'migrate';
  readonly target: string;
  readonly step: StepName | null;
  readonly report: MigrationReport | null;
}

export interface ForkJobView extends AnyJobView {
  readonly kind: 'fork';
  /** The image's id; null until the clones are prepared. */
  readonly image: string | null;
  readonly cloneCount: number;
  /** The fork of the same VM that must end before this one begins. Until then `progress` is that fork's. */
  readonly waitsFor: string | null;
  /** Names of the clones that run. After the commit they are VMs of their own. */
  readonly clones: readonly string[];
  readonly step: ForkStepName | null;
  readonly report: ForkReport | null;
}

export type JobView = MigrationJobView | ForkJobView;
