/**
 * Makes everything that a fork needs before it touches the parent: the image's record and files, and a waiting QEMU for
 * each clone.
 */
import { MigrationError } from '../../domain/errors.js';
import type { CloneFailure } from '../../domain/fork.js';
import type { PrepareForkRequest } from '../../engine/ports/fork.js';
import { namedHere, refuseOtherDisks, refuseOtherOrigin } from '../image/join-disks.js';
import { refuseBadStart } from '../image/start-check.js';
import { refuseSpecOfPeer } from '../policy/policy.js';
import { allocatedBytes } from '../vm/memory-room.js';
import type { ManagedVm } from '../vm/vms.js';
import type { WaitingClone } from './clones/start.js';
import type { ForkContext } from './context.js';
import type { Pool } from './pool.js';
import type { ForkRecord } from './record.js';
import { newImage, ramOfImage, shapeOf } from './shape.js';
import { endClones, makeWaitingSet, type WaitingSet } from './waiting-set.js';

export interface ForkParts {
  readonly record: ForkRecord;
  /** Null if the fork runs an existing image. */
  readonly parent: ManagedVm | null;
  readonly clones: readonly WaitingClone[];
  readonly failures: readonly CloneFailure[];
}

/** If it rejects, it has removed everything it had made. */
export async function prepareFork(
  context: ForkContext,
  request: PrepareForkRequest,
  pool: Pool,
  signal: AbortSignal,
): Promise<ForkParts> {
  const { images, forkStore, inject, registry } = context;
  if (request.origin !== undefined && request.vm !== null)
    throw new MigrationError('USAGE', 'a fork has a parent on this host or an origin on another, not both');
  const { shape, parent } = shapeOf(context, request);
  const { origin, share } = request;
  const sharedWith = hostsWith(context, request);
  const brought = origin !== undefined && hasComplete(context, origin.image) ? images.get(origin.image) : null;
  if (origin !== undefined && brought !== null) {
    refuseOtherOrigin(brought, origin.host, context.host);
    refuseOtherDisks(brought, origin.spec.disks);
  }
  if (origin !== undefined) await refuseSpecOfPeer(context, namedHere(origin, brought), origin.host);
  const existing = origin === undefined ? request.image : (brought?.id ?? null);
  if (existing !== null) await refuseBadStart(context, existing);
  if (existing !== null) await shareImage(context, existing, sharedWith);
  const owner = parent !== null ? await registry.owner(parent.spec.name) : null;
  // A waiting set has all clones of a fork.
  const isPoolable = request.image === null && origin === undefined && share === undefined;
  const set = isPoolable ? pool.claim(shape) : null;
  const image = origin?.image ?? request.image ?? set?.image ?? request.fork;
  const isNewImage = existing === null;
  let record: ForkRecord = {
    ...{ version: 1, request, image, state: 'preparing', runsAfterCommit: true },
    isWarm: set !== null,
    ...(owner?.incarnation === undefined ? {} : { incarnation: owner.incarnation }),
    ...{ clones: [], outcome: null, failure: null },
  };
  let made: WaitingSet | null = set;
  // The image of a waiting set is this fork's, too.
  let hasMadeImage = set !== null;
  try {
    await forkStore.save(record);
    await inject.hit('agent:fork:prepare');
    if (isNewImage && parent !== null && request.parentMode === 'continue')
      await holdRoom(context, request.fork, parent);
    if (isNewImage && origin !== undefined)
      await context.vms.room.hold(request.fork, origin.allocatedBytes, origin.spec.memory.pageBytes);
    if (isNewImage && set === null) {
      const qemuVersion = origin?.qemuVersion ?? parent?.qemuVersion ?? '';
      const created = newImage(context, image, shape, { qemuVersion, origin });
      await images.create(sharedWith.length === 0 ? created : { ...created, sharedWith }, ramOfImage(shape, parent));
      hasMadeImage = true;
    }
    made ??= await makeWaitingSet(context, images.get(image), shape, {
      fork: request.image === null ? image : request.fork,
      isPartialAllowed: request.isPartialAllowed,
      isReplacing: request.isReplacing === true,
      signal,
    });
    record = { ...record, state: 'prepared', clones: made.clones.map(({ identity }) => identity) };
    await forkStore.save(record);
    await inject.hit('agent:fork:prepared');
    return { record, parent, clones: made.clones, failures: made.failures };
  } catch (error) {
    await endClones(context, made?.clones ?? []);
    if (hasMadeImage) await images.delete(image);
    context.vms.room.release(request.fork);
    await forkStore.remove(request.fork);
    throw error;
  }
}

/** An earlier fork has brought the image here. Throws CONFLICT if it is not all here. */
function hasComplete({ images, host }: ForkContext, id: string): boolean {
  if (!images.has(id)) return false;
  const { state } = images.get(id);
  if (state !== 'complete') throw new MigrationError('CONFLICT', `image ${id} on ${host} is ${state}`);
  return true;
}

/** Promises the room that the image will take. When the clones run the image itself counts, with its full size. */
async function holdRoom({ vms }: ForkContext, fork: string, parent: ManagedVm): Promise<void> {
  const { sizeBytes, pageBytes } = parent.spec.memory;
  // The pages of a clone are in its image and in its process, so its image may need them all.
  const bytes = parent.image === null ? allocatedBytes(parent.regions) : sizeBytes;
  await vms.room.hold(fork, bytes, pageBytes);
}

/** The other hosts of the fork. */
function hostsWith({ host, peers }: ForkContext, { hosts, origin }: PrepareForkRequest): readonly string[] {
  const all = new Set([...(hosts ?? []), ...(origin === undefined ? [] : [origin.host])]);
  return [...all].filter((other) => other !== host && peers.isPeer(other));
}

/** Durable when it resolves: the readers of the image come back after a restart. */
async function shareImage({ images }: ForkContext, id: string, hosts: readonly string[]): Promise<void> {
  const { sharedWith = [] } = images.get(id);
  const all = new Set([...sharedWith, ...hosts]);
  if (all.size > sharedWith.length) await images.update(id, { sharedWith: [...all] });
}
