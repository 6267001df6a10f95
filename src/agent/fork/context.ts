/** The dependencies that all modules of forking share. */

import type { VmIdentity } from '../../domain/host.js';
import type { ImageContext } from '../image/context.js';
import type { DiskReader } from './bases/disk-reader.js';
import type { DiskServer } from './bases/disk-server.js';
import type { ImageServers } from './pages/image-servers.js';
import type { ForkStore } from './record.js';

/** The names of VMs on all hosts. */
export interface NamesOfAllHosts {
  /** Returns those of the names that VMs of other hosts have, as far as they answer. */
  namesElsewhere(vms: readonly VmIdentity[]): Promise<readonly string[]>;
  /**
   * Runs `start`, with the epochs above which the VMs must begin. Throws CONFLICT, and does not run it, if another host
   * has one of the names.
   */
  guardClones<T>(vms: readonly VmIdentity[], start: (epochs: ReadonlyMap<string, number>) => Promise<T>): Promise<T>;
}

export interface ForkContext extends ImageContext {
  readonly forkStore: ForkStore;
  readonly names: NamesOfAllHosts;
  readonly servers: ImageServers;
  readonly diskServer: Pick<DiskServer, 'open' | 'fix' | 'whileUnserved'>;
  readonly diskReader: Pick<DiskReader, 'open'>;
  /** Aborts when the daemon ends. */
  readonly closing: AbortSignal;
}
