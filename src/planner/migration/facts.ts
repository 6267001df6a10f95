import type { MigrationError } from '../../domain/errors.js';
import type { HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import type { FileView, StorageFile } from '../../domain/storage.js';

/** The facts that decide whether a transport can carry a VM's memory from one host to the other. */
export interface TransportFacts {
  readonly source: HostInventory;
  readonly target: HostInventory;
  readonly checks: TargetChecks;
  readonly vm: VmInventory;
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

/** One file of the VM, as source and target see it. */
export interface ComparedFile {
  readonly file: StorageFile;
  readonly source: FileView;
  readonly target: FileView;
}

export type StorageFacts =
  | { readonly kind: 'compared'; readonly files: readonly ComparedFile[] }
  /** Nobody has looked: the user says that the hosts share the storage, or the move is refused for another reason. */
  | { readonly kind: 'unasked' }
  /** The vmigrate of that host is of a build that cannot compare files. */
  | { readonly kind: 'unsupported' }
  | { readonly kind: 'failed'; readonly error: MigrationError };

export interface PreflightFacts {
  /** The job that holds the VM can still be cancelled. Absent: it cannot. */
  readonly isJobCancellable?: boolean;
  readonly sourceHost: HostInventory;
  readonly target: TargetFacts;
  readonly vm: VmInventory;
}
