/**
 * Finds devices that were plugged into or out of a running VM by others than the daemon. The VM on the target, and each
 * clone, is made from the spec; it cannot load the state of a device that it does not have. Pure.
 */
import { argumentsIn, optionsIn } from './options.js';

/** A device as QEMU lists it. */
export interface PresentDevice {
  /** The device's id; null if it has none. */
  readonly id: string | null;
  /** QEMU's type, such as "virtio-net-pci". */
  readonly type: string;
}

/** Options by which QEMU makes devices without `-device`. With one of them, devices without an id are not counted. */
const MAKERS =
  /^(drive|virtfs|virtfs_synth|watchdog|usbdevice|audio|soundhw|nic|net|hd[a-d]|cdrom|sd|pflash|mtdblock)$/;

/** Compares QEMU's devices with those that its command line has made. Returns one line for each difference. */
export function deviceChanges(commandLine: readonly string[], present: readonly PresentDevice[]): string[] {
  const all = argumentsIn(commandLine);
  const made = all.filter(({ option }) => option === 'device').map(({ value }) => deviceOf(value));
  const wantedIds = new Map(made.flatMap(({ id, driver }) => (id === null ? [] : [[id, driver] as const])));
  const presentIds = new Map(present.flatMap(({ id, type }) => (id === null ? [] : [[id, type] as const])));
  const added = [...presentIds].filter(([id]) => !wantedIds.has(id));
  const removed = [...wantedIds].filter(([id]) => !presentIds.has(id));
  return [
    ...added.map(([id, type]) => `device ${id} (${type}) was added while the VM ran`),
    ...removed.map(([id, driver]) => `device ${id} (${driver}) was removed while the VM ran`),
    ...(all.some(({ option }) => MAKERS.test(option)) ? [] : nameless(made, present)),
  ];
}

/** Devices without an id. A driver may have several names, so their number decides, and the types only name them. */
function nameless(made: readonly { id: string | null; driver: string }[], present: readonly PresentDevice[]): string[] {
  const drivers = made.filter(({ id }) => id === null).map(({ driver }) => driver);
  const types = present.filter(({ id }) => id === null).map(({ type }) => type);
  const difference = types.length - drivers.length;
  if (difference === 0) return [];
  const names = difference > 0 ? surplus(types, drivers) : surplus(drivers, types);
  const what = names.length === 0 ? '' : ` (${names.join(', ')})`;
  const count = Math.abs(difference);
  const devices = count === 1 ? 'a device without an id' : `${count} devices without an id`;
  return [`${devices}${what} ${count === 1 ? 'was' : 'were'} ${difference > 0 ? 'added' : 'removed'} while the VM ran`];
}

function surplus(more: readonly string[], fewer: readonly string[]): string[] {
  const left = [...fewer];
  return more.filter((name) => {
    const at = left.indexOf(name);
    if (at >= 0) left.splice(at, 1);
    return at < 0;
  });
}

function deviceOf(value: string): { id: string | null; driver: string } {
  const { head, keys } = optionsIn(value);
  return { id: keys.get('id') ?? null, driver: head === '' ? (keys.get('driver') ?? '') : head };
}
