/**
 * Makes everything that a fork needs before it touches the parent: the image's record and files, and a waiting QEMU for
 * each clone.
 */
import type { PrepareForkRequest } from '../../engine/ports/fork.js';
import { refuseBadStart } from '../image/start-check.js';
import { allocatedBytes } from '../vm/memory-room.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import type { Pool } from './pool.js';
import type { ForkRecord } from './record.js';
import type { ForkParts } from './session.js';
import { newImage, ramOfImage, shapeOf } from './shape.js';
import { endClones, makeWaitingSet, type WaitingSet } from './waiting-set.js';

/** If it rejects, it has removed everything it had made. */
export async function prepareFork(
  context: ForkContext,
  request: PrepareForkRequest,
  pool: Pool,
  signal: AbortSignal,
): Promise<ForkParts> {
  const { images, forkStore, inject, registry } = context;
  const { shape, parent } = shapeOf(context, request);
  if (request.image !== null) await refuseBadStart(context, request.image);
  const isNewImage = request.image === null;
  const owner = isNewImage && parent !== null ? await registry.owner(parent.spec.name) : null;
  const set = isNewImage ? pool.claim(shape) : null;
  const image = request.image ?? set?.image ?? request.fork;
  let record: ForkRecord = {
    ...{ version: 1, request, image, state: 'preparing' },
    isWarm: set !== null,
    ...(owner?.incarnation === undefined ? {} : { incarnation: owner.incarnation }),
    ...{ clones: [], outcome: null, failure: null },
  };
  let made: WaitingSet | null = set;
  try {
    await forkStore.save(record);
    await inject.hit('agent:fork:prepare');
    if (isNewImage && parent !== null && request.parentMode === 'continue')
      await holdRoom(context, request.fork, parent);
    if (isNewImage && set === null) await images.create(newImage(context, image, shape), ramOfImage(shape, parent));
    made ??= await makeWaitingSet(context, images.get(image), shape, {
      fork: isNewImage ? image : request.fork,
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
    if (isNewImage) await images.delete(image);
    context.vms.room.release(request.fork);
    await forkStore.remove(request.fork);
    throw error;
  }
}

/** Promises the room that the image will take. From the commit on the image itself counts, with its full size. */
async function holdRoom({ vms }: ForkContext, fork: string, parent: ManagedVm): Promise<void> {
  const { sizeBytes, pageBytes } = parent.spec.memory;
  // The pages of a clone are in its image and in its process, so its image may need them all.
  const bytes = parent.image === null ? allocatedBytes(parent.regions) : sizeBytes;
  await vms.room.hold(fork, bytes, pageBytes);
}
