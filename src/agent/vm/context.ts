/** What the parts of one host's agent share. */
import type { Clock, FaultPort, Registry } from '../../engine/ports/migration.js';
import type { Log } from '../../kit/log.js';
import type { DataListenerHandle, NativeBinding } from '../../native/binding.js';
import type { RdmaHost } from '../../transports/rdma.js';
import type { SessionStore } from '../migration/session-store.js';
import type { Peers } from './peers.js';
import type { VmManager } from './vms.js';

/** Debug lines hold what each part of a blackout took. */
export interface AgentLog extends Log {
  debug(fields: object, message: string): void;
}

export interface AgentContext {
  /** This host's name. */
  readonly host: string;
  readonly vms: VmManager;
  readonly native: NativeBinding;
  /** tcp and shm. */
  readonly listener: DataListenerHandle;
  readonly rdma: Pick<RdmaHost, 'inventory' | 'listener' | 'connection' | 'registering' | 'probe'>;
  readonly registry: Registry;
  readonly peers: Peers;
  /** IP address that other hosts reach our data ports at. */
  readonly dataAddress: string;
  readonly store: SessionStore;
  readonly clock: Clock;
  readonly log: AgentLog;
  readonly faults: FaultPort;
}
