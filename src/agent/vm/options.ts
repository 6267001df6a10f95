/** The options of VmManager, and those of each start of a VM. */

import type { VmBackend } from '../../backends/backend.js';
import type { Accel, AccelChoice, NicSpec } from '../../domain/vm.js';
import type { Registry } from '../../engine/ports/registry.js';
import type { Log } from '../../kit/log.js';
import type { NativeBinding } from '../../native/types.js';
import type { QemuUsers } from '../contain/processes.js';
import type { MemoryLimits } from './memory-room.js';

export interface VmManagerOptions {
  readonly host: string;
  readonly stateDir: string;
  /** A directory on tmpfs. It is made if it is missing. */
  readonly ramDir: string;
  /** The id of the mark that ties the memory to the state directory. Absent: huge pages are not tied. */
  readonly memoryId?: string;
  /** The meaning of `auto` in a spec on this host. */
  readonly accel: AccelChoice;
  readonly preloadPath: string | null;
  /** Null: only VMs without preload can run. */
  readonly native: NativeBinding | null;
  readonly registry: Registry;
  readonly log: Log;
  /** The back end that runs all VMs of this host. */
  readonly backend: VmBackend;
  /** The users that QEMU runs as. Null or absent: the daemon's own. */
  readonly qemuUsers?: QemuUsers | null;
  /** What is missing has the defaults of memory-room.ts. */
  readonly memory?: Partial<MemoryLimits>;
}

export interface IncomingOptions {
  readonly session: string;
  readonly accel: Accel;
  /** The epoch at which the VM will belong here. */
  readonly epoch: number;
  /** True if QEMU's own migration moves the memory. The VM then has no preload, whose registrations would conflict. */
  readonly isNative?: boolean;
  /** The caller aborts it to cancel the start. */
  readonly signal?: AbortSignal;
}

export interface CloneOptions {
  readonly image: string;
  /** The clone must begin above this epoch. */
  readonly epochMin: number;
  readonly accel: Accel;
  /** True if the image is not complete. Missing pages then raise faults. */
  readonly isRegistered: boolean;
  /** The file for the image's device state. The clone's process has it open. */
  readonly statePath: string;
  /** The socket of each disk that another host serves, by the disk's id. Absent: there are none. */
  readonly diskSockets?: Readonly<Record<string, string>>;
  /** The NICs of the running clone (settle-in.ts), if they differ from those it starts with. */
  readonly nics?: readonly NicSpec[];
  /** The caller aborts it to cancel the start. */
  readonly signal: AbortSignal;
  /** True: an ended VM of the clone's name is removed, with its exit code and logs. False: the start is refused. */
  readonly isReplacing: boolean;
  /** Called when the clone's directory exists, before its QEMU starts. */
  readonly beforeLaunch: () => Promise<void>;
}
