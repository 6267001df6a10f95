/**
 * What becomes of an image that is of no use any more, and of its clones.
 *
 * Gives up an image that can never be complete, because there is no space for it or one of its files has changed. Its
 * clones are ended: they would wait for ever for the missing pages, and must not read zeros instead. The parent
 * continues, unprotected, and the image's memory is freed. The image's record stays for users to see.
 */
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import { inParallel } from '../../kit/parallel.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import type { CaptureSession } from './pages/capture-session.js';
import { exitReasonOf } from './pages/failed-image.js';
import type { ForkRecord } from './record.js';

const ENDS_AT_ONCE = 16;

/** Errors that another attempt would meet again. */
const PERMANENT: ReadonlySet<ErrorCode> = new Set(['REGION_CHANGED', 'CORRUPT', 'NOT_FOUND', 'NO_SPACE', 'USAGE']);

export function isPermanent({ code }: MigrationError): boolean {
  return PERMANENT.has(code);
}

export function filesChanged(): MigrationError {
  return new MigrationError('REGION_CHANGED', 'the files of the image have changed');
}

export interface FailedFork {
  /** It includes the failure. */
  readonly record: ForkRecord;
  readonly parent: ManagedVm | null;
  readonly clones: readonly ManagedVm[];
  /** Null if what filled the image belonged to an earlier daemon. */
  readonly filling: Pick<CaptureSession, 'finish'> | null;
}

/** Idempotent, because a daemon may be killed in between. */
export async function giveUpImage(
  context: ForkContext,
  { record, parent, clones, filling }: FailedFork,
): Promise<void> {
  const { vms, images, forkStore, native, log } = context;
  const { image, failure } = record;
  const problem = failure === null ? {} : { problem: failure.message };
  log.error({ image, err: record.failure }, 'an image cannot be filled: its clones are ended');
  // If this write is lost, the next daemon meets the failure again.
  await forkStore.save(record).catch((error: unknown) => {
    const { fork } = record.request;
    log.error({ fork, image, err: toMigrationError(error) }, 'the failure cannot be written to the fork record');
  });
  const outcomes = await inParallel(clones, ENDS_AT_ONCE, async (vm) => {
    await vms.endClone(vm, failure === null ? 'stopped' : exitReasonOf(failure));
  });
  for (const outcome of outcomes) {
    if (!('error' in outcome)) continue;
    log.error(
      { image, err: toMigrationError(outcome.error) },
      'a clone of an image that cannot be filled cannot be ended',
    );
  }
  if (images.get(image).state !== 'failed') await images.update(image, { state: 'failed', ...problem });
  if (filling !== null) await filling.finish();
  else if (parent !== null && parent.memory !== null) await native.releaseVm(parent.memory);
  await images.dropMemory(image);
}

/**
 * Keeps an image with a page that is not what the host of the image has, once clones have seen it. It is never mended:
 * what a clone has computed from the page stays wrong. The clones stand still for good, to be looked at, until a user
 * ends them. Idempotent, because a daemon may be killed in between.
 */
export async function keepDamaged(
  { vms, images, forkStore, log }: ForkContext,
  { record, clones, filling }: FailedFork,
  damage: string,
): Promise<void> {
  const { image } = record;
  log.error({ image, damage }, 'the memory of clones is damaged: they stand still for good');
  const outcomes = await inParallel(clones, ENDS_AT_ONCE, (vm) =>
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
