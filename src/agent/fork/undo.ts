/** Restores the parent of a cancelled fork, left by this daemon or an earlier one. */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { ParentDisks } from './parent-disks.js';
import type { ForkRecord } from './record.js';
import { endClones } from './waiting-set.js';

/**
 * Resumes the parent. Its memory must not be protected any more. Does nothing for a parent that has ended. The QEMU of
 * a guest that has ended cannot be resumed, and lasts a moment longer: the call waits for its end.
 */
export async function resumeParent(context: ForkContext, parent: ManagedVm): Promise<void> {
  const { vms, log } = context;
  const { name } = parent.spec;
  const isThere = (): boolean => vms.has(name) && vms.get(name) === parent && parent.state !== 'stopped';
  const hasGuestEnded = async (): Promise<boolean> => isThere() && (await vms.guestEnd(name)) !== null;
  if (!isThere() || ((await hasGuestEnded()) && !isThere())) return;
  try {
    await parent.process.cancelAndRun();
  } catch (error) {
    await hasGuestEnded();
    if (isThere()) throw toMigrationError(error);
    log.warn({ vm: name }, 'the parent of a fork ended before the fork was undone');
  }
}

/**
 * Throws if one of the clones runs, or has run and been paused. No clone runs before its fork is committed, so somebody
 * else has resumed this one, or there is an error in this program. Either way it is not taken back.
 */
export function refuseIfRun(clones: readonly { readonly vm: ManagedVm }[]): void {
  const names = clones.filter(({ vm }) => vm.hasRun && vm.exit === null).map(({ vm }) => vm.spec.name);
  if (names.length === 0) return;
  throw new MigrationError('STEP_FAILED', `${names.join(', ')} has run, although the fork is not committed`, {
    remedy: `to give it up: "vmctl stop ${names[0]} --force"; the fork is undone then`,
  });
}

/** The fork has made its image on this host, and nobody else needs it as long as the fork is not committed. */
export function isOwnImage({ images }: ForkContext, { request, image }: ForkRecord): boolean {
  if (request.origin === undefined) return request.image === null;
  return images.has(image) && images.get(image).state === 'capturing';
}

/** Undoes an uncommitted fork of an earlier daemon. It may be repeated if it has rejected. */
export async function undoFork(context: ForkContext, record: ForkRecord): Promise<void> {
  const { vms, images, forkStore, native } = context;
  const { fork, vm: name, image, parentMode } = record.request;
  const setId = image === null ? record.image : fork;
  const clones = vms
    .all()
    .filter((vm) => vm.image === record.image && vm.spec.clone?.fork === setId)
    .map((vm) => ({ vm }));
  if (record.runsAfterCommit === true) refuseIfRun(clones);
  const parent = image === null && name !== null && vms.has(name) ? vms.get(name) : null;
  if (parent !== null && images.has(record.image)) {
    if (parentMode === 'continue' && parent.memory !== null) await native.releaseVm(parent.memory);
    await resumeParent(context, parent);
  }
  await endClones(context, clones);
  if (parent !== null && images.has(record.image)) {
    await new ParentDisks(context, parent, record.image).undo();
  }
  if (isOwnImage(context, record)) await images.delete(record.image);
  await forkStore.remove(fork);
}
