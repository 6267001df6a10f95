/**
 * The files that QEMU opens by itself: those of its command line, with all layers of its disks. Only these are opened
 * for a contained QEMU, so a layer that a disk names later, or after a guest has changed it, is not.
 */
import type { DiskFormat } from '../../domain/vm.js';
import type { LaunchOrder } from '../backend.js';
import { argumentFiles } from './argument-files.js';
import { layersOf } from './img.js';
import { addFile, type FileList } from './launcher/file-list.js';

const USERFAULTFD = '/dev/userfaultfd';
/** Devices of the host that an argument asks for by what it does. */
const BY_ARGUMENT: readonly (readonly [RegExp, string])[] = [
  [/vhost=on|vhost=true/, '/dev/vhost-net'],
  [/^(driver=)?vhost-vsock/, '/dev/vhost-vsock'],
];

export async function openedFiles(order: LaunchOrder): Promise<FileList> {
  const { spec, accel, ramPaths, taps, environment } = order;
  const list: FileList = new Map();
  // QEMU would create it, as its kind of output asks for.
  addFile(list, '/dev/null', 'write');
  for (const path of ramPaths) addFile(list, path, spec.memory.backing === 'image' ? 'copied' : 'write');
  if (spec.clone === undefined)
    for (const path of [spec.kernel, spec.initrd]) if (path !== undefined) addFile(list, path, 'read');
  for (const { path, format, isReadOnly, served } of spec.disks) {
    if (served === undefined) await addDisk(list, path, format, !isReadOnly);
    else if (!isReadOnly) addFile(list, path, 'write');
  }
  for (const { path, isDrive, isWritable, format } of argumentFiles(spec)) {
    if (isDrive) await addDisk(list, path, format ?? 'raw', isWritable);
    else addFile(list, path, 'read');
  }
  for (const argument of [...spec.qemuArgs, ...spec.devices])
    for (const [pattern, device] of BY_ARGUMENT) if (pattern.test(argument)) addFile(list, device, 'write');
  if (accel === 'kvm') addFile(list, '/dev/kvm', 'write');
  if (Object.keys(taps).length > 0) addFile(list, '/dev/net/tun', 'write');
  for (const library of (environment['LD_PRELOAD'] ?? '').split(':')) {
    if (library === '') continue;
    addFile(list, library, 'read');
    addFile(list, USERFAULTFD, 'write');
  }
  return list;
}

/** A QEMU that has its memory needs no more userfaultfds. */
export function withoutStart(list: FileList): void {
  list.delete(USERFAULTFD);
}

/** Of a chain only the front layer is written. QEMU itself says best what it misses of a disk that cannot be read. */
async function addDisk(list: FileList, path: string, format: DiskFormat, isWritable: boolean): Promise<void> {
  addFile(list, path, isWritable ? 'write' : 'read');
  const layers = await layersOf(path, format).catch(() => []);
  for (const [index, files] of layers.entries())
    for (const file of files) addFile(list, file.path, isWritable && index === 0 ? 'write' : 'read');
}
