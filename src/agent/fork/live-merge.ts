/**
 * Merges an overlay of a VM that is up.
 *
 * An image that lists the overlay merges it offline once its VM has ended. That must never put old content over new. So
 * this holds at every moment: while an overlay exists that QEMU has merged, its VM does not write to the base.
 *
 * The order is: mark in the VM's record → QEMU copies → pause → switch to the base → the disk in the VM's record → the
 * file of the overlay is removed, which a crash of the machine does not undo → the VM runs → the mark is removed.
 *
 * From the moment at which QEMU may have the order to switch, the VM stays paused until the overlay is gone, or until
 * QEMU has said that it still uses the overlay. `settleMerge` brings this about after whatever has interrupted a merge:
 * an error, or the end of the daemon. It is repeated until it succeeds, and nobody else lets the VM run meanwhile.
 */
import { rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { AtSwitch } from '../../backends/vm-disks.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { DiskSpec } from '../../domain/vm.js';
import { syncDirectory } from '../../durable/durable-file.js';
import type { ParentOverlay } from '../image/record.js';
import { type MergedOverlay, mergesDisks, withDisks } from '../vm/record.js';
import type { ManagedVm, VmManager } from '../vm/vms.js';
import type { ForkContext } from './context.js';

/** How often a merge that cannot be ended is tried again. */
const RETRY_MS = 1_000;

/** What a merge needs to know of an overlay. */
export type Overlay = Pick<ParentOverlay, 'id' | 'path' | 'format' | 'base'>;

/** Keeps jobs away from the VM during `work`. Throws VM_BUSY if a job has it, or if its disks are being merged. */
export async function whileMerging<T>(context: ForkContext, name: string, work: () => Promise<T>): Promise<T> {
  const { vms } = context;
  await vms.amend(name, ({ job, isMerging, mergedOverlay }) => {
    if (job !== null) throw new MigrationError('VM_BUSY', `${name} is part of job ${job}`);
    if (isMerging === true || (mergedOverlay ?? null) !== null) throw mergesDisks(name);
    return { isMerging: true };
  });
  const vm = vms.get(name);
  try {
    return await work();
  } finally {
    // A merge that could not be ended takes the mark away later, and so does the next daemon.
    if (isThere(context, vm) && vm.mergedOverlay === null && !context.closing.aborted) await settle(context, vm);
  }
}

/**
 * Merges the overlay and removes it. Returns false if the VM has no such chain. No job and no other merge may have the
 * VM's disks meanwhile.
 */
export async function mergeLive(context: ForkContext, vm: ManagedVm, overlay: Overlay): Promise<boolean> {
  const { vms } = context;
  const { name } = vm.spec;
  const { disks } = vm.process;
  if (!(await disks.isOpen(overlay.path)) || !(await disks.isOpen(overlay.base.path))) return false;
  await mark(vms, name, overlay, (await disks.active()).get(overlay.id)?.path === overlay.path);
  try {
    const isMerged = await disks.merge(overlay, switchTo(vms, name, overlay));
    // An overlay between others is still there.
    if (isMerged) await removeOverlay(overlay.path);
    await vms.amend(name, () => ({ mergedOverlay: null }));
    return isMerged;
  } catch (error) {
    await settle(context, vm);
    throw error;
  }
}

/** Merges an overlay of a VM that has ended and removes it. Its record names the base then. */
export async function mergeEnded(context: ForkContext, vm: ManagedVm, overlay: Overlay): Promise<void> {
  const { vms } = context;
  const { name } = vm.spec;
  await mark(vms, name, overlay, true);
  try {
    await vms.backend.diskFiles.commitOverlay(overlay.path, overlay.base.path);
    await useBase(vms, name, overlay);
    await vms.amend(name, () => ({ mergedOverlay: null }));
  } catch (error) {
    await settle(context, vm);
    throw error;
  }
}

/**
 * The disk of an undone fork may not be in the VM's record yet. It is from now on, if the disk uses the overlay: a
 * record that names the base says that the overlay is merged.
 */
function mark(vms: VmManager, name: string, { id, path, base }: Overlay, isActive: boolean): Promise<void> {
  const mergedOverlay: MergedOverlay = { id, path, base: { path: base.path, format: base.format } };
  const overlay = { path, format: 'qcow2' } as const;
  return vms.amend(name, (record) => ({
    ...(isActive ? withDisks(record, (disk) => (disk.id === id ? overlay : disk)) : {}),
    mergedOverlay,
  }));
}

/** Returns the switch from the overlay to its base, for a VM that runs on. */
function switchTo(vms: VmManager, name: string, overlay: MergedOverlay): AtSwitch {
  return (complete) =>
    vms.whilePaused(name, async () => {
      await complete();
      await useBase(vms, name, overlay);
    });
}

async function useBase(vms: VmManager, name: string, { id, path, base }: MergedOverlay): Promise<void> {
  await amendDisks(vms, name, (disk) => (disk.id === id && disk.path === path ? base : disk));
  await removeOverlay(path);
}

/** Removes the file. It does not come back in a crash of the machine, if its file system can promise that. */
export async function removeOverlay(path: string): Promise<void> {
  await rm(path, { force: true });
  await syncDirectory(dirname(path)).catch(() => undefined);
}

/**
 * Ends what is left of a merge of the VM: a disk that has switched stays on its base, any other on its overlay, and the
 * VM runs on. Throws if that cannot be done now; the VM stays as it is then. Idempotent.
 */
export async function settleMerge({ vms }: Pick<ForkContext, 'vms'>, vm: ManagedVm): Promise<void> {
  const { name } = vm.spec;
  const overlay = vm.mergedOverlay;
  const isUp = vm.state === 'running' || vm.state === 'paused';
  if (overlay !== null && isUp) {
    await vm.process.connected();
    await vms.restoreRunState(name, async () => {
      // Somebody else has ended it meanwhile, and the next merge may have begun.
      if (vm.mergedOverlay !== overlay) return false;
      await vm.process.disks.abandonMerges();
      if (await vm.process.disks.release(overlay.path)) await useBase(vms, name, overlay);
      return true;
    });
  }
  const isOnBase = vm.spec.disks.some(({ id, path }) => id === overlay?.id && path === overlay.base.path);
  if (overlay !== null && vm.state === 'stopped' && isOnBase) await removeOverlay(overlay.path);
  await vms.amend(name, ({ mergedOverlay }) =>
    (mergedOverlay ?? null) === overlay ? { isMerging: false, mergedOverlay: null } : null,
  );
}

/** Ends what is left of a merge. If that fails, it is repeated in the background. */
async function settle(context: ForkContext, vm: ManagedVm): Promise<void> {
  if (context.closing.aborted || !isThere(context, vm)) return;
  try {
    await settleMerge(context, vm);
  } catch (error) {
    logUnsettled(context, vm, error);
    keepSettling(context, vm).catch((failure: unknown) => logUnsettled(context, vm, failure));
  }
}

/** Repeats `settleMerge` until it succeeds, the merge has ended otherwise, the VM is gone, or the daemon ends. */
async function keepSettling(context: ForkContext, vm: ManagedVm): Promise<void> {
  const { closing } = context;
  const overlay = vm.mergedOverlay;
  while (!closing.aborted && isThere(context, vm) && vm.isMerging && vm.mergedOverlay === overlay) {
    try {
      return await settleMerge(context, vm);
    } catch (error) {
      if (closing.aborted) return;
      logUnsettled(context, vm, error);
      await sleep(RETRY_MS, undefined, { signal: closing, ref: false }).catch(() => undefined);
    }
  }
}

/** Ends what an earlier daemon has left of merges. Waits for VMs that do not answer at once, until the daemon ends. */
export async function resumeMerges(context: ForkContext): Promise<void> {
  const merging = context.vms.all().filter(({ isMerging }) => isMerging);
  await Promise.all(merging.map((vm) => keepSettling(context, vm)));
}

function isThere({ vms }: ForkContext, vm: ManagedVm): boolean {
  const { name } = vm.spec;
  return vms.has(name) && vms.get(name) === vm;
}

function logUnsettled({ log }: ForkContext, { spec, mergedOverlay }: ManagedVm, error: unknown): void {
  const fields = { vm: spec.name, overlay: mergedOverlay?.path, err: toMigrationError(error) };
  log.warn(fields, 'the interrupted merge of a disk cannot be ended yet; the VM may be paused until it is');
}

/** Writes these disk files into the VM's record. Durable when it resolves. */
export async function amendDisks(
  vms: VmManager,
  name: string,
  fileOf: (disk: DiskSpec) => Pick<DiskSpec, 'path' | 'format'>,
): Promise<void> {
  await vms.amend(name, (record) => withDisks(record, fileOf));
}
