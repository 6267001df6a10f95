/**
 * Judges whether two hosts see the same file under the same path. Pure, like all of pre-flight.
 *
 * What proves that a file is the same one on both hosts:
 *  - The target reads, beside the file, the secret that the source has just written there, the file has the same name,
 *    and is no mount point of its own: then both names are in one directory.
 *  - The block device has the same id of its own.
 *  - Both hosts are one running kernel, and the inode is the same.
 * A file that the VM only reads needs less: the same length and content. A writable file is never judged by its
 * content, because the VM writes meanwhile, and a copy that is equal now would be another disk a moment later.
 */
import type { MigrationError } from '../domain/errors.js';
import type { HostInventory } from '../domain/host.js';
import type { Refusal, RefusalCode } from '../domain/refusal.js';
import type { ChainLink, FileView, StorageFile } from '../domain/storage.js';
import { describeBytes } from './bytes.js';

/** One file of the VM, as source and target see it. */
export interface ComparedFile {
  readonly file: StorageFile;
  readonly source: FileView;
  readonly target: FileView;
}

export type StorageFacts =
  | { readonly kind: 'compared'; readonly files: readonly ComparedFile[] }
  /** Nobody has looked: the user says that the hosts share the storage, or the request is refused anyway. */
  | { readonly kind: 'unasked' }
  /** The vmigrate of that host is of a build that cannot compare files. */
  | { readonly kind: 'unsupported' }
  | { readonly kind: 'failed'; readonly error: MigrationError };

export const ASSUME = '"--shared-storage assume"';

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

/** Returns why the file is not known to be the same on both hosts, for a VM that runs on `a` and is to run on `b`. */
export function checkFile(compared: ComparedFile, a: HostInventory, b: HostInventory): Refusal | null {
  const { file, source, target } = compared;
  const what = `${file.use} (${file.path})`;
  if (source.problem !== null)
    return refuse(
      'STORAGE_NOT_PROVEN',
      `${a.host} cannot examine ${what}: ${source.problem}`,
      `restore the file on ${a.host}, or use ${ASSUME} if both hosts do share it`,
    );
  if (target.problem !== null)
    return refuse(
      'FILE_MISSING',
      `${b.host} cannot use ${what}: ${target.problem}`,
      `make the same file available on ${b.host} under the same path`,
    );
  const difference = differenceOf(compared);
  const code = file.isWritable ? 'DISK_NOT_SHARED' : 'FILE_DIFFERS';
  if (difference !== null)
    return refuse(code, `${a.host} and ${b.host} have different files as ${what}: ${difference}`, remedyFor(compared));
  if (isSameFile(compared, a, b)) return null;
  return file.isWritable ? unproven(compared, what, a, b) : checkContent(compared, what, a, b);
}

/** Returns what shows that they are two files, or null. */
export function differenceOf({ file, source, target }: ComparedFile): string | null {
  const isLengthFixed = !file.isWritable || file.format === 'raw' || source.kind === 'block';
  if (source.kind !== target.kind) return 'one is a file, the other a block device';
  if (isLengthFixed && source.sizeBytes !== target.sizeBytes)
    return `${describeBytes(source.sizeBytes)} and ${describeBytes(target.sizeBytes)}`;
  const linkText = (link: ChainLink | undefined) =>
    link === undefined ? 'nothing' : `${link.path} (${link.format}, ${describeBytes(link.virtualSizeBytes)})`;
  for (let index = 0; index < Math.max(source.chain.length, target.chain.length); index++) {
    const [one, other] = [linkText(source.chain[index]), linkText(target.chain[index])];
    if (one !== other) return `${one} and ${other}${index === 0 ? '' : ' in the backing chain'}`;
  }
  return null;
}

/** A secret that one host has written beside the file is read by the other there. */
export function sharesMarker({ source, target }: ComparedFile): boolean {
  const isBeside = source.marker !== null && source.marker === target.marker;
  return isBeside && source.realName === target.realName && !source.isMountPoint && !target.isMountPoint;
}

function isSameFile(compared: ComparedFile, a: HostInventory, b: HostInventory): boolean {
  const { source, target } = compared;
  const isSameDevice = source.deviceId !== null && source.deviceId === target.deviceId;
  // Machines that were cloned while they ran have the same machine id and the same inodes. A marker that was written
  // and is not seen shows that such an inode is another one.
  const isMarkerMissed = source.marker !== null && source.marker !== target.marker;
  const isSameInode = a.machineId === b.machineId && source.inode === target.inode && !isMarkerMissed;
  return sharesMarker(compared) || isSameDevice || isSameInode;
}

function checkContent(
  { source, target }: ComparedFile,
  what: string,
  a: HostInventory,
  b: HostInventory,
): Refusal | null {
  if (source.digest !== null && source.digest === target.digest) return null;
  return refuse(
    'FILE_DIFFERS',
    `the content of ${what} is not the same on ${a.host} and ${b.host}`,
    `copy the file from ${a.host} to ${b.host}, or share it`,
  );
}

function unproven({ source, target }: ComparedFile, what: string, a: HostInventory, b: HostInventory): Refusal {
  if (source.marker !== null && target.marker !== source.marker)
    return refuse(
      'DISK_NOT_SHARED',
      `${b.host} does not see what ${a.host} has just written beside ${what}: they are different disks of one name`,
      `put the disk on storage that both hosts mount there, and check the mount on ${b.host}; ` +
        `use ${ASSUME} only if you know that both hosts share it`,
    );
  const why =
    source.markerProblem !== null
      ? `${a.host} cannot write beside it (${source.markerProblem})`
      : source.kind === 'block'
        ? 'the block device has no id that both hosts know'
        : 'it is a mount point of its own, or has another name behind its symbolic links';
  return refuse(
    'DISK_NOT_SHARED',
    `nothing proves that ${a.host} and ${b.host} see the same ${what}: ${why}`,
    `use ${ASSUME} if both hosts do share it`,
  );
}

function remedyFor({ file }: ComparedFile): string {
  return file.isWritable
    ? 'put the disk on storage that both hosts mount under the same path'
    : 'copy the file from one host to the other, or share it';
}
