/**
 * How a host that joins a fork gets at the disks of the image. A disk whose files are proven to be the same on both
 * hosts is shared. Any other is served by the host that has the image. That is right whatever the joining host has
 * under the path.
 *
 * Each clone opens the other files of the spec (firmware, what `qemuArgs` name) on its own host, so they must be there.
 * Kernel and initrd are not among them: a clone has them in its memory.
 */
import type { DiskAccess } from '../../domain/fork.js';
import type { HostInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import type { VmSpec } from '../../domain/vm.js';
import { type ComparedFile, checkFile, differenceOf, type StorageFacts } from '../compared-files.js';

export interface JoinQuestion {
  /** The parent's spec. */
  readonly spec: VmSpec;
  /** The host that has the image. */
  readonly root: HostInventory;
  readonly joining: HostInventory;
  /** The parent's files, with the root as the source of the comparison. */
  readonly storage: StorageFacts;
  /** The user says that both hosts share all disks. What shows that they do not is a refusal then. */
  readonly isSharingAssumed: boolean;
}

export interface JoinDisk {
  readonly id: string;
  readonly access: DiskAccess;
  /** Why the disk is served. Null if it is shared. */
  readonly reason: string | null;
}

export interface JoinStorage {
  /** One for each disk of the spec. Empty if there are refusals. */
  readonly disks: readonly JoinDisk[];
  readonly refusals: readonly Refusal[];
}

export function joinStorage(question: JoinQuestion): JoinStorage {
  const { spec, storage, isSharingAssumed } = question;
  if (storage.kind === 'unasked' && isSharingAssumed) {
    return { disks: spec.disks.map(({ id }) => ({ id, access: 'shared', reason: null })), refusals: [] };
  }
  if (storage.kind !== 'compared') return { disks: [], refusals: [notCompared(question, storage)] };
  const ofDisks = new Set<ComparedFile>();
  const refusals: Refusal[] = [];
  const disks = spec.disks.map(({ id, path }): JoinDisk => {
    const files = filesOfDisk(storage.files, path);
    for (const file of files) ofDisks.add(file);
    const refusal = files.length === 0 ? unnamed(question, id) : refusalOfDisk(question, files);
    if (refusal !== null) refusals.push(refusal);
    const reason = isSharingAssumed ? null : reasonToServe(question, files);
    return { id, access: reason === null ? 'shared' : 'served', reason };
  });
  for (const compared of storage.files) {
    if (ofDisks.has(compared) || compared.file.use === BOOT_FILE) continue;
    const refusal = checkFile(compared, question.root, question.joining);
    if (refusal !== null) refusals.push({ ...refusal, remedy: remedyFor(question) });
  }
  return { disks: refusals.length === 0 ? disks : [], refusals };
}

/** How the comparison calls kernel and initrd (src/agent/storage/storage.ts). */
const BOOT_FILE = 'boot file';

function notCompared({ spec, joining }: JoinQuestion, storage: StorageFacts): Refusal {
  const error = storage.kind === 'failed' ? storage.error : null;
  const why = error?.message ?? (storage.kind === 'unsupported' ? 'its vmigrate is too old' : 'nobody has asked it');
  return {
    code: 'STORAGE_NOT_PROVEN',
    reason: `${joining.host} does not say which files of ${spec.name} it sees: ${why}`,
    remedy: error?.remedy ?? `try again, or leave ${joining.host} out`,
  };
}

/** Returns the disk's file and the files behind it, as far as the comparison has them. */
function filesOfDisk(files: readonly ComparedFile[], path: string): ComparedFile[] {
  const top = files.find(({ file }) => file.path === path);
  const behind = new Set(top?.source.chain.slice(1).map((link) => link.path));
  return top === undefined ? [] : [top, ...files.filter((other) => other !== top && behind.has(other.file.path))];
}

function unnamed({ root, spec }: JoinQuestion, id: string): Refusal {
  return {
    code: 'STORAGE_NOT_PROVEN',
    reason: `${root.host} has not said what disk ${id} of ${spec.name} is`,
    remedy: 'try again',
  };
}

function refusalOfDisk(question: JoinQuestion, files: readonly ComparedFile[]): Refusal | null {
  const { root, joining, isSharingAssumed } = question;
  for (const compared of files) {
    const { file, source, target } = compared;
    if (source.problem !== null) return checkFile(compared, root, joining);
    if (!isSharingAssumed) continue;
    const difference = target.problem ?? differenceOf(compared);
    if (difference === null) continue;
    const reason = `${root.host} and ${joining.host} do not share ${file.use} (${file.path}): ${difference}`;
    return { code: 'DISK_NOT_SHARED', reason, remedy: remedyFor(question) };
  }
  return null;
}

function reasonToServe({ root, joining }: JoinQuestion, files: readonly ComparedFile[]): string | null {
  for (const compared of files) {
    const refusal = checkFile(compared, root, joining);
    if (refusal !== null) return refusal.reason;
  }
  return null;
}

function remedyFor({ root, joining }: JoinQuestion): string {
  return `make the file of ${root.host} available on ${joining.host} under the same path, or leave ${joining.host} out`;
}
