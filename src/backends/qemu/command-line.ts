/**
 * QEMU's command line from a VM spec. Pure: the same spec gives the same devices with the same ids at the same PCI
 * addresses on every host, which is what lets QEMU load the device state of one into the other. Only paths, names of
 * taps and the accelerator may differ.
 */
import type { DiskSpec, NicSpec, VmSpec } from '../../domain/vm.js';
import {
  escapeOption,
  type IdentityPlacement,
  identityArguments,
  type MachineBus,
  machineBus,
} from './identity-devices.js';

/** What differs from host to host. All paths absolute. */
export interface QemuPlacement extends IdentityPlacement {
  readonly accel: 'kvm' | 'tcg';
  /** QMP for the daemon, and another one for people and other tools. */
  readonly qmpPath: string;
  readonly monitorPath: string;
  /** Used if the spec has a serial port. */
  readonly serialPath: string;
  readonly serialLogPath: string;
  /** One for each region of a VM whose memory is in files, in the spec's order. */
  readonly ramPaths: readonly string[];
  /** Tap device for each NIC that has one, by the NIC's id. */
  readonly taps: Readonly<Record<string, string>>;
  readonly isIncoming: boolean;
}

/**
 * First PCI slots of NICs and disks. Apart, so that adding a NIC moves no disk; slot 1 is PIIX on `pc`, 0x1f ICH9 on
 * `q35`.
 */
const NIC_SLOT = 0x02;
const DISK_SLOT = 0x0a;
const HUGE_PAGE_SIZES: Readonly<Record<number, string>> = { 2097152: '2M', 1073741824: '1G' };

/** Arguments for QEMU. It starts stopped (-S): the caller lets it run once everything around it stands. */
export function qemuArguments(spec: VmSpec, place: QemuPlacement): string[] {
  return [
    ...['-name', `guest=${escapeOption(spec.name)},debug-threads=on`],
    ...['-uuid', spec.uuid],
    ...['-msg', 'timestamp=on'],
    ...['-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'],
    ...['-no-user-config', '-nodefaults', '-display', 'none', '-vga', 'none'],
    ...['-accel', place.accel === 'tcg' ? 'tcg,thread=multi' : 'kvm'],
    ...['-cpu', spec.cpuModel],
    // Only Windows XP gains from it, and it reads guest memory while device state is loaded: page faults in the
    // blackout.
    ...['-global', 'apic-common.vapic=off'],
    ...['-smp', `cpus=${spec.cpus}`],
    ...memoryArguments(spec, place.ramPaths),
    ...socketMonitor('qmp', place.qmpPath),
    ...socketMonitor('monitor', place.monitorPath),
    ...(spec.hasSerial ? serialArguments(place) : []),
    ...identityArguments(spec, place),
    ...spec.nics.flatMap((nic, index) => nicArguments(spec, nic, index, place.taps[nic.id])),
    ...spec.disks.flatMap((disk, index) => diskArguments(disk, DISK_SLOT + index)),
    ...kernelArguments(spec),
    ...spec.devices.flatMap((device) => ['-device', device]),
    ...spec.qemuArgs,
    '-S',
    ...(place.isIncoming ? ['-incoming', 'defer'] : []),
  ];
}

function memoryArguments(spec: VmSpec, ramPaths: readonly string[]): string[] {
  const { memory } = spec;
  const backends = memory.regions.map((region, index) => {
    const sized = `id=${region.id},size=${region.lengthBytes}`;
    if (memory.backing !== 'private') {
      const path = ramPaths[index];
      if (path === undefined) throw new RangeError(`no file for region ${region.id}`);
      // A clone's QEMU with the preload believes its memory shared, and leaves it out of its stream; the preload maps
      // it copy-on-write.
      const share = memory.backing === 'shared' || spec.hasPreload ? 'on' : 'off';
      return `memory-backend-file,${sized},share=${share},mem-path=${escapeOption(path)}`;
    }
    const hugeSize = HUGE_PAGE_SIZES[memory.pageBytes];
    return hugeSize === undefined
      ? `memory-backend-ram,${sized}`
      : `memory-backend-memfd,${sized},share=off,hugetlb=on,hugetlbsize=${hugeSize}`;
  });
  const objects = backends.flatMap((backend) => ['-object', backend]);
  const size = ['-m', `size=${memory.sizeBytes}B`];
  const [first, ...others] = memory.regions;
  if (first !== undefined && others.length === 0) {
    return [...objects, '-machine', `${spec.machine},memory-backend=${first.id}`, ...size];
  }
  const nodes = memory.regions.flatMap((region, index) => ['-numa', `node,nodeid=${index},memdev=${region.id}`]);
  return [...objects, '-machine', spec.machine, ...size, ...nodes];
}

