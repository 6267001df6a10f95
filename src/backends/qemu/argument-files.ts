/**
 * Finds the files that a spec's own arguments for QEMU name. Pure. QEMU knows its drives better than its command line
 * does (facts.ts); the files of all other options are known only from here.
 */
import type { ArgumentFile } from '../../domain/storage.js';
import { DISK_FORMATS, type VmSpec } from '../../domain/vm.js';
import { argumentsIn, isOn, type Options, optionsIn } from './options.js';

/** Options whose whole value is the path of a file that QEMU only reads, at its start. */
const READ_WHOLE: ReadonlySet<string> = new Set(['bios', 'dtb', 'initrd', 'kernel', 'option-rom']);
/** Options whose whole value is the path of a drive. All but a CD are writable. */
const DRIVE_WHOLE = /^(cdrom|hd[a-d]|fd[ab]|mtdblock|pflash|sd)$/;
/** Options that describe a drive. The names of its files end with one of DRIVE_KEYS. */
const DRIVES: ReadonlySet<string> = new Set(['drive', 'blockdev']);
const DRIVE_KEY = /^(?:.*\.)?(?:file|filename)$/;
/** Keys of other options that name a file that QEMU only reads. */
const READ_KEYS: Readonly<Record<string, readonly string[]>> = {
  fw_cfg: ['file'],
  smbios: ['file'],
  acpitable: ['file', 'data'],
  device: ['romfile', 'file', 'config'],
  object: ['file', 'filename', 'dir'],
};
/** QEMU looks for these in its own data directory if they have no directory; that comes with QEMU's version. */
const IN_DATA_DIRECTORY = /^(-bios|-option-rom|-device)$/;
/** The address of a network disk, which is the same for every host unless it names the host itself. */
const ADDRESS = /^(?:json:|[a-z][a-z0-9+.-]*:)/i;

export function argumentFiles({ devices, qemuArgs }: Pick<VmSpec, 'devices' | 'qemuArgs'>): ArgumentFile[] {
  const all = [...argumentsIn(qemuArgs), ...devices.map((value) => ({ option: 'device', value, text: '' }))];
  const found = all.flatMap(({ option, value }) => [...filesOf(option, value)]);
  return found.filter(({ path, use }) => {
    if (path === '' || path.startsWith('fat:')) return false;
    if (!path.startsWith('/') && ADDRESS.test(path)) return false;
    return path.includes('/') || !IN_DATA_DIRECTORY.test(use);
  });
}

function* filesOf(option: string, value: string): Iterable<ArgumentFile> {
  const use = `-${option}`;
  const read = { use, isWritable: false, isDrive: false, format: null };
  if (READ_WHOLE.has(option)) yield { ...read, path: value };
  else if (DRIVE_WHOLE.test(option)) {
    yield { path: withoutFilePrefix(value), use, isWritable: option !== 'cdrom', isDrive: true, format: null };
  } else if (DRIVES.has(option)) yield* drive(use, optionsIn(value));
  else {
    for (const [key, path] of optionsIn(value).pairs) {
      if (READ_KEYS[option]?.includes(key) !== true) continue;
      // acpitable's files are separated by colons.
      for (const part of option === 'acpitable' ? path.split(':') : [path]) yield { ...read, path: part };
    }
  }
}

/** A file behind another one (`backing.file.filename`) is only read, and so is a drive that is a snapshot or a CD. */
function* drive(use: string, { head, keys, pairs }: Options): Iterable<ArgumentFile> {
  const isReadOnly =
    ['readonly', 'read-only', 'snapshot'].some((key) => isOn(keys.get(key))) || keys.get('media') === 'cdrom';
  const named = keys.get('format') ?? keys.get('driver');
  const format = DISK_FORMATS.find((known) => known === named) ?? null;
  const common = { use, isDrive: true };
  if (head !== '' && use === '-drive')
    yield { ...common, path: withoutFilePrefix(head), isWritable: !isReadOnly, format };
  for (const [key, path] of pairs) {
    if (!DRIVE_KEY.test(key)) continue;
    const isBehind = /(^|\.)backing\./.test(key);
    const isWritable = !isReadOnly && !isBehind;
    yield { ...common, path: withoutFilePrefix(path), isWritable, format: isBehind ? null : format };
  }
}

function withoutFilePrefix(path: string): string {
  return path.replace(/^file:/, '');
}
