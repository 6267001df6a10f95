/**
 * An image that can never be complete: no room for it, or a file that is not what it was. Its clones would wait for
 * ever for the pages it lacks (nobody reads zeros in their place), so they are ended. The parent runs on, unprotected,
 * and what the image held is given back; its record stays for people to see.
 */
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import { inParallel } from '../../kit/parallel.js';
import type { ManagedVm } from '../vm/vms.js';
import type { CaptureSession } from './capture-session.js';
import type { ForkContext } from './context.js';
import type { ForkRecord } from './record.js';

const ENDS_AT_ONCE = 16;

/** Errors of a file that another attempt would meet again. */
const LASTING: ReadonlySet<ErrorCode> = new Set(['REGION_CHANGED', 'CORRUPT', 'NOT_FOUND', 'NO_SPACE', 'USAGE']);

export function isLasting({ code }: MigrationError): boolean {
  return LASTING.has(code);
}

export function filesChanged(): MigrationError {
  return new MigrationError('REGION_CHANGED', 'the files of the image are not what they were');
}

export interface FailedFork {
  /** With its failure. */
  readonly record: ForkRecord;
  readonly parent: ManagedVm | null;
  readonly clones: readonly ManagedVm[];
  /** null: an earlier daemon had it. */
  readonly capture: CaptureSession | null;
}

/** Again as often as wanted: a daemon may be killed in between. */
export async function giveUpImage(
  context: ForkContext,
  { record, parent, clones, capture }: FailedFork,
): Promise<void> {
  const { vms, images, forkStore, native, log } = context;
  const { image } = record;
  log.error({ image, err: record.failure }, 'an image cannot be filled: its clones are ended');
  // A daemon that finds no such line meets the failure again.
  await forkStore.save(record).catch((error: unknown) => {
    log.error({ image, err: toMigrationError(error) }, 'that a fork has failed is not written down');
  });
  if (images.get(image).state !== 'failed') await images.update(image, { state: 'failed' });
  const outcomes = await inParallel(clones, ENDS_AT_ONCE, async (vm) => {
    const { name } = vm.spec;
    if (!vms.has(name) || vms.get(name) !== vm || vm.state === 'stopped') return;
    // It is a VM since the commit, whether its record says so yet or not.
    if (vm.state === 'incoming') await vms.setState(name, 'running');
    await vms.stop(name, { isForced: true });
  });
  for (const outcome of outcomes) {
    if (!('error' in outcome)) continue;
    log.error(
      { image, err: toMigrationError(outcome.error) },
      'a clone of an image that cannot be filled does not end',
    );
  }
  if (capture !== null) await capture.finish();
  else if (parent !== null && parent.memory !== null) await native.releaseVm(parent.memory);
  await images.dropMemory(image);
}
