/**
 * A waiting set: QEMUs that wait for the device state of one image, before that state exists. Each QEMU has mapped the
 * image's empty files, is registered for page faults, and has its clone's identity on its command line. A fork then
 * only hands over a few hundred kilobytes. A set is made within a fork, or beforehand by the pool.
 */

import { setMaxListeners } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type {
  CloneDisks,
  CloneFailure,
  CloneIdentity,
  CloneMemory,
  CloneNetwork,
  ForkShare,
  ParentMode,
} from '../../domain/fork.js';
import type { Accel, VmSpec } from '../../domain/vm.js';
import { inParallel } from '../../kit/parallel.js';
import type { ImageRecord } from '../image/record.js';
import type { ManagedVm } from '../vm/vms.js';
import { OverlayTemplates, planCloneDisks, type ServedDisks } from './clones/disks.js';
import { cloneIdentities, cloneSpec, refuseMacsTaken, runningNics } from './clones/names.js';
import type { WaitingClone } from './clones/start.js';
import type { ForkContext } from './context.js';

/** A starting QEMU keeps one processor busy for some 50 ms. More starts at once only compete for the processors. */
const STARTS_AT_ONCE = 8;
const ENDS_AT_ONCE = 16;
/** Each clone that ends gives descriptors and memory back, which the end of another one may lack. */
const END_ATTEMPTS = 4;
const END_AGAIN_MS = 250;

/**
 * Everything that is on the clones' command lines. The same processes can serve two requests of the same shape.
 */
export interface CloneShape {
  readonly parent: VmSpec;
  readonly accel: Accel;
  readonly cloneCount: number;
  /** The clones that this host makes. Absent: all. */
  readonly share?: ForkShare;
  readonly namePrefix: string | null;
  readonly parentMode: ParentMode;
  readonly memory: CloneMemory;
  readonly network: CloneNetwork;
  readonly disks: CloneDisks;
}

export interface WaitingSet {
  readonly clones: readonly WaitingClone[];
  readonly failures: readonly CloneFailure[];
}

export interface MakeSetOptions {
  /** The id that the clones' names derive from: the image's, or the fork's if the fork runs an existing image. */
  readonly fork: string;
  readonly isPartialAllowed: boolean;
  /** Ended VMs with the clones' names are removed. Otherwise such a clone is refused. */
  readonly isReplacing: boolean;
  /** The caller aborts it to cancel. */
  readonly signal: AbortSignal;
}

/**
 * Makes all clones of the set, or with `isPartialAllowed` those that start. If it rejects, no clone is left, and the
 * error names the clone that failed first and the reason.
 */
export async function makeWaitingSet(
  context: ForkContext,
  image: ImageRecord,
  shape: CloneShape,
  options: MakeSetOptions,
): Promise<WaitingSet> {
  // Each start adds a listener.
  setMaxListeners(0, options.signal);
  const { first, count } = shape.share ?? { first: 0, count: shape.cloneCount };
  const others = context.vms.all().map(({ spec }) => spec);
  const isShared = shape.share !== undefined;
  const all = cloneIdentities({
    fork: options.fork,
    cloneCount: shape.cloneCount,
    namePrefix: shape.namePrefix,
    parent: shape.parent,
    network: shape.network,
    macsTaken: new Set(isShared ? [] : others.flatMap(({ nics }) => nics.map(({ mac }) => mac))),
  });
  if (isShared) refuseMacsTaken(all, shape.parent, others);
  const identities = all.slice(first, first + count);
  const served = await servedDisks(context, image, options.signal);
  const templates = await OverlayTemplates.make(context.vms.backend, shape.parent.disks, {
    prefix: `${context.images.statePath(image.id)}-${options.fork}`,
    served,
  });
  let isGivenUp = false;
  const startAll = (epochs: ReadonlyMap<string, number>) =>
    inParallel(identities, STARTS_AT_ONCE, async (identity) => {
      if (isGivenUp || options.signal.aborted) throw new MigrationError('CANCELLED', 'the fork was cancelled');
      const epochMin = epochs.get(identity.name) ?? 0;
      try {
        return await startClone(context, image, shape, { identity, epochMin, templates, served, ...options });
      } catch (error) {
        isGivenUp ||= !options.isPartialAllowed;
        throw error;
      }
    });
  // Names that derive from the id of the fork are new. The parent runs, so that the question costs it nothing.
  const isNamed = shape.namePrefix !== null;
  const starting = isNamed ? context.names.guardClones(identities, startAll) : startAll(new Map());
  const outcomes = await starting.catch(async (error: unknown) => {
    await templates.remove().catch(() => undefined);
    throw error;
  });
  const clones: WaitingClone[] = [];
  const failures: CloneFailure[] = [];
  for (const [position, identity] of identities.entries()) {
    const outcome = outcomes[position];
    if (outcome === undefined) continue;
    if ('value' in outcome) clones.push({ identity, vm: outcome.value });
    else failures.push({ index: identity.index, name: identity.name, error: outcome.error });
  }
  try {
    await templates.remove();
  } catch (error) {
    await endClones(context, clones);
    throw error;
  }
  const isEnough = options.isPartialAllowed ? clones.length > 0 || identities.length === 0 : failures.length === 0;
  if (isEnough && !options.signal.aborted) return { clones, failures };
  await endClones(context, clones);
  throw firstFailure(failures);
}