/** What only the QEMU of a VM with its QMP socket there has on its command line. */
export function telltaleArgument(qmpPath: string): string {
  return socketChardev('qmp', qmpPath);
}

function socketChardev(id: string, path: string): string {
  return `socket,id=chr-${id},path=${escapeOption(path)},server=on,wait=off`;
}

function socketMonitor(id: string, path: string): string[] {
  return ['-chardev', socketChardev(id, path), '-mon', `chardev=chr-${id},mode=control`];
}

function serialArguments(place: QemuPlacement): string[] {
  const log = `logfile=${escapeOption(place.serialLogPath)},logappend=on`;
  return [
    '-chardev',
    `socket,id=chr-serial,path=${escapeOption(place.serialPath)},server=on,wait=off,${log}`,
    '-serial',
    'chardev:chr-serial',
  ];
}

/**
 * The properties of a NIC's device, as the command line and `device_add` have them. On q35 a NIC sits behind a root
 * port of its own: devices on the root bus cannot be unplugged. `romfile` empty: no boot ROM, which would be one more
 * block of memory in every migration.
 */
export function nicProperties(spec: VmSpec, nic: NicSpec, index: number): Readonly<Record<string, string>> {
  const bus = machineBus(spec.machine);
  const hasRom = nic.model.includes('pci') || nic.model.startsWith('e1000');
  return {
    driver: nic.model,
    id: nic.id,
    mac: nic.mac,
    ...nicAddress(spec, bus, nic, index),
    ...(hasRom ? { romfile: '' } : {}),
    ...(nic.type === 'none' ? {} : { netdev: netdevId(nic) }),
  };
}

function nicAddress(spec: VmSpec, bus: MachineBus, nic: NicSpec, index: number): Readonly<Record<string, string>> {
  if (bus === 'mmio') return {};
  return hasRootPorts(spec) ? { bus: rootPortId(nic), addr: hex(0) } : { addr: hex(NIC_SLOT + index) };
}

/** VMs that are older than their identity devices have their NICs on the root bus. */
function hasRootPorts(spec: VmSpec): boolean {
  return machineBus(spec.machine) === 'pci-express' && spec.vmGenerationId !== undefined;
}

export function netdevId(nic: NicSpec): string {
  return `host-${nic.id}`;
}

function rootPortId(nic: NicSpec): string {
  return `port-${nic.id}`;
}

function nicArguments(spec: VmSpec, nic: NicSpec, index: number, tap: string | undefined): string[] {
  const { driver, ...properties } = nicProperties(spec, nic, index);
  const device = [driver, ...Object.entries(properties).map(([key, value]) => `${key}=${value}`)].join(',');
  const number = index + 1;
  const place = `chassis=${number},slot=${number},addr=${hex(NIC_SLOT + index)}`;
  const port = `pcie-root-port,id=${rootPortId(nic)},bus=pcie.0,${place}`;
  if (nic.type !== 'none' && tap === undefined) throw new RangeError(`no tap for NIC ${nic.id}`);
  return [
    ...(hasRootPorts(spec) ? ['-device', port] : []),
    ...(tap === undefined
      ? []
      : ['-netdev', `tap,id=${netdevId(nic)},ifname=${escapeOption(tap)},script=no,downscript=no`]),
    ...['-device', device],
  ];
}

/**
 * A clone's memory holds its kernel already, and the blobs would cost each clone as much again. The ROM that once
 * loaded them stays: it is a block of memory, and one of the files that fw_cfg numbers. It would find nothing to load,
 * so that a reboot ends such a clone.
 */
function kernelArguments(spec: VmSpec): string[] {
  if (spec.kernel === undefined) return [];
  if (spec.clone !== undefined) return ['-option-rom', 'linuxboot_dma.bin,bootindex=0', '-action', 'reboot=shutdown'];
  return [
    ...['-kernel', spec.kernel],
    ...(spec.initrd === undefined ? [] : ['-initrd', spec.initrd]),
    ...(spec.append === undefined ? [] : ['-append', spec.append]),
  ];
}

function diskArguments(disk: DiskSpec, slot: number): string[] {
  const readOnly = disk.isReadOnly ? 'on' : 'off';
  return [
    '-blockdev',
    `driver=file,node-name=file-${disk.id},filename=${escapeOption(disk.path)},read-only=${readOnly}`,
    '-blockdev',
    `driver=${disk.format},node-name=format-${disk.id},file=file-${disk.id},read-only=${readOnly}`,
    '-device',
    `virtio-blk-pci,id=${disk.id},drive=format-${disk.id},addr=${hex(slot)}`,
  ];
}

function hex(slot: number): string {
  return `0x${slot.toString(16).padStart(2, '0')}`;
}
