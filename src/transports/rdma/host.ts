/**
 * This host's part in RDMA: which of its addresses leads to a device, the listener there, and what a peer must know.
 * Nothing is loaded or opened before somebody asks, so a host without RDMA is none the worse for it; and everything is
 * looked at anew each time, for ports go down and devices are removed.
 */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { TargetChecks } from '../../domain/host.js';
import type { RdmaDevice, RdmaInventory, RdmaPlace } from '../../domain/transport.js';
import type { Log } from '../../kit/log.js';
import type { DataListenerHandle, NativeBinding, ProviderOptions } from '../../native/types.js';
import type { DeviceTransport } from '../host/host-transports.js';
import { TRANSPORT_TABLE } from '../table.js';
import { cgroupFreeBytes, lockableBytes } from './memory-limits.js';

/** A peer that listens answers at once; one that must first ask for its hardware address, within three seconds. */
const PROBE_TIMEOUT_MS = 3_500;
const { provider: PROVIDER } = TRANSPORT_TABLE.rdma;
const NO_DEVICE_REMEDY = 'see "vmctl doctor" there, or use --tcp';

export interface RdmaConfig {
  /** null: the data address if it leads to an RDMA port, else the first one that does. */
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
  /** Of ports that are not used any more, with sessions that have not noticed yet. */
  #retired: DataListenerHandle[] = [];

  constructor(options: RdmaHostOptions) {
    this.#options = options;
  }

  /**
   * Never throws: what is wrong is the answer. Listens, so that a peer that is asked can find out whether it gets here.
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

  /** For a source session. UNSUPPORTED where there is no RDMA now. */
  async listener(): Promise<DataListenerHandle> {
    return this.#listen(await this.#address());
  }

  /** How a target session connects. UNSUPPORTED where there is no RDMA now. */
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

  /** No source session is open any more. */
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
        `its RDMA address ${config.address} leads to no active RDMA port`,
        'check the cable and the address (rdma.address in the configuration of vmigrated, or --data rdma://ADDRESS)',
      );
    }
    const preferred = addresses.find((address) => address === dataAddress) ?? addresses[0];
    const address = config.address ?? preferred ?? null;
    if (address !== null) return { devices, address, problem: null };
    return none('none of its addresses leads to an active RDMA port', 'check the cable, and give the port an address');
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
      log.warn({ address, isLost: this.#listener.isLost }, 'the RDMA port has changed: listening anew');
      this.#retired.push(this.#listener);
      this.#listener = null;
    }
    this.#retired = this.#retired.filter((listener) => !isClosed(listener));
    // A retired one may have the port still; peers are told the one that it is.
    this.#listener ??= open(this.#retired.length === 0 ? config.port : 0);
    return this.#listener;
  }

  #timeouts(): ProviderOptions {
    const { ackTimeoutExponent, retryCount } = this.#options.config;
    return { ackTimeoutExponent, retryCount };
  }
}

/** false: sessions are open on it. */
function isClosed(listener: DataListenerHandle): boolean {
  try {
    listener.close();
    return true;
  } catch {
    return false;
  }
}
