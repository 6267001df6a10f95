/** What VmManager is told: once, and for each VM. */
import type { VmBackend } from '../../backends/backend.js';
import type { NicSpec } from '../../domain/vm.js';
import type { Registry } from '../../engine/ports/registry.js';
import type { Log } from '../../kit/log.js';
import type { NativeBinding } from '../../native/types.js';

export interface VmManagerOptions {
  readonly host: string;
  readonly stateDir: string;
  /** On tmpfs; made if missing. */
  readonly ramDir: string;
  /** What `auto` in a spec means on this host. */
  readonly accel: 'auto' | 'kvm' | 'tcg';
  readonly preloadPath: string | null;
  /** null: only VMs without preload. */
  readonly native: NativeBinding | null;
  readonly registry: Registry;
  readonly log: Log;
  /** What runs the VMs of this host, all of them. */
  readonly backend: VmBackend;
}

export interface IncomingOptions {
  readonly session: string;
  readonly accel: 'kvm' | 'tcg';
  /** The epoch at which the VM will belong here. */
  readonly epoch: number;
  /** QEMU's own migration moves the memory: no preload, whose registrations would be in QEMU's way. */
  readonly isNative?: boolean;
  /** Aborted to give up a start that is under way. */
  readonly signal?: AbortSignal;
}

export interface CloneOptions {
  readonly image: string;
  readonly accel: 'kvm' | 'tcg';
  /** The image is not complete: pages raise faults until it is. */
  readonly isRegistered: boolean;
  /** Device state of the image; its process has it open. */
  readonly statePath: string;
  /** The NICs that it shall have once it runs (settle-in.ts), if they are not those that it starts with. */
  readonly nics?: readonly NicSpec[];
  /** Aborted to give the start up. */
  readonly signal: AbortSignal;
  /** Its directory is there, its QEMU is not. */
  readonly beforeLaunch: () => Promise<void>;
}
