/**
 * One host's transports: which listener serves each, where a peer finds it, what a session that connects must pass on,
 * and how many calls may register memory at a time. What a transport is, its row says (../table.ts); one that works
 * with devices has a part of its own besides (../rdma/host.ts).
 */
import { MigrationError } from '../../domain/errors.js';
import type { TransportTable } from '../../domain/transport.js';
import type { DataListenerHandle, Place, ProviderOptions, ProviderPlace } from '../../native/types.js';
import { TRANSPORT_TABLE, type TransportRow } from '../table.js';

/**
 * Registering memory takes a thread of Node's pool for as long as it lasts. There are four, and a commit waits for one
 * that writes a file.
 */
const REGISTERING_MAX = 2;

/** What a transport with devices does by itself. */
export interface DeviceTransport {
  /** For a source session. UNSUPPORTED where there is no device now. */
  listener(): Promise<DataListenerHandle>;
  /** What a target session passes on. UNSUPPORTED where there is no device now. */
  connection(): Promise<ProviderOptions>;
}

/** Where the transports without devices listen. The first of a kind gets its place, a further one a place beside it. */
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

export interface HostTransportsOptions {
  /** This host's name. */
  readonly host: string;
  /** Of the transports without devices. */
  readonly listener: DataListenerHandle;
  readonly devices: Readonly<Record<string, DeviceTransport>>;
  readonly table?: TransportTable;
}

export class HostTransports {
  readonly #options: HostTransportsOptions;
  readonly #table: TransportTable;
  #registeringCount = 0;
  readonly #waiting: (() => void)[] = [];

  constructor(options: HostTransportsOptions) {
    this.#options = options;
    this.#table = options.table ?? TRANSPORT_TABLE;
  }

  /** What opens a source session. UNSUPPORTED where this host does not serve the transport now. */
  async served(transport: string): Promise<{ provider: string; listener: DataListenerHandle }> {
    const { provider } = this.#row(transport);
    const listener = (await this.#options.devices[transport]?.listener()) ?? this.#options.listener;
    if (listener.address(provider) !== null) return { provider, listener };
    throw new MigrationError('UNSUPPORTED', `${this.#options.host} does not serve ${transport}`);
  }

  /** What a peer is told of a listener that `served` has returned. */
  place(transport: string, listener: DataListenerHandle): Place {
    const place = listener.address(this.#row(transport).provider);
    if (place === null) throw new MigrationError('UNSUPPORTED', `the listener does not serve ${transport}`);
    return place;
  }

  /** What connects a target session, beside the place. UNSUPPORTED where this host cannot connect now. */
  async connection(transport: string): Promise<{ provider: string; options: ProviderOptions; timeoutMs: number }> {
    const { provider, connectTimeoutMs } = this.#row(transport);
    const options = (await this.#options.devices[transport]?.connection()) ?? {};
    return { provider, options, timeoutMs: connectTimeoutMs };
  }

  /** A call that opens or connects a session: where that registers memory, a few at a time. */
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
