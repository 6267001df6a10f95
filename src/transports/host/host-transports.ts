/**
 * The transports of this host: which listener serves each, its address for peers, the options that a connecting session
 * passes on, and the limit of calls that register memory at a time. The row of a transport in ../table.ts describes it.
 * A transport with devices also has a part of its own (../rdma/host.ts).
 */
import {
  DATA_POLICY_DEFAULT,
  DATA_SECURITY_DEFAULT,
  type DataPolicy,
  type DataSecurity,
  strongest,
} from '../../domain/data-security.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { TransportTable } from '../../domain/transport.js';
import type { DataListenerHandle, Place, ProviderOptions, ProviderPlace, SourceAddress } from '../../native/types.js';
import { TRANSPORT_TABLE, type TransportRow } from '../table.js';

/**
 * Registering memory occupies a thread of Node's pool until it has finished. The pool has four threads, and a commit
 * needs one of them to write a file.
 */
const REGISTERING_MAX = 2;

/** The part of a transport with devices. */
export interface DeviceTransport {
  /** Returns the listener for a source session. Throws UNSUPPORTED if there is no device now. */
  listener(): Promise<DataListenerHandle>;
  /** Returns the options that a target session passes on. Throws UNSUPPORTED if there is no device now. */
  connection(): Promise<ProviderOptions>;
}

/**
 * Returns the places at which the transports without devices listen. The first of a kind gets the configured socket or
 * port. A further one gets a socket with its name as suffix, or a port that the kernel chooses.
 */
export function sharedPlaces(
  data: { readonly address: string; readonly port: number },
  socketPath: string,
  table: TransportTable = TRANSPORT_TABLE,
): ProviderPlace[] {
  const taken = { isSocket: false, isPort: false };
  const placeOf = (transport: string, { provider, sameMachineOnly }: TransportRow): ProviderPlace => {
    if (sameMachineOnly) {
      const host = taken.isSocket ? `${socketPath}.${transport}` : socketPath;
      taken.isSocket = true;
      return { provider, host, port: 0 };
    }
    const port = taken.isPort ? 0 : data.port;
    taken.isPort = true;
    return { provider, host: data.address, port };
  };
  return Object.entries(table)
    .filter(([, row]) => !row.registersMemory)
    .map(([transport, row]) => placeOf(transport, row));
}

/** The place of a source, as its host has said it. */
export interface SourcePlace extends Place {
  readonly transport: string;
  readonly keys: SourceAddress['keys'];
  readonly dataSecurity?: DataSecurity;
}

export interface HostTransportsOptions {
  /** This host's name. */
  readonly host: string;
  /** The listener of the transports without devices. */
  readonly listener: DataListenerHandle;
  readonly devices: Readonly<Record<string, DeviceTransport>>;
  readonly table?: TransportTable;
  /** Absent: integrity, and no older peers. */
  readonly policy?: DataPolicy;
}

/** What a source session says of its connections. */
export interface Served {
  readonly provider: string;
  readonly listener: DataListenerHandle;
  readonly dataSecurity: DataSecurity;
  readonly isOldHello: boolean;
}

export class HostTransports {
  readonly #options: HostTransportsOptions;
  readonly #table: TransportTable;
  #registeringCount = 0;
  readonly #waiting: (() => void)[] = [];
  readonly #policy: DataPolicy;

  constructor(options: HostTransportsOptions) {
    this.#options = options;
    this.#table = options.table ?? TRANSPORT_TABLE;
    this.#policy = options.policy ?? DATA_POLICY_DEFAULT;
  }

  /** Returns what a source session needs. Throws UNSUPPORTED if this host does not serve the transport now. */
  async served(transport: string): Promise<Served> {
    const { provider } = this.#row(transport);
    const listener = (await this.#options.devices[transport]?.listener()) ?? this.#options.listener;
    if (listener.address(provider) === null)
      throw new MigrationError('UNSUPPORTED', `${this.#options.host} does not serve ${transport}`);
    const { dataSecurity, acceptOldHello } = this.#policy;
    return { provider, listener, dataSecurity, isOldHello: acceptOldHello };
  }

  /**
   * Returns the address, for peers, of a listener that `served` has returned, and the least that it accepts. A host
   * that takes older peers does not say that: they would not understand it.
   */
  place(transport: string, listener: DataListenerHandle): Place & { readonly dataSecurity?: DataSecurity } {
    const place = listener.address(this.#row(transport).provider);
    if (place === null) throw new MigrationError('UNSUPPORTED', `the listener does not serve ${transport}`);
    const { dataSecurity, acceptOldHello } = this.#policy;
    return acceptOldHello ? place : { ...place, dataSecurity };
  }

  /**
   * Connects to a source by `connect`, with the stronger of both hosts' demands. The older hello is tried only where
   * this host was told to, with a source that has said nothing and has refused the newer one.
   */
  async connecting(
    endpoint: SourcePlace,
    credentials: Pick<SourceAddress, 'session' | 'token'>,
    connect: (source: SourceAddress, timeoutMs: number) => Promise<void>,
  ): Promise<void> {
    const { transport, host, port, keys, dataSecurity } = endpoint;
    const { provider, options, timeoutMs } = await this.connection(transport, host);
    const { session, token } = credentials;
    const source: SourceAddress = {
      ...{ provider, host, port, options, keys, session, token },
      dataSecurity: strongest(this.#policy.dataSecurity, dataSecurity ?? DATA_SECURITY_DEFAULT),
    };
    const attempt = (to: SourceAddress) => this.registering(transport, () => connect(to, timeoutMs));
    try {
      await attempt(source);
    } catch (error) {
      const mayBeOlder = dataSecurity === undefined && this.#policy.acceptOldHello;
      if (!mayBeOlder || toMigrationError(error).code !== 'UNAUTHENTICATED') throw error;
      await attempt({ ...source, isOldHello: true });
    }
  }

  /**
   * Returns what a target session needs besides the place. `peerHost` is the host of that place, as the peer has said
   * it. Throws UNSUPPORTED if this host cannot connect now, and PEER_PROTOCOL if the transport cannot have such a host.
   */
  async connection(
    transport: string,
    peerHost: string,
  ): Promise<{ provider: string; options: ProviderOptions; timeoutMs: number }> {
    const { provider, connectTimeoutMs, sameMachineOnly } = this.#row(transport);
    if (sameMachineOnly !== peerHost.startsWith('/')) {
      const wanted = sameMachineOnly ? 'the path of a socket' : 'an IP address';
      throw new MigrationError('PEER_PROTOCOL', `${transport} needs ${wanted}, and the source has sent "${peerHost}"`);
    }
    const options = (await this.#options.devices[transport]?.connection()) ?? {};
    return { provider, options, timeoutMs: connectTimeoutMs };
  }

  /** Makes a call that opens or connects a session. If the call registers memory, it waits for its turn. */
  async registering<T>(transport: string, call: () => Promise<T>): Promise<T> {
    if (!this.#row(transport).registersMemory) return call();
    while (this.#registeringCount >= REGISTERING_MAX) {
      await new Promise<void>((resolve) => this.#waiting.push(resolve));
    }
    this.#registeringCount++;
    try {
      return await call();
    } finally {
      this.#registeringCount--;
      this.#waiting.shift()?.();
    }
  }

  #row(transport: string): TransportRow {
    const row = this.#table[transport];
    if (row === undefined) throw new MigrationError('UNSUPPORTED', `there is no transport ${transport}`);
    return row;
  }
}
