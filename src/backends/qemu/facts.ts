/** Collects the facts about one VM that pre-flight asks for and only QEMU knows. */
import type { OpenFile } from '../../domain/storage.js';
import type { VmSpec } from '../../domain/vm.js';
import type { SpecDevices, VmFacts } from '../backend.js';
import { openFiles } from './block.js';
import { hasBootSource } from './boot-source.js';
import { qemuArguments } from './command-line.js';
import type { QemuConnection } from './connection.js';
import { deviceChanges, type PresentDevice } from './device-changes.js';
import { hostResources } from './host-arguments.js';

/** Devices without migratable state. QEMU reports them only when a migration starts. */
const WITHOUT_STATE = /^(nvme($|-)|pvrdma$|usb-mtp$|virtio-(gpu|vga)-gl)/;
/** Devices whose state QEMU can move but whose memory accesses bypass our page faults. */
const PASSTHROUGH = /^child<(vfio-|pci-assign|vhost-vdpa)/;
/** Devices by which processes other than QEMU write to guest memory. */
const ESCAPING = /vfio-|vhost-user|vhost-vdpa|ivshmem|pci-assign|virtio-pmem/;
/** Devices that punch holes into the memory's files. */
const DISCARDING = /virtio-(?:balloon|mem)[a-z-]*/;
const DISCARDING_CHILD = /^child<(virtio-(?:balloon|mem)[^>]*)>$/;
const WITH_ID = '/machine/peripheral';
const WITHOUT_ID = '/machine/peripheral-anon';
const DEVICE_CONTAINERS = [WITH_ID, WITHOUT_ID];

export function devicesIn(spec: VmSpec): SpecDevices {
  const { devices, qemuArgs } = spec;
  const drivers = devices.map((device) => device.split(',')[0] ?? '');
  return {
    withoutState: drivers.filter((driver) => WITHOUT_STATE.test(driver)),
    escaping: [...drivers, ...qemuArgs].filter((what) => ESCAPING.test(what)),
    discarding: [...devices, ...qemuArgs].flatMap((what) => DISCARDING.exec(what)?.[0] ?? []),
    hostResources: hostResources(spec),
    hasBootSource: hasBootSource(spec),
  };
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
        const [, device] = DISCARDING_CHILD.exec(type) ?? [];
        if (device !== undefined) found.push(device);
      }
    }
    return found;
  }

  /** Asks QEMU, because `qemuArgs` may override the spec. */
  async sharedRegions(): Promise<ReadonlySet<string>> {
    const backends = await this.#connection.qmp.execute('query-memdev');
    return new Set(backends.flatMap(({ id, share }) => (share && id !== undefined ? [id] : [])));
  }

  async deviceChanges(spec: VmSpec): Promise<string[]> {
    const present: PresentDevice[] = [];
    for (const path of DEVICE_CONTAINERS) {
      for (const { name, type } of await this.#connection.qmp.execute('qom-list', { path })) {
        const [, driver] = /^child<(.*)>$/.exec(type) ?? [];
        if (driver !== undefined) present.push({ id: path === WITH_ID ? name : null, type: driver });
      }
    }
    return deviceChanges(commandLineOf(spec), present);
  }

  openFiles(): Promise<readonly OpenFile[]> {
    return openFiles(this.#connection.qmp);
  }
}

/** Returns the spec's command line with other paths. Its devices are the same on every host. */
function commandLineOf(spec: VmSpec): string[] {
  const path = '/';
  return qemuArguments(spec, {
    ...{ accel: 'tcg', isIncoming: false, qmpPath: path, monitorPath: path, serialPath: path, serialLogPath: path },
    ...{ exitPath: path, agentPath: path },
    ramPaths: spec.memory.regions.map(() => path),
    taps: Object.fromEntries(spec.nics.map(({ id }) => [id, id])),
  });
}
