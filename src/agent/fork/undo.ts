/** Restores the parent of a cancelled fork, left by this daemon or an earlier one. */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { settleMerge } from './live-merge.js';
import { overlaysElsewhere } from './overlay-merge.js';
import { OriginHost } from './pages/origin-host.js';
import { undoOverlays } from './parent-disks.js';
import type { ForkRecord } from './record.js';
import { endClones } from './waiting-set.js';

/**
 * Resumes the parent. Its memory must not be protected any more. Does nothing for a parent that has ended or has moved
 * to another host. The QEMU of a guest that has ended cannot be resumed, and lasts a moment longer: the call waits for
 * its end. Throws VM_BUSY if another job than the fork's has the parent by now.
 */
export async function resumeParent(context: ForkContext, parent: ManagedVm, job: string): Promise<void> {
  const { vms, log } = context;
  const { name } = parent.spec;
  const isThere = (): boolean => vms.has(name) && vms.get(name) === parent && isHere(parent);
  if (isThere()) refuseOtherJob(parent, job);
  const hasGuestEnded = async (): Promise<boolean> => isThere() && (await vms.guestEnd(name)) !== null;
  if (!isThere() || ((await hasGuestEnded()) && !isThere())) return;
  try {
    // An undo that was interrupted at the switch of a disk: until it is ended, the parent must not run.
    if (parent.mergedOverlay !== null) await settleMerge(context, parent);
    await parent.process.cancelAndRun();
  } catch (error) {
    await hasGuestEnded();
    if (isThere()) throw toMigrationError(error);
    log.warn({ vm: name }, 'the parent of a fork ended before the fork was undone');
  }
}

/** It has neither ended nor moved. */
function isHere({ state }: ManagedVm): boolean {
  return state !== 'stopped' && state !== 'departed';
}

function refuseOtherJob({ spec, job: holder }: ManagedVm, job: string): void {
  if (holder === null || holder === job) return;
  throw new MigrationError('VM_BUSY', `${spec.name} is part of job ${holder} by now`, { remedy: 'wait for that job' });
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
  const { fork, image, parentMode, origin } = record.request;
  const setId = image === null ? record.image : fork;
  const clones = vms
    .all()
    .filter((vm) => vm.image === record.image && vm.spec.clone?.fork === setId)
    .map((vm) => ({ vm }));
  if (record.runsAfterCommit === true) refuseIfRun(clones);
  const hasImage = origin === undefined && image === null && images.has(record.image);
  const parent = hasImage ? await findParent(context, record) : null;
  if (parent !== null) {
    if (parentMode === 'continue' && parent.memory !== null) await native.releaseVm(parent.memory);
    await resumeParent(context, parent, record.request.job);
  }
  await endClones(context, clones);
  if (hasImage) await undoDisks(context, parent, record.image);
  else if (origin !== undefined && isOwnImage(context, record)) {
    await images.delete(record.image);
    void new OriginHost(context, origin).end();
  }
  await forkStore.remove(fork);
}

/** Returns the VM that was forked, or null if this host has it no more. Another VM may have its name by now. */
async function findParent({ vms, images, registry }: ForkContext, record: ForkRecord): Promise<ManagedVm | null> {
  const { vm: name } = record.request;
  if (name === null || !vms.has(name)) return null;
  const vm = vms.get(name);
  if (vm.state === 'departed' || vm.spec.uuid !== images.get(record.image).spec.uuid) return null;
  if (isHere(vm)) refuseOtherJob(vm, record.request.job);
  const owner = await registry.owner(name);
  const isOther =
    owner?.incarnation !== undefined && record.incarnation !== undefined && owner.incarnation !== record.incarnation;
  return isOther ? null : vm;
}

/**
 * Gives the parent its own disks back and removes the image. If the parent has moved meanwhile, its new host needs the
 * overlays: the image stays, without memory, until a user removes it.
 */
async function undoDisks(context: ForkContext, parent: ManagedVm | null, image: string): Promise<void> {
  const { images } = context;
  if (parent === null && (await overlaysElsewhere(context, image)).length > 0) return images.unload(image);
  // It may have written to its base since the disk has switched. The overlay must not be merged over that.
  if (parent?.state === 'stopped' && parent.mergedOverlay !== null) await settleMerge(context, parent);
  await undoOverlays(context, parent, image);
  await images.delete(image);
}
