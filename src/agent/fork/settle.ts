/** Writes the records that follow from a committed fork. Idempotent: a restarted daemon does it again. */

import { toMigrationError } from '../../domain/errors.js';
import { inParallel } from '../../kit/parallel.js';
import { describeLayers } from '../image/start-check.js';
import { FORKED } from '../vm/keeper.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import type { ForkRecord } from './record.js';

const SETTLED_AT_ONCE = 16;

export interface SettledParts {
  readonly record: ForkRecord;
  readonly parent: ManagedVm | null;
  /** The clones that have run. The others wait for the go, and nothing is recorded of them. */
  readonly clones: readonly { readonly vm: ManagedVm }[];
  /** The pages come after the fork point. */
  readonly isFilled: boolean;
}

/** Records that clones have run, and when. */
export async function settleRun(context: ForkContext, parts: SettledParts): Promise<void> {
  const saving = saveReady(context, parts.record);
  const settling = settleCommitted(context, parts);
  await Promise.allSettled([saving, settling]);
  await settling;
  // From here on the image counts with its full size.
  context.vms.room.release(parts.record.request.fork);
}

async function settleCommitted(context: ForkContext, parts: SettledParts): Promise<void> {
  const { images, vms } = context;
  const { parent, clones, isFilled } = parts;
  const { image: id, request } = parts.record;
  // A complete image says what its disks are, so its layers come first.
  const describing = sealLayers(context, id).then(async () => {
    if (images.get(id).state === 'capturing') await images.update(id, { state: isFilled ? 'filling' : 'complete' });
  });
  // In parallel, because each step of the daemon waits for a processor beside guests that have just resumed.
  const settled = await inParallel(clones, SETTLED_AT_ONCE, async ({ vm }) => {
    const { name } = vm.spec;
    if (!vms.has(name) || vms.get(name) !== vm) return;
    if (vm.state === 'incoming') await vms.setState(name, 'running');
    // A private clone lacks pages, so no job may migrate it before it has them.
    if (request.memory === 'private' && vm.state !== 'stopped') await vms.reserve(name, request.job);
  });
  await describing;
  for (const outcome of settled) if ('error' in outcome) throw outcome.error;
  if (request.parentMode === 'stop' && parent !== null) {
    const { name } = parent.spec;
    if (vms.has(name) && vms.get(name) === parent && parent.state !== 'stopped') {
      // Its memory is the image's by now, so it must not write to it any more.
      await vms.stop(name, { isForced: true, reason: FORKED });
    }
  }
}

/** Records when the clones were ready. A failure is only logged, because only the report of a later daemon needs it. */
async function saveReady({ forkStore, log }: ForkContext, record: ForkRecord): Promise<void> {
  const failure = await forkStore.save(record).then(() => null, toMigrationError);
  const { fork } = record.request;
  if (failure !== null) log.warn({ fork, err: failure }, 'the fork record lacks when its clones were ready');
}

/** Records what the image's disks are (`describeLayers`). A failure is only logged, because the clones run. */
export async function sealLayers(context: ForkContext, id: string): Promise<void> {
  const failure = await describeLayers(context, id).catch(toMigrationError);
  if (failure !== null) context.log.error({ image: id, err: failure }, 'the disks of an image cannot be described');
}
