/**
 * What becomes of an image with a page that is not what the host of the image has, once clones have seen it. It is
 * never mended: what a clone has computed from the page stays wrong. The clones stand still for good, to be looked at,
 * until a user ends them.
 */
import { toMigrationError } from '../../../domain/errors.js';
import { inParallel } from '../../../kit/parallel.js';
import type { ForkContext } from '../context.js';
import type { FailedFork } from '../unfillable.js';

const CLONES_AT_ONCE = 16;

/** Idempotent, because a daemon may be killed in between. */
export async function keepDamaged(
  { vms, images, forkStore, log }: ForkContext,
  { record, clones, filling }: FailedFork,
  damage: string,
): Promise<void> {
  const { image } = record;
  log.error({ image, damage }, 'the memory of clones is damaged: they stand still for good');
  const outcomes = await inParallel(clones, CLONES_AT_ONCE, (vm) =>
    vm.hasRun ? vms.markDamaged(vm, damage) : vms.endClone(vm, 'stopped'),
  );
  for (const outcome of outcomes) {
    if ('error' in outcome) log.error({ image, err: toMigrationError(outcome.error) }, 'a damaged clone runs on');
  }
  // If one of these writes is lost, the next daemon finds the page again.
  await forkStore.save(record);
  await images.update(image, { state: 'failed', problem: damage });
  await filling?.finish();
}
