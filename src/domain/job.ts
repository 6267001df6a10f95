/** Jobs as they are shown, of both kinds. Imports nothing but its neighbours; every layer may import it. */
import type { ForkReport, ForkStepName } from './fork.js';
import type { MigrationReport, StepName } from './migration.js';
import type { MigrationProgress } from './progress.js';

/**
 * running: going on · recovering: committed, something is unreachable, being retried · done · failed: the VM runs where
 * it was · needsRecovery: committed, retries have ended, `vmigrate --recover JOB` goes on · lost: committed, and the
 * VM's memory is gone
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

/** The job can never go on again; a job that needs recovery has ended too, and can. */
const FINAL: ReadonlySet<JobState> = new Set(['done', 'failed', 'cancelled', 'lost']);

export function isFinal(state: JobState): boolean {
  return FINAL.has(state);
}

/** Nobody works on the job now. */
export function isEnded(state: JobState): boolean {
  return isFinal(state) || state === 'needsRecovery';
}

interface AnyJobView {
  readonly id: string;
  /**
   * The VM that the job holds; of a fork without a parent the one that its image was taken of, which it does not hold.
   */
  readonly vm: string;
  /** The host that the VM is on when the job begins. */
  readonly source: string;
  readonly state: JobState;
  readonly isCommitted: boolean;
  /** Of the pages that move, or that are copied into the image. */
  readonly progress: MigrationProgress | null;
  readonly error: unknown;
  readonly createdAt: string;
  readonly updatedAt: string;
}

export interface MigrationJobView extends AnyJobView {
  readonly kind: 'migrate';
  readonly target: string;
  readonly step: StepName | null;
  readonly report: MigrationReport | null;
}

export interface ForkJobView extends AnyJobView {
  readonly kind: 'fork';
  /** null until the clones are prepared. */
  readonly image: string | null;
  readonly cloneCount: number;
  /** The fork of the same VM that must have ended before this one begins; `progress` is that one's meanwhile. */
  readonly waitsFor: string | null;
  /** Names of those that run; from the commit on they are VMs of their own. */
  readonly clones: readonly string[];
  readonly step: ForkStepName | null;
  readonly report: ForkReport | null;
}

export type JobView = MigrationJobView | ForkJobView;
