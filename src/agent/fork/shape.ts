import { MigrationError } from '../../domain/errors.js';
import { CLONES_MAX } from '../../domain/fork.js';
import type { ForkOrigin, PrepareForkRequest } from '../../engine/ports/fork.js';
import { refuseDisks, servedOf } from '../image/join-disks.js';
import type { ImageRecord } from '../image/record.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { servedDisk } from './parent-disks.js';
import type { CloneShape } from './waiting-set.js';

export type ShapeRequest = Omit<PrepareForkRequest, 'fork' | 'job' | 'isPartialAllowed'>;

/** Throws CONFLICT, VM_BUSY or UNSUPPORTED if this VM or image cannot be forked now. */
export function shapeOf(context: ForkContext, request: ShapeRequest): { shape: CloneShape; parent: ManagedVm | null } {
  const { images, vms } = context;
  const { cloneCount, namePrefix, parentMode, memory, network, disks } = request;
  // An image is brought to another host by a fork without clones.
  const min = request.image === null && request.origin === undefined ? 1 : 0;
  if (!Number.isInteger(cloneCount) || cloneCount < min || cloneCount > CLONES_MAX) {
    throw new MigrationError('USAGE', `the clone count of a fork must be ${min}-${CLONES_MAX}`);
  }
  const common = { cloneCount, namePrefix, parentMode, memory, network, disks };
  const { share, origin } = request;
  const own = share === undefined ? {} : { share };
  if (share !== undefined && share.first + share.count > cloneCount) {
    throw new MigrationError('USAGE', `a fork of ${cloneCount} clones has no clone ${share.first + share.count - 1}`);
  }
  if (origin !== undefined) {
    refuseDisks(context, origin);
    if (request.fetch === 'demand' && memory === 'private') {
      throw new MigrationError('UNSUPPORTED', 'clones with private memory are filled from the whole image', {
        remedy: 'use copy-on-write clones, or read the whole image',
      });
    }
    // Its pages come while the clones run, whether or not the parent does.
    return {
      shape: { ...common, ...own, parentMode: 'continue', parent: origin.spec, accel: origin.accel },
      parent: null,
    };
  }
  if (request.image !== null) {
    const image = images.get(request.image);
    if (image.state !== 'complete') throw new MigrationError('CONFLICT', `image ${image.id} is ${image.state}`);
    return { shape: { ...common, ...own, parent: image.spec, accel: image.accel }, parent: null };
  }
  if (request.vm === null) throw new MigrationError('USAGE', 'a fork needs the name of a VM or the id of an image');
  const parent = vms.get(request.vm);
  const { spec, state, accel } = parent;
  if (state !== 'running') throw new MigrationError('CONFLICT', `${spec.name} is ${state}`);
  const isClone = spec.memory.backing === 'image';
  if (isClone && parentMode === 'stop') {
    throw new MigrationError('UNSUPPORTED', `${spec.name} shares its memory with an image: it cannot be an image`, {
      remedy: 'use --parent continue',
    });
  }
  const served = spec.disks.find((disk) => disk.served !== undefined);
  if (served !== undefined) throw new MigrationError('UNSUPPORTED', servedDisk(spec, served));
  if (spec.memory.backing === 'private') {
    throw new MigrationError('UNSUPPORTED', `${spec.name} has private memory, which no clone can share`, {
      remedy: 'fork a VM that was run with memory.backing "shared"',
    });
  }
  if (parentMode === 'continue' && parent.memory === null) {
    throw new MigrationError('UNSUPPORTED', `${spec.name} runs without the preload: its writes cannot be intercepted`, {
      remedy: 'use --parent stop, or run the VM with preload: true',
    });
  }
  const filling = fillingImageOf(context, parent);
  if (filling !== undefined) {
    throw new MigrationError('VM_BUSY', `image ${filling.id} of ${spec.name} is still being filled`);
  }
  return { shape: { ...common, ...own, parent: spec, accel }, parent };
}

/** A VM cannot be forked while its image is filled, nor while the one that it runs on is: missing pages are holes. */
export function fillingImageOf({ images }: ForkContext, { spec, image }: ManagedVm): ImageRecord | undefined {
  const isItsOwn = ({ id, spec: parent }: ImageRecord) => id === image || parent.name === spec.name;
  return images.all().find((record) => record.state === 'filling' && isItsOwn(record));
}

/** `qemuVersion`: of the parent. */
export function newImage(
  context: ForkContext,
  id: string,
  shape: CloneShape,
  { qemuVersion, origin }: { qemuVersion: string; origin?: ForkOrigin | undefined },
): ImageRecord {
  return {
    version: 1,
    id,
    state: 'capturing',
    parentMode: shape.parentMode,
    // The image has memory files of its own, whatever the parent's backing is.
    spec: { ...shape.parent, memory: { ...shape.parent.memory, backing: 'shared' } },
    accel: shape.accel,
    qemuVersion,
    deviceStateBytes: 0,
    disks: shape.parent.disks.map(({ id: disk, path, format }) => ({ id: disk, path, format })),
    overlays: [],
    ...servedOf(origin),
    ...(origin === undefined ? {} : { isChecked: false, from: origin.host }),
    createdAt: context.clock.isoNow(),
  };
}

/** Returns the parent's own memory files if it stays stopped, because they become the image. Otherwise null. */
export function ramOfImage(shape: CloneShape, parent: ManagedVm | null): ManagedVm['regions'] | null {
  return shape.parentMode === 'stop' && parent !== null ? parent.regions : null;
}
