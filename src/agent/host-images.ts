/** Implements ImagesPort on this host, beside the calls that only its own users make. */
import { toMigrationError } from '../domain/errors.js';
import type { VmIdentity } from '../domain/host.js';
import type { ImageRemoval, ImageView } from '../domain/image.js';
import type { VmView } from '../domain/vm.js';
import type { ImagesPort, RemoveImageOptions, StoppedVms } from '../engine/ports/images.js';
import { inParallel } from '../kit/parallel.js';
import { Images } from './fork/image-calls.js';
import type { UserVms } from './user-vms.js';

/** How many VMs are ended at the same time. */
const STOPS_MAX = 16;

export class HostImages extends Images implements ImagesPort {
  readonly #vms: UserVms;

  constructor(vms: UserVms, ...rest: ConstructorParameters<typeof Images>) {
    super(...rest);
    this.#vms = vms;
  }

  async imageViews(image: string | null): Promise<{ images: ImageView[] }> {
    return { images: this.list().filter(({ id }) => image === null || id === image) };
  }

  async imageClones(image: string): Promise<{ clones: VmView[] }> {
    return { clones: this.#vms.list().filter((vm) => vm.image === image) };
  }

  stopClones(clones: readonly VmIdentity[], isForced: boolean): Promise<StoppedVms> {
    return stopEach(this.#vms, clones, isForced);
  }

  removeImage(image: string, options: RemoveImageOptions): Promise<ImageRemoval> {
    return this.remove(image, options);
  }
}

/** Ends those of the VMs that are among `vms`. One that cannot be ended is reported; the others end all the same. */
export async function stopEach(
  vms: Pick<UserVms, 'list' | 'stop'>,
  asked: readonly VmIdentity[],
  isForced: boolean,
): Promise<StoppedVms> {
  const uuids = new Map(vms.list().map(({ name, uuid }) => [name, uuid]));
  const here = asked.filter(({ name, uuid }) => uuids.get(name) === uuid);
  const outcomes = await inParallel(here, STOPS_MAX, ({ name }) => vms.stop(name, { isForced, gracefulMs: 0 }));
  const stopped: string[] = [];
  const failures: { name: string; error: unknown }[] = [];
  for (const [index, { name }] of here.entries()) {
    const outcome = outcomes[index];
    const error = outcome !== undefined && 'error' in outcome ? toMigrationError(outcome.error) : null;
    // NOT_FOUND: the VM has ended and was removed since it was listed.
    if (error === null || error.code === 'NOT_FOUND') stopped.push(name);
    else failures.push({ name, error: error.toJSON() });
  }
  return { stopped, failures };
}
