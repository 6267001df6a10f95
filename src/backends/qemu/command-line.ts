/**
 * Builds QEMU's command line from a VM spec. The functions are pure: on every host the same spec gives the same
 * devices, with the same ids, at the same PCI addresses. QEMU needs that to load the device state of one VM into the
 * other. Only paths, names of taps and the accelerator may differ.
 */
import type { Accel, DiskSpec, NicSpec, VmSpec } from '../../domain/vm.js';
import {
  escapeOption,
  type IdentityPlacement,
  identityArguments,
  type MachineBus,
  machineBus,
} from './identity-devices.js';

/** The values that differ between hosts. All paths are absolute. */
export interface QemuPlacement extends IdentityPlacement {
  readonly accel: Accel;
  /** The QMP socket for the daemon, and a second one for users and other tools. */
  readonly qmpPath: string;
  readonly monitorPath: string;
  /** Used if the spec has a serial port. */
  readonly serialPath: string;
  readonly serialLogPath: string;
  /** One path per region, in the spec's order, if the VM's memory is in files. */
  readonly ramPaths: readonly string[];
  /** The tap device of each NIC that has one, by the NIC's id. */
  readonly taps: Readonly<Record<string, string>>;
  readonly isIncoming: boolean;
  /** The socket of each disk that another host serves, by the disk's id. */
  readonly diskSockets?: Readonly<Record<string, string>>;
}

/**
 * The first PCI slots of NICs and disks. The ranges are separate, so that an added NIC moves no disk. Slot 1 is PIIX on
 * `pc`, and slot 0x1f is ICH9 on `q35`.
 */
const NIC_SLOT = 0x02;
const DISK_SLOT = 0x0a;
/** How long a read of a served disk waits for a new connection. QEMU does not answer the daemon while it drains one. */
const RECONNECT_S = 10;
const HUGE_PAGE_SIZES: Readonly<Record<number, string>> = { 2097152: '2M', 1073741824: '1G' };

/**
 * Returns the arguments for QEMU. The VM starts paused (-S), and the caller resumes it when everything else is ready.
 */
export function qemuArguments(spec: VmSpec, place: QemuPlacement): string[] {
  return [
    ...['-name', `guest=${escapeOption(spec.name)},debug-threads=on`],
    ...['-uuid', spec.uuid],
    ...['-msg', 'timestamp=on'],
    ...['-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'],
    ...['-no-user-config', '-nodefaults', '-display', 'none', '-vga', 'none'],
    ...['-accel', place.accel === 'tcg' ? 'tcg,thread=multi' : 'kvm'],
    ...['-cpu', spec.cpuModel],
    // Only Windows XP benefits from vapic. It reads guest memory while device state is loaded, which causes page faults
    // in the blackout.
    ...['-global', 'apic-common.vapic=off'],
    ...['-smp', `cpus=${spec.cpus}`],
    ...memoryArguments(spec, place.ramPaths),
    ...socketMonitor('qmp', place.qmpPath),
    ...socketMonitor('monitor', place.monitorPath),
    ...(spec.hasSerial ? serialArguments(place) : []),
    ...identityArguments(spec, place),
    ...spec.nics.flatMap((nic, index) => nicArguments(spec, nic, index, place.taps[nic.id])),
    ...spec.disks.flatMap((disk, index) => diskArguments(disk, DISK_SLOT + index, place.diskSockets?.[disk.id])),
    ...kernelArguments(spec),
    ...spec.devices.flatMap((device) => ['-device', device]),
    // A guest that ends leaves its QEMU paused. So the daemon learns how it ended, also one that was away meanwhile.
    ...['-action', 'shutdown=pause'],
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
      // With the preload, a clone's QEMU is told that its memory is shared, so that it leaves the memory out of its
      // stream. The preload maps the memory copy-on-write.
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

/** Returns an argument that only the QEMU with this QMP socket has, by which its process can be found. */
export function qmpSocketArgument(qmpPath: string): string {
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
 * Returns the properties of a NIC's device, for the command line and for `device_add`. On q35 each NIC is behind a root
 * port of its own, because devices on the root bus cannot be unplugged. `romfile` is empty, because a boot ROM would be
 * one more block of memory in every migration.
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

/** VMs that were started before there were identity devices have their NICs on the root bus. */
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
 * A clone gets no kernel and no initrd: its memory contains the kernel already, and the files would take as much memory
 * again in each clone. The boot ROM stays, because it is a block of memory and one of the files that fw_cfg numbers. It
 * would find nothing to load, so a reboot ends the clone.
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

/**
 * A disk that another host serves is read through a socket. What the guest has read is kept in its overlay, and a guest
 * that cannot read stops where it is: it goes on when the host is back.
 */
function diskArguments(disk: DiskSpec, slot: number, socket: string | undefined): string[] {
  const { id, path, format, isReadOnly, served } = disk;
  const readOnly = isReadOnly ? 'on' : 'off';
  const file = `driver=file,node-name=file-${id},filename=${escapeOption(path)},read-only=${readOnly}`;
  const top = `driver=${format},node-name=format-${id},file=file-${id},read-only=${readOnly}`;
  const device = (drive: string) => `virtio-blk-pci,id=${id},drive=${drive},addr=${hex(slot)}`;
  const blockdevs = (...nodes: string[]) => nodes.flatMap((node) => ['-blockdev', node]);
  if (served === undefined) return [...blockdevs(file, top), '-device', device(`format-${id}`)];
  if (socket === undefined) throw new RangeError(`no socket for disk ${id}`);
  const place = `server.type=unix,server.path=${escapeOption(socket)},export=${id}`;
  const base = `driver=nbd,node-name=base-${id},${place},reconnect-delay=${RECONNECT_S},read-only=on`;
  const kept = `driver=copy-on-read,node-name=kept-${id},file=format-${id}`;
  const nodes = isReadOnly ? [base] : [base, file, `${top},backing=base-${id}`, kept];
  const drive = isReadOnly ? `base-${id}` : `kept-${id}`;
  return [...blockdevs(...nodes), '-device', `${device(drive)},rerror=stop,werror=stop`];
}

function hex(slot: number): string {
  return `0x${slot.toString(16).padStart(2, '0')}`;
}
