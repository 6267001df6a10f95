/**
 * This host's part in RDMA: which of its addresses belongs to a device, the listener there, and the facts for a peer.
 * Nothing is loaded or opened before the first call, so it costs a host without RDMA nothing. Each call looks at the
 * devices again, because ports go down and devices are removed.
 */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { TargetChecks } from '../../domain/host.js';
import type { RdmaDevice, RdmaInventory, RdmaPlace } from '../../domain/transport.js';
import type { Log } from '../../kit/log.js';
import type { DataListenerHandle, NativeBinding, ProviderOptions } from '../../native/types.js';
import type { DeviceTransport } from '../host/host-transports.js';
import { TRANSPORT_TABLE } from '../table.js';
import { cgroupFreeBytes, lockableBytes } from './memory-limits.js';

/** A listening peer answers at once, or within three seconds if its hardware address must be resolved first. */
const PROBE_TIMEOUT_MS = 3_500;
const { provider: PROVIDER } = TRANSPORT_TABLE.rdma;
const NO_DEVICE_REMEDY = 'without RDMA moves go over TCP (--tcp); "rdma link" on that host shows the ports that it has';

export interface RdmaConfig {
  /** Null for the data address if it belongs to an RDMA port, else the first address that does. */
  readonly address: string | null;
  readonly port: number;
  readonly ackTimeoutExponent: number;
  readonly retryCount: number;
}

export interface RdmaHostOptions {
  readonly native: Pick<NativeBinding, 'devices' | 'probe' | 'openDataListener'>;
  readonly config: RdmaConfig;
  readonly dataAddress: string;
  readonly log: Log;
}

interface Found {
  readonly devices: readonly RdmaDevice[];
  readonly address: string | null;
  readonly problem: RdmaInventory['problem'];
}

export class RdmaHost implements DeviceTransport {
  readonly #options: RdmaHostOptions;
  #listener: DataListenerHandle | null = null;
  /** Listeners of ports that are no longer used, kept for the sessions that are still open on them. */
  #retired: DataListenerHandle[] = [];

  constructor(options: RdmaHostOptions) {
    this.#options = options;
  }

  /**
   * Returns this host's RDMA facts. It never throws: the answer contains any problem. It also listens, so that a peer
   * can check whether it can connect.
   */
  async inventory(): Promise<RdmaInventory> {
    const [found, lockable, cgroupFree] = await Promise.all([this.#find(), lockableBytes(), cgroupFreeBytes()]);
    const limits = { devices: found.devices, lockableBytes: lockable, cgroupFreeBytes: cgroupFree };
    if (found.address === null) return { problem: found.problem, ...limits, address: null, port: null };
    try {
      const place = this.#listen(found.address).address(PROVIDER);
      return { problem: null, ...limits, address: found.address, port: place?.port ?? null };
    } catch (thrown) {
      const { message, remedy } = toMigrationError(thrown);
      return {
        problem: { reason: message, remedy: remedy ?? NO_DEVICE_REMEDY },
        ...limits,
        address: null,
        port: null,
      };
    }
  }

  /** Returns the listener for a source session. Throws UNSUPPORTED if there is no RDMA now. */
  async listener(): Promise<DataListenerHandle> {
    return this.#listen(await this.#address());
  }

  /** Returns the options for connecting a target session. Throws UNSUPPORTED if there is no RDMA now. */
  async connection(): Promise<ProviderOptions> {
    return { localAddress: await this.#address(), ...this.#timeouts() };
  }

  async probe({ host, port }: RdmaPlace): Promise<NonNullable<TargetChecks['rdma']>> {
    try {
      const options = await this.connection();
      await this.#options.native.probe({ provider: PROVIDER, host, port, options }, PROBE_TIMEOUT_MS);
      return { isReached: true };
    } catch (error) {
      return { isReached: false, reason: toMigrationError(error).message };
    }
  }

  /** Closes all listeners. No source session may be open. */
  close(): void {
    for (const listener of [this.#listener, ...this.#retired]) listener?.close();
    this.#listener = null;
    this.#retired = [];
  }

  async #find(): Promise<Found> {
    const { native, config, dataAddress } = this.#options;
    let devices: readonly RdmaDevice[];
    try {
      devices = await native.devices(PROVIDER);
    } catch (thrown) {
      const { message } = toMigrationError(thrown);
      return { devices: [], address: null, problem: { reason: message, remedy: NO_DEVICE_REMEDY } };
    }
    const addresses = devices.flatMap(({ ports }) => ports.flatMap((port) => (port.isActive ? port.addresses : [])));
    const none = (reason: string, remedy: string): Found => ({ devices, address: null, problem: { reason, remedy } });
    if (devices.length === 0) return none('it has no RDMA device', NO_DEVICE_REMEDY);
    if (config.address !== null && !addresses.includes(config.address)) {
      return none(
        `its RDMA address ${config.address} belongs to no active RDMA port`,
        'check the cable and the address (rdma.address in the configuration of vmigrated, or --data rdma://ADDRESS)',
      );
    }
    const preferred = addresses.find((address) => address === dataAddress) ?? addresses[0];
    const address = config.address ?? preferred ?? null;
    if (address !== null) return { devices, address, problem: null };
    return none('no address of it belongs to an active RDMA port', 'check the cable, and give the port an address');
  }

  async #address(): Promise<string> {
    const { address, problem } = await this.#find();
    if (address !== null) return address;
    throw new MigrationError('UNSUPPORTED', `no RDMA on this host: ${problem?.reason ?? 'no address'}`, {
      remedy: problem?.remedy ?? NO_DEVICE_REMEDY,
    });
  }

  #listen(address: string): DataListenerHandle {
    const { native, config, log } = this.#options;
    const open = (port: number): DataListenerHandle =>
      native.openDataListener({ listen: [{ provider: PROVIDER, host: address, port, options: this.#timeouts() }] });
    if (this.#listener !== null && (this.#listener.isLost || this.#listener.address(PROVIDER)?.host !== address)) {
      log.warn({ address, isLost: this.#listener.isLost }, 'the RDMA port has changed; opening a new listener');
      this.#retired.push(this.#listener);
      this.#listener = null;
    }
    this.#retired = this.#retired.filter((listener) => !isClosed(listener));
    // A retired listener may still hold the port. Peers learn the actual port of the new one.
    this.#listener ??= open(this.#retired.length === 0 ? config.port : 0);
    return this.#listener;
  }

  #timeouts(): ProviderOptions {
    const { ackTimeoutExponent, retryCount } = this.#options.config;
    return { ackTimeoutExponent, retryCount };
  }
}

/** Closes the listener. Returns false if sessions are open on it. */
function isClosed(listener: DataListenerHandle): boolean {
  try {
    listener.close();
    return true;
  } catch {
    return false;
  }
}