/** Waits until the host that serves disks of the image does so. Null: no host serves any. */
async function servedDisks(
  { diskReader }: ForkContext,
  image: ImageRecord,
  signal: AbortSignal,
): Promise<ServedDisks | null> {
  if (image.served === undefined) return null;
  return { host: image.served.host, image: image.id, sockets: await diskReader.open(image, signal) };
}

/** Kills and removes the clones. Idempotent. */
export async function endClones(context: ForkContext, clones: readonly { vm: ManagedVm }[]): Promise<void> {
  const { vms, log } = context;
  let left: readonly { vm: ManagedVm; error?: unknown }[] = clones;
  for (let attempt = 1; left.length > 0; attempt++) {
    const these = left;
    const outcomes = await inParallel(these, ENDS_AT_ONCE, async ({ vm }) => {
      const { name } = vm.spec;
      // Another VM may have the name by now.
      if (vms.has(name) && vms.get(name) === vm) await vms.destroy(name);
    });
    left = these.flatMap(({ vm }, position) => {
      const outcome = outcomes[position];
      return outcome !== undefined && 'error' in outcome ? [{ vm, error: outcome.error }] : [];
    });
    if (attempt === END_ATTEMPTS) break;
    if (left.length > 0) await sleep(END_AGAIN_MS);
  }
  for (const { vm, error } of left) {
    const { name } = vm.spec;
    log.error(
      { vm: name, err: toMigrationError(error) },
      `a clone of a cancelled fork cannot be removed; end it with: vmctl stop ${name} --force`,
    );
  }
}

/** Returns the error of the clone that failed, ahead of those of clones that were not started because of it. */
export function firstFailure(failures: readonly CloneFailure[]): MigrationError {
  const isCause = ({ error }: CloneFailure) => !(error instanceof MigrationError && error.code === 'CANCELLED');
  const first = failures.find(isCause) ?? failures[0];
  if (first === undefined) return new MigrationError('CANCELLED', 'the fork was cancelled');
  const cause = toMigrationError(first.error);
  return new MigrationError(cause.code, `clone ${first.name}: ${cause.message}`, {
    cause,
    ...(cause.remedy === undefined ? {} : { remedy: cause.remedy }),
    details: { index: first.index, name: first.name },
  });
}

async function startClone(
  context: ForkContext,
  image: ImageRecord,
  shape: CloneShape,
  clone: Pick<MakeSetOptions, 'fork' | 'isReplacing' | 'signal'> & {
    readonly identity: CloneIdentity;
    readonly epochMin: number;
    readonly templates: OverlayTemplates;
    readonly served: ServedDisks | null;
  },
): Promise<ManagedVm> {
  const { vms, images } = context;
  const { identity, epochMin, fork, templates, served, isReplacing, signal } = clone;
  const isPrivate = shape.memory === 'private';
  const spec = cloneSpec(shape.parent, fork, identity, shape.network);
  const disks = planCloneDisks(spec.disks, vms.directoryOf(identity.name), shape.disks, { templates, served });
  const vm = await vms.prepareClone(
    {
      ...spec,
      accel: shape.accel,
      disks: disks.specs,
      memory: { ...spec.memory, backing: isPrivate ? 'shared' : 'image' },
    },
    {
      image: image.id,
      epochMin,
      accel: shape.accel,
      isRegistered: isPrivate || (image.state !== 'complete' && shape.parentMode === 'continue'),
      statePath: images.statePath(image.id),
      ...(served === null ? {} : { diskSockets: served.sockets }),
      isReplacing,
      signal,
      nics: runningNics(shape.parent, identity, shape.network),
      beforeLaunch: () => disks.create(),
    },
  );
  try {
    await disks.afterLaunch();
    await vm.process.prepareFile();
    return vm;
  } catch (error) {
    await endClones(context, [{ vm }]);
    throw error;
  }
}
