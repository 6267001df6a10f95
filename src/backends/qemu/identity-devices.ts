/**
 * The devices that tell a guest which VM it is, and that take its exit code. Every VM has these devices, so that a
 * clone has the layout of its parent and can load the parent's state:
 *
 *   vmgenid                     a guid; after a load of another VM's state QEMU writes its own guid into the guest's
 *                               memory and raises an ACPI event
 *   fw_cfg opt/vmigrate/clone   JSON of constant length; the guest reads it at any time
 *                               (/sys/firmware/qemu_fw_cfg/by_name/..)
 *   virtio-serial, port 1       org.vmigrate.exit: QEMU keeps the end of the guest's output until the
 *                               daemon takes it; the last line is its exit code
 *   virtio-serial, port 2       org.qemu.guest_agent.0, if the spec has it
 */
import type { VmSpec } from '../../domain/vm.js';

export const EXIT_PORT = 'org.vmigrate.exit';
/** QEMU's names of the exit port's device and of its memory. */
export const EXIT_DEVICE = 'vmg-exit';
export const EXIT_CHARDEV = 'chr-exit';
/** QEMU overwrites the oldest bytes: whatever the guest writes, it never waits and never fills anything. */
export const EXIT_BYTES_MAX = 4096;
export const CLONE_FILE = 'opt/vmigrate/clone';
/**
 * The length must never change, because a guest's driver has read it once, before the fork. The longest name and count
 * need some 200 bytes.
 */
export const CLONE_FILE_BYTES = 256;
const AGENT_PORT = 'org.qemu.guest_agent.0';
/** The slot after those of the disks (command-line.ts). */
const SERIAL_SLOT = 0x1b;
const SERIAL_PORTS_MAX = 4;

export interface IdentityPlacement {
  /** The socket of the guest agent's port. It is used if the spec has such a port. */
  readonly agentPath: string;
}

/** The bus that devices are attached to. `bare` is a machine without a bus for them (isapc, none). */
export type MachineBus = 'pci-express' | 'pci' | 'mmio' | 'bare';

export function machineBus(machine: string): MachineBus {
  if (/^(pc-)?q35/.test(machine)) return 'pci-express';
  if (machine.startsWith('microvm')) return 'mmio';
  return machine === 'isapc' || machine === 'none' ? 'bare' : 'pci';
}

/** Escapes a value for a comma-separated option, in which QEMU reads `,,` as a comma. */
export function escapeOption(value: string): string {
  return value.replaceAll(',', ',,');
}

/** Returns the arguments for QEMU, or none for a VM that was started before there were such devices. */
export function identityArguments(spec: VmSpec, place: IdentityPlacement): string[] {
  const bus = machineBus(spec.machine);
  if (spec.vmGenerationId === undefined || bus === 'bare') return [];
  const file = ['-fw_cfg', `name=${CLONE_FILE},string=${escapeOption(cloneFileText(spec))}`];
  const controller =
    bus === 'mmio'
      ? 'virtio-serial-device,id=vmg-serial'
      : `virtio-serial-pci,id=vmg-serial,addr=0x${SERIAL_SLOT.toString(16)}`;
  return [
    // A guest finds vmgenid by ACPI, which mmio machines do not have.
    ...(bus === 'mmio' ? [] : ['-device', `vmgenid,id=vmg-generation,guid=${spec.vmGenerationId}`]),
    ...file,
    ...['-device', `${controller},max_ports=${SERIAL_PORTS_MAX}`],
    ...['-chardev', `ringbuf,id=${EXIT_CHARDEV},size=${EXIT_BYTES_MAX}`],
    ...['-device', `virtserialport,id=${EXIT_DEVICE},bus=vmg-serial.0,nr=1,chardev=${EXIT_CHARDEV},name=${EXIT_PORT}`],
    ...(spec.hasGuestAgent === true ? agentArguments(place.agentPath) : []),
  ];
}

/**
 * Returns the text that the guest reads. The guid comes first, so that a program that checks for a change can stop
 * there.
 * Index, count and fork are null in a VM that is not a clone.
 */
export function cloneFileText(spec: VmSpec): string {
  const text = JSON.stringify({
    generation: spec.vmGenerationId ?? null,
    index: spec.clone?.index ?? null,
    count: spec.clone?.cloneCount ?? null,
    name: spec.name,
    fork: spec.clone?.fork ?? null,
  });
  return `${text.padEnd(CLONE_FILE_BYTES - 1)}\n`;
}

function agentArguments(path: string): string[] {
  return [
    ...['-chardev', `socket,id=chr-agent,path=${escapeOption(path)},server=on,wait=off`],
    ...['-device', `virtserialport,id=vmg-agent,bus=vmg-serial.0,nr=2,chardev=chr-agent,name=${AGENT_PORT}`],
  ];
}
