import { MigrationError } from '../../domain/errors.js';
import { CLONES_MAX } from '../../domain/fork.js';
import type { PrepareForkRequest } from '../../engine/ports/fork.js';
import type { ImageRecord } from '../image/record.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import type { CloneShape } from './waiting-set.js';

export type ShapeRequest = Omit<PrepareForkRequest, 'fork' | 'job' | 'isPartialAllowed'>;

/** CONFLICT or UNSUPPORTED if this VM or image cannot be forked now. */
export function shapeOf(context: ForkContext, request: ShapeRequest): { shape: CloneShape; parent: ManagedVm | null } {
  const { images, vms } = context;
  const { cloneCount, namePrefix, parentMode, memory, network, disks } = request;
  if (!Number.isInteger(cloneCount) || cloneCount < 1 || cloneCount > CLONES_MAX) {
    throw new MigrationError('USAGE', `a fork has 1 to ${CLONES_MAX} clones`);
  }
  const common = { cloneCount, namePrefix, parentMode, memory, network, disks };
  if (request.image !== null) {
    const image = images.get(request.image);
    if (image.state !== 'complete') throw new MigrationError('CONFLICT', `image ${image.id} is ${image.state}`);
    return { shape: { ...common, parent: image.spec, accel: image.accel }, parent: null };
  }
  if (request.vm === null) throw new MigrationError('USAGE', 'a fork is of a VM or of an image');
  const parent = vms.get(request.vm);
  const { spec, state, accel } = parent;
  if (state !== 'running') throw new MigrationError('CONFLICT', `${spec.name} is ${state}`);
  const isClone = spec.memory.backing === 'image';
  if (isClone && parentMode === 'stop') {
    throw new MigrationError('UNSUPPORTED', `${spec.name} shares its memory with an image: it cannot become one`, {
      remedy: '--parent continue',
    });
  }
  if (spec.memory.backing === 'private') {
    throw new MigrationError('UNSUPPORTED', `the memory of ${spec.name} is not in files of its own`, {
      remedy: 'fork a VM that was run with memory.backing "shared"',
    });
  }
  if (parentMode === 'continue' && parent.memory === null) {
    throw new MigrationError('UNSUPPORTED', `${spec.name} runs without the preload: its writes cannot be held back`, {
      remedy: '--parent stop, or run the VM with preload: true',
    });
  }
  const filling = images.all().find((image) => image.state === 'filling' && image.spec.name === spec.name);
  if (filling !== undefined) {
    throw new MigrationError('VM_BUSY', `image ${filling.id} of ${spec.name} is still being filled`);
  }
  return { shape: { ...common, parent: spec, accel }, parent };
}

export function newImage(context: ForkContext, id: string, shape: CloneShape): ImageRecord {
  return {
    version: 1,
    id,
    state: 'capturing',
    parentMode: shape.parentMode,
    // Memory files of the image's own, whatever the parent had.
    spec: { ...shape.parent, memory: { ...shape.parent.memory, backing: 'shared' } },
    accel: shape.accel,
    qemuVersion: context.vms.get(shape.parent.name).qemuVersion,
    deviceStateBytes: 0,
    disks: shape.parent.disks.map(({ id: disk, path, format }) => ({ id: disk, path, format })),
    overlays: [],
    createdAt: context.clock.isoNow(),
  };
}

/** The parent's own files where it stays stopped: they are the image. */
export function ramOfImage(shape: CloneShape, parent: ManagedVm | null): ManagedVm['regions'] | null {
  return shape.parentMode === 'stop' && parent !== null ? parent.regions : null;
}
