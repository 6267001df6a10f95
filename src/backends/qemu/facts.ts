/** Collects the facts about one VM that pre-flight asks for and only QEMU knows. */
import type { OpenFile } from '../../domain/storage.js';
import type { VmSpec } from '../../domain/vm.js';
import type { SpecDevices, VmFacts } from '../backend.js';
import { directNodes, isAnyDiskFull, openFiles } from './block.js';
import { qemuArguments } from './command-line.js';
import type { QemuConnection } from './connection.js';
import { deviceChanges, type PresentDevice } from './device-changes.js';
import { hostResources } from './host-arguments.js';
import { argumentsIn, optionsIn } from './options.js';

/** Devices without migratable state. QEMU reports them only when a migration starts. */
const WITHOUT_STATE = /^(nvme($|-)|pvrdma$|usb-mtp$|virtio-(gpu|vga)-gl)/;
/** Devices whose state QEMU can move but whose memory accesses bypass our page faults. */
const PASSTHROUGH = /^child<(vfio-|pci-assign|vhost-vdpa)/;
/** Devices by which processes other than QEMU write to guest memory. */
const ESCAPING = /vfio-|vhost-user|vhost-vdpa|ivshmem|pci-assign|virtio-pmem/;
/** Devices that punch holes into the memory's files. */
const DISCARDING = /virtio-(?:balloon|mem)[a-z-]*/;
const DISCARDING_CHILD = /^child<(virtio-(?:balloon|mem)[^>]*)>$/;
/** Options that bring a kernel, a firmware with a boot menu of its own, a drive, or a boot over the network. */
const BOOT_OPTIONS =
  /^(kernel|bios|cdrom|hd[a-d]|fd[ab]|pflash|mtdblock|sd|drive|blockdev|boot|option-rom|nic|net|readconfig)$/;
/** Devices that a firmware can boot from without a drive of the command line. NICs boot over the network. */
const BOOT_DEVICES = /net-|net$|e1000|rtl8139|pcnet|vmxnet|loader|vfio|vhost-user-(blk|scsi)/;
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

type BootArguments = Pick<VmSpec, 'kernel' | 'disks' | 'devices' | 'qemuArgs'>;

/** Whether a guest finds anything to boot from; in doubt there is something. The NICs of a spec have no boot ROM. */
export function hasBootSource({ kernel, disks, devices, qemuArgs }: BootArguments): boolean {
  if (kernel !== undefined || disks.length > 0) return true;
  const all = [...argumentsIn(qemuArgs), ...devices.map((value) => ({ option: 'device', value }))];
  return all.some(({ option, value }) => (option === 'device' ? isBootDevice(value) : BOOT_OPTIONS.test(option)));
}

function isBootDevice(value: string): boolean {
  const { head, keys } = optionsIn(value);
  const driver = head === '' ? (keys.get('driver') ?? '') : head;
  return keys.has('drive') || keys.has('romfile') || BOOT_DEVICES.test(driver);
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

  async directDisks(): Promise<string[]> {
    return directNodes(this.#connection.qmp);
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

  async isStoppedByDisk(): Promise<boolean> {
    const { qmp } = this.#connection;
    const isStopped = (await qmp.execute('query-status')).status === 'io-error';
    return isStopped && !(await isAnyDiskFull(qmp));
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
    diskSockets: Object.fromEntries(spec.disks.map(({ id }) => [id, path])),
  });
}
