import type { EarlierForkStepName, ForkPlan, ForkReport, ForkStepName } from '../../domain/fork.js';
import type { JobState } from '../../domain/job.js';
import type { MigrationPlan, MigrationReport, StepName } from '../../domain/migration.js';
import type { Accel, VmSpec } from '../../domain/vm.js';

/** A step of a migration or of a fork. All lines of one job are of the kind that its first line gives. */
export type AnyStepName = StepName | ForkStepName | EarlierForkStepName;

/**
 * An entry of the journal. It is appended before the action that it announces, and is durable when the promise
 * resolves. Replay keeps the order.
 */
export type JournalEntry =
  /** The first entry of a fork. `job` is the first entry of a migration. */
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
      /** The key of a move whose memory is verified. */
      readonly memoryKey?: string;
      readonly plan: MigrationPlan;
      readonly spec: VmSpec;
      readonly epoch: number;
      /** The id of the VM's start. Absent: the VM has none, or an earlier build has written the entry. */
      readonly incarnation?: string;
      readonly accel: Accel;
      readonly createdAt: string;
    }
  | {
      readonly type: 'begin';
      readonly job: string;
      readonly step: AnyStepName;
      /**
       * Steps that are announced together with `step`. So the commit's own fsync is the only one in the blackout, and
       * there is none between two clones.
       */
      readonly group?: readonly AnyStepName[];
      readonly at?: string;
      /** In an entry that is repeated while the step runs: findings that nobody can be asked for later. */
      readonly found?: unknown;
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
   * The undo of `step` failed because its host does not answer. The undo is retried until `cleared`, in every state of
   * the job.
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
