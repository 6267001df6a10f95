import type { ForkPlan, ForkReport, ForkStepName } from '../../domain/fork.js';
import type { JobState } from '../../domain/job.js';
import type { MigrationPlan, MigrationReport, StepName } from '../../domain/migration.js';
import type { Accel, VmSpec } from '../../domain/vm.js';

/** A step of a migration or of a fork: all lines of one job are of one kind, which its first line says. */
export type AnyStepName = StepName | ForkStepName;

/** Appended before the act it announces; durable when the promise resolves. Replay is in order. */
export type JournalEntry =
  /** A fork begins, as `job` is the beginning of a migration. */
  | {
      readonly type: 'fork';
      readonly job: string;
      readonly fork: string;
      readonly plan: ForkPlan;
      readonly createdAt: string;
    }
  | {
      readonly type: 'job';
      readonly job: string;
      readonly session: string;
      readonly token: string;
      readonly plan: MigrationPlan;
      readonly spec: VmSpec;
      readonly epoch: number;
      readonly accel: Accel;
      readonly createdAt: string;
    }
  | {
      readonly type: 'begin';
      readonly job: string;
      readonly step: AnyStepName;
      /**
       * Steps announced together with `step`, so that no fsync falls into the blackout but the commit's own, or between
       * two clones.
       */
      readonly group?: readonly AnyStepName[];
      readonly at?: string;
    }
  | {
      readonly type: 'end';
      readonly job: string;
      readonly step: AnyStepName;
      readonly ms: number;
      readonly result?: unknown;
    }
  | { readonly type: 'undo'; readonly job: string; readonly step: AnyStepName }
  /**
   * The undo of `step` could not be done (its host does not answer); it is tried again until `cleared`, whatever state
   * the job is in.
   */
  | { readonly type: 'leftover'; readonly job: string; readonly step: AnyStepName }
  | { readonly type: 'cleared'; readonly job: string; readonly step: AnyStepName }
  | {
      readonly type: 'state';
      readonly job: string;
      readonly state: JobState;
      readonly report?: MigrationReport | ForkReport;
      readonly error?: unknown;
      readonly at?: string;
    };

export interface Journal {
  append(entry: JournalEntry): Promise<void>;
}
