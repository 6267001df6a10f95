/**
 * What tells a guest which VM it is, and takes its last word. Every VM has these devices, so that a clone has the
 * layout of its parent and the state of the one loads into the other:
 *
 *   vmgenid                         a guid; when another VM's state is loaded QEMU writes its own into the guest's
 *   memory and raises an ACPI event
 *   fw_cfg opt/vmigrate/clone       JSON of constant length, read by the guest when it likes
 *   (/sys/firmware/qemu_fw_cfg/by_name/..)
 *   virtio-serial, port 1           org.vmigrate.exit: what the guest writes goes to a file; the last line is its exit
 *   code
 *   virtio-serial, port 2           org.qemu.guest_agent.0, if the spec wants it
 */
import type { VmSpec } from '../../domain/vm.js';

export const EXIT_PORT = 'org.vmigrate.exit';
export const CLONE_FILE = 'opt/vmigrate/clone';
/**
 * A guest's driver has read the length once, before the fork: it must never change. The longest name and count need
 * some 200 bytes.
 */
export const CLONE_FILE_BYTES = 256;
const AGENT_PORT = 'org.qemu.guest_agent.0';
/** Behind the slots of disks (command-line.ts). */
const SERIAL_SLOT = 0x1b;
const SERIAL_PORTS_MAX = 4;

export interface IdentityPlacement {
  /** The file that takes what the guest writes to its exit port. */
  readonly exitPath: string;
  /** Socket of the guest agent's port; used if the spec has one. */
  readonly agentPath: string;
}

/** How devices are attached. bare: a machine without a bus for them (isapc, none). */
export type MachineBus = 'pci-express' | 'pci' | 'mmio' | 'bare';

export function machineBus(machine: string): MachineBus {
  if (/^(pc-)?q35/.test(machine)) return 'pci-express';
  if (machine.startsWith('microvm')) return 'mmio';
  return machine === 'isapc' || machine === 'none' ? 'bare' : 'pci';
}

/** A value inside a comma-separated option: QEMU reads `,,` as a comma. */
export function escapeOption(value: string): string {
  return value.replaceAll(',', ',,');
}

/** Arguments for QEMU; none for a VM that was started before there were such devices. */
export function identityArguments(spec: VmSpec, place: IdentityPlacement): string[] {
  const bus = machineBus(spec.machine);
  if (spec.vmGenerationId === undefined || bus === 'bare') return [];
  const file = ['-fw_cfg', `name=${CLONE_FILE},string=${escapeOption(cloneFileText(spec))}`];
  const controller =
    bus === 'mmio'
      ? 'virtio-serial-device,id=vmg-serial'
      : `virtio-serial-pci,id=vmg-serial,addr=0x${SERIAL_SLOT.toString(16)}`;
  return [
    // Without ACPI no guest would find it.
    ...(bus === 'mmio' ? [] : ['-device', `vmgenid,id=vmg-generation,guid=${spec.vmGenerationId}`]),
    ...file,
    ...['-device', `${controller},max_ports=${SERIAL_PORTS_MAX}`],
    ...['-chardev', `file,id=chr-exit,path=${escapeOption(place.exitPath)},append=on`],
    ...['-device', `virtserialport,id=vmg-exit,bus=vmg-serial.0,nr=1,chardev=chr-exit,name=${EXIT_PORT}`],
    ...(spec.hasGuestAgent === true ? agentArguments(place.agentPath) : []),
  ];
}

/**
 * What the guest reads. The guid comes first: whoever looks for a change need not read on. Index, count and fork are
 * null in a VM that is no clone.
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
