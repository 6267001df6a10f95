/** What pre-flight wants to know of one VM that only its QEMU knows. */
import type { VmSpec } from '../../domain/vm.js';
import type { VmFacts } from '../backend.js';
import type { QemuConnection } from './connection.js';

/** QEMU has no state for these; it says so only when a migration is started. */
const UNMIGRATABLE_DEVICE = /^(nvme($|-)|pvrdma$|usb-mtp$|virtio-(gpu|vga)-gl)/;
/** Devices whose state QEMU can move but whose memory accesses bypass our page faults. */
const PASSTHROUGH = /^child<(vfio-|pci-assign|vhost-vdpa)/;
/** They punch holes into the memory's files. */
const DISCARDING = /^child<(virtio-(?:balloon|mem)[^>]*)>$/;
const DEVICE_CONTAINERS = ['/machine/peripheral', '/machine/peripheral-anon'];

/** By their drivers. */
export function devicesWithoutState({ devices }: VmSpec): string[] {
  return devices.map((device) => device.split(',')[0] ?? '').filter((driver) => UNMIGRATABLE_DEVICE.test(driver));
}

export class QemuFacts implements VmFacts {
  readonly #connection: QemuConnection;

  constructor(connection: QemuConnection) {
    this.#connection = connection;
  }

  async migrationBlockers(): Promise<string[]> {
    const { qmp } = this.#connection;
    const migration = await qmp.execute('query-migrate');
    const blockers = [...(migration['blocked-reasons'] ?? [])];
    for (const path of DEVICE_CONTAINERS) {
      for (const { name, type } of await qmp.execute('qom-list', { path })) {
        if (PASSTHROUGH.test(type)) blockers.push(`device ${name} (${type.slice(6, -1)}) passes host hardware through`);
      }
    }
    return blockers;
  }

  async discardingDevices(): Promise<string[]> {
    const found: string[] = [];
    for (const path of DEVICE_CONTAINERS) {
      for (const { type } of await this.#connection.qmp.execute('qom-list', { path })) {
        const [, device] = DISCARDING.exec(type) ?? [];
        if (device !== undefined) found.push(device);
      }
    }
    return found;
  }

  /** From QEMU, not from the spec alone: `qemuArgs` may say otherwise. */
  async sharedRegions(): Promise<ReadonlySet<string>> {
    const backends = await this.#connection.qmp.execute('query-memdev');
    return new Set(backends.flatMap(({ id, share }) => (share && id !== undefined ? [id] : [])));
  }
}
