/**
 * The dependencies that all parts of one host's agent share. A folder that needs more extends this interface
 * (../migration/context.ts, ../image/context.ts).
 */
import type { HostPolicy } from '../../domain/policy.js';
import type { Clock } from '../../engine/ports/clock.js';
import type { InjectPort } from '../../engine/ports/inject.js';
import type { Registry } from '../../engine/ports/registry.js';
import type { Log } from '../../kit/log.js';
import type { NativeBinding } from '../../native/types.js';
import type { HostTransports } from '../../transports/host/host-transports.js';
import type { RdmaHost } from '../../transports/rdma/host.js';
import type { Peers } from './peers.js';
import type { VmManager } from './vms.js';

/** Debug lines record the duration of each part of a blackout. */
export interface AgentLog extends Log {
  debug(fields: object, message: string): void;
}

/** How this host uses groups. */
export interface MulticastConfig {
  /** Null: each fan-out has a group of its own. */
  readonly group: string | null;
  readonly port: number;
  /** How many routers a datagram may pass, the last hop included. */
  readonly ttl: number;
  /** 0: no limit. */
  readonly bandwidthBytesPerS: number;
}

export interface HostContext {
  /** This host's name. */
  readonly host: string;
  readonly vms: VmManager;
  readonly native: NativeBinding;
  readonly transports: Pick<HostTransports, 'served' | 'place' | 'connecting' | 'registering'>;
  readonly rdma: Pick<RdmaHost, 'inventory' | 'probe'>;
  readonly registry: Registry;
  readonly peers: Peers;
  /** IP address at which other hosts reach the data ports of this host. */
  readonly dataAddress: string;
  readonly multicast: MulticastConfig;
  /** What VMs may name that other hosts bring here. */
  readonly policy: HostPolicy;
  readonly clock: Clock;
  readonly log: AgentLog;
  readonly inject: InjectPort;
}
