import type { DataSecurity } from '../../domain/data-security.js';
import type { MigrationError } from '../../domain/errors.js';
import type { HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import type { StorageFacts } from '../compared-files.js';

export type { StorageFacts } from '../compared-files.js';

/** The facts that decide whether a transport can carry a VM's memory from one host to the other. */
export interface TransportFacts {
  readonly source: HostInventory;
  readonly target: HostInventory;
  readonly checks: TargetChecks;
  readonly vm: VmInventory;
  /** What the user asks for at least. Absent: nothing. */
  readonly dataSecurity?: DataSecurity | undefined;
  /**
   * Whether the target sees the directory of the source's data socket. Only asked where a transport needs it; absent
   * also if a host's build is older.
   */
  readonly isSocketSeen?: boolean;
}

export type TargetFacts =
  | {
      readonly kind: 'reachable';
      readonly inventory: HostInventory;
      readonly checks: TargetChecks;
      readonly storage: StorageFacts;
      /** As in TransportFacts. */
      readonly isSocketSeen?: boolean;
    }
  | { readonly kind: 'unreachable'; readonly error: MigrationError }
  /** The request names the source itself as the target. */
  | { readonly kind: 'isSource' };

export interface PreflightFacts {
  /** The job that holds the VM can still be cancelled. Absent: it cannot. */
  readonly isJobCancellable?: boolean;
  readonly sourceHost: HostInventory;
  readonly target: TargetFacts;
  readonly vm: VmInventory;
}
