/** What the jobs of a daemon are given: their ports and their limits. */
import type { Clock, Random } from '../engine/ports/clock.js';
import type { HostPort } from '../engine/ports/host.js';
import type { InjectPort } from '../engine/ports/inject.js';
import type { Registry } from '../engine/ports/registry.js';
import { ENGINE_LIMITS, type EngineLimits } from '../engine/walk-context.js';
import type { ReplayableJournal } from './journal.js';

export interface JobLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

export interface JobLimits extends EngineLimits {
  /** Jobs that move something at the same time; others are queued. */
  readonly runningJobsMax: number;
  /** Backoff of what is left over on a host that does not answer. */
  readonly leftoverMsFirst: number;
  readonly leftoverMsMax: number;
}

export const JOB_LIMITS: JobLimits = {
  ...ENGINE_LIMITS,
  runningJobsMax: 4,
  leftoverMsFirst: 500,
  leftoverMsMax: 30_000,
};

export interface JobManagerOptions {
  /** This host: the source of every job here. */
  readonly host: string;
  /** This host or a peer; throws for any other. */
  readonly agent: (host: string) => HostPort;
  readonly registry: Registry;
  readonly journal: ReplayableJournal;
  readonly clock: Clock;
  readonly random: Random;
  readonly inject: InjectPort;
  readonly log: JobLog;
  readonly limits?: Partial<JobLimits>;
}
