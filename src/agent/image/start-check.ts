/**
 * Whether clones may start on an image's disks now. Asked by pre-flight, and again right before the clones' QEMUs are
 * made, so that nothing is made for a start that would pair memory with newer disks.
 */
import { isAbsolute } from 'node:path';
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import type { DiskSpec } from '../../domain/vm.js';
import type { VmManager } from '../vm/vms.js';
import { checkLayers, type DiskLayer, sealDisks } from './layers.js';
import type { ImageRecord } from './record.js';
import type { ImageStore } from './store.js';

export interface StartProblem {
  readonly code: 'DISK_CHANGED' | 'DISK_IN_USE';
  readonly reason: string;
}

interface Parts {
  readonly images: ImageStore;
  readonly vms: VmManager;
}

/** Checks in progress. Reading a large disk takes longer than a caller waits, and the next caller joins in. */
const checks = new WeakMap<ImageStore, Map<string, Promise<StartProblem | null>>>();

/** Returns the reason why no clone may start on the image's disks, or null. Keeps the stamps that it had to renew. */
export function startProblem(parts: Parts, id: string): Promise<StartProblem | null> {
  const running = checks.get(parts.images) ?? new Map<string, Promise<StartProblem | null>>();
  checks.set(parts.images, running);
  const before = running.get(id);
  if (before !== undefined) return before;
  const check = findProblem(parts, id).finally(() => running.delete(id));
  running.set(id, check);
  return check;
}

async function findProblem(parts: Parts, id: string): Promise<StartProblem | null> {
  const { images, vms } = parts;
  await describeLayers(parts, id);
  if (!isDescribed(parts, images.get(id))) {
    return { code: 'DISK_CHANGED', reason: `image ${id} does not say what its disks were: they could not be read` };
  }
  const { layers = [] } = images.get(id);
  const { layers: now, problem } = await checkLayers(layers);
  if (problem !== null) return { code: 'DISK_CHANGED', reason: `image ${id}: ${problem.reason}` };
  if (JSON.stringify(now) !== JSON.stringify(layers) && images.has(id)) await images.update(id, { layers: now });
  return writerOf(vms, layers);
}

/** Throws DISK_CHANGED, or CONFLICT if somebody writes to a disk of the image. */
export async function refuseBadStart(parts: Parts, id: string): Promise<void> {
  const problem = await startProblem(parts, id);
  if (problem === null) return;
  throw new MigrationError(problem.code === 'DISK_CHANGED' ? 'DISK_CHANGED' : 'CONFLICT', problem.reason, {
    remedy: remedyOf(problem, id),
  });
}

function remedyOf({ code }: StartProblem, id: string): string {
  if (code === 'DISK_IN_USE') return 'end the VM or the program that has the disk open';
  return `put the disk's files back as they were, or remove the image: "vmctl image rm ${id}"`;
}

/** A VM that writes to a layer would change it under the clones, even if it has not written yet. */
export async function writerOf(vms: VmManager, layers: readonly DiskLayer[]): Promise<StartProblem | null> {
  const isUp = new Set(['starting', 'running', 'paused', 'incoming']);
  for (const { path, format } of layers.flatMap(({ files }) => files)) {
    const writer = vms
      .all()
      .find((vm) => isUp.has(vm.state) && vm.spec.disks.some((disk) => disk.path === path && !disk.isReadOnly));
    if (writer !== undefined) return { code: 'DISK_IN_USE', reason: `${writer.spec.name} writes to ${path}` };
    if (await vms.backend.diskFiles.isWritten(path, format)) {
      return { code: 'DISK_IN_USE', reason: `another program has ${path} open for writing` };
    }
  }
  return null;
}

/** Errors that pass: they say nothing about the disks. */
const PASSING: ReadonlySet<ErrorCode> = new Set(['OUT_OF_MEMORY', 'TIMEOUT', 'IO_FAILED']);

/**
 * Records what the files of the image's disks are, once. From the fork point on nobody writes to them. If a disk cannot
 * be described, the record says that nothing is known (an empty list), no clone is started, and the reason is returned.
 * An error that passes, such as a limit of the host, is thrown: the record stays as it is, and the next call tries
 * again.
 */
export async function describeLayers(parts: Parts, id: string): Promise<MigrationError | null> {
  const { images } = parts;
  if (!images.has(id) || images.get(id).layers !== undefined || layeredDisks(parts, images.get(id)).length === 0)
    return null;
  const layers = await sealImage(parts, images.get(id)).catch((thrown: unknown) => {
    const error = toMigrationError(thrown);
    if (PASSING.has(error.code)) throw error;
    return error;
  });
  const isDescribed = !(layers instanceof MigrationError);
  if (images.has(id)) await images.update(id, { layers: isDescribed ? layers : [] });
  return isDescribed ? null : layers;
}

/** True if the record says what the image's disks were. */
export function isDescribed({ vms }: Pick<Parts, 'vms'>, record: ImageRecord): boolean {
  const { layers = [], disks, served } = record;
  const ownCount = disks.length - (served?.disks.length ?? 0);
  // An image that was described before drives counted has the layers of its disks alone.
  return layers.length >= Math.max(ownCount, layeredDisks({ vms }, record).length === 0 ? 0 : 1);
}

/** Returns what the image's disks are now, for the record. Called when no VM writes to them any more. */
export function sealImage(parts: Pick<Parts, 'vms'>, record: ImageRecord): Promise<DiskLayer[]> {
  return sealDisks(parts.vms.backend.diskFiles, layeredDisks(parts, record));
}

/**
 * The disks of the spec, and the drives that only the back end's own arguments name. The host that serves a disk checks
 * its files.
 */
function layeredDisks({ vms }: Pick<Parts, 'vms'>, { spec, disks, served }: ImageRecord): DiskSpec[] {
  const here = disks.filter(({ id }) => served?.disks.includes(id) !== true);
  const own = here.map((disk) => ({
    ...disk,
    isReadOnly: spec.disks.find(({ id }) => id === disk.id)?.isReadOnly ?? false,
  }));
  const known = new Set(disks.map(({ path }) => path));
  // A relative path leads to another file for each VM.
  const drives = vms.backend.filesIn(spec).filter((file) => file.isDrive && !file.isWritable && isAbsolute(file.path));
  return [
    ...own,
    ...drives.flatMap(({ path, use, format }): DiskSpec[] => {
      if (known.has(path)) return [];
      known.add(path);
      return [{ id: `${use} ${path}`, path, format: format ?? 'raw', isReadOnly: true }];
    }),
  ];
}
