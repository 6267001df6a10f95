/** The ports and limits of a daemon's jobs. */
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
  /** The number of jobs that run at the same time. Further jobs are queued. */
  readonly runningJobsMax: number;
  /** First and longest wait before another try to undo a leftover on a host that does not answer. */
  readonly leftoverMsFirst: number;
  readonly leftoverMsMax: number;
  /** First and longest wait before another attempt to go on with a job that needs recovery. */
  readonly stalledMsFirst: number;
  readonly stalledMsMax: number;
}

export const JOB_LIMITS: JobLimits = {
  ...ENGINE_LIMITS,
  runningJobsMax: 4,
  leftoverMsFirst: 500,
  leftoverMsMax: 30_000,
  stalledMsFirst: 1_000,
  stalledMsMax: 10_000,
};

export interface JobManagerOptions {
  /** The name of this host, which is the source of every job here. */
  readonly host: string;
  /** Returns the port of this host or of a peer. Throws for any other host. */
  readonly agent: (host: string) => HostPort;
  readonly registry: Registry;
  readonly journal: ReplayableJournal;
  readonly clock: Clock;
  readonly random: Random;
  readonly inject: InjectPort;
  readonly log: JobLog;
  readonly limits?: Partial<JobLimits>;
  /** As in FactSources. */
  readonly topologyPath?: string | null;
}
