/**
 * The steps from the VM's last instruction on the source to its first on the target. Every await here adds to the
 * blackout, so everything that can be awaited elsewhere is.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { tracksWrites } from '../../domain/migration.js';
import type { Clock } from '../ports/clock.js';
import type { StepContext, StepExecutor } from './context.js';
import { guestEndOf, lost } from './lost.js';
import { nativeFigures } from './native.js';

const US_PER_MS = 1e3;
/** How long the target may take to say why its QEMU has not loaded the state. */
const TARGETS_REASON_MS = 400;

export const stopSource: StepExecutor = {
  async forward(context) {
    const { record, ports } = context;
    const { vm, mode } = record.plan.request;
    const { stoppedAtUs, stoppedForMs, dirty } = await ports.source.stop(vm, record.session);
    context.marks.stoppedAtMs = ports.clock.nowMs() - stoppedForMs;
    if (!tracksWrites(mode)) return { stoppedAtUs };
    if (dirty === undefined)
      throw new MigrationError('INTERNAL', `nobody knows which pages ${vm} has written since they were fetched`);
    const { left } = context;
    if (left !== null) context.left = { ...left, bytes: left.bytes + dirty.dirtyPages * left.pageBytes };
    return { stoppedAtUs, rounds: dirty.round };
  },
  /** When a migration fails, resuming the source matters most to the guest. Nothing on the target is awaited before. */
  async undo({ record, ports }) {
    await ports.source.continueVm(record.plan.request.vm, record.session);
  },
};

export const transferState: StepExecutor = {
  async forward({ record, ports, findings }) {
    const transferred = ports.source.transferState(record.plan.request.vm, record.session, record.plan.request.target);
    // The rounds are counted from 1, so their number is that of the last one.
    const loaded = tracksWrites(record.plan.request.mode)
      ? ports.target.awaitLoaded(record.session, findings.rounds)
      : ports.target.awaitLoaded(record.session);
    try {
      const [{ deviceStateBytes }] = await Promise.all([transferred, loaded]);
      return { deviceStateBytes };
    } catch (error) {
      throw await withTargetsReason(toMigrationError(error), loaded, ports.clock);
    }
  },
  async undo() {
    // Source: continueVm ends a transfer under way. Target: discarding the session removes the loaded state.
  },
};

/**
 * If the target's QEMU refuses the state, the source often notices first, and knows nothing but that its stream has
 * ended. The target's reason becomes the cause. The VM is stopped meanwhile, so little time is given to it.
 */
async function withTargetsReason(failed: MigrationError, loaded: Promise<void>, clock: Clock): Promise<MigrationError> {
  const over = new AbortController();
  const reason = await Promise.race([
    loaded.then(
      () => null,
      (thrown: unknown) => toMigrationError(thrown),
    ),
    clock.sleep(TARGETS_REASON_MS, over.signal).then(() => null),
  ]);
  over.abort();
  if (reason === null || reason === failed || reason.message === failed.message) return failed;
  return new MigrationError(failed.code, failed.message, {
    ...(failed.remedy === undefined ? {} : { remedy: failed.remedy }),
    isRetryable: failed.isRetryable,
    details: failed.details,
    cause: reason,
  });
}

export const commit: StepExecutor = {
  async forward({ record, ports }) {
    const { vm, target } = record.plan.request;
    await ports.registry.swapOwner(vm, record.epoch, {
      vm,
      owner: target,
      epoch: record.epoch + 1,
      session: record.session,
      ...(record.incarnation === undefined ? {} : { incarnation: record.incarnation }),
    });
    return undefined;
  },
  async undo() {
    // Runs only if the swap has not taken effect, so the record still names the source.
  },
};

export const resumeTarget: StepExecutor = {
  async forward(context) {
    const { record, ports } = context;
    let resumedAtUs: number;
    try {
      ({ resumedAtUs } = await ports.target.resume(record.session, record.epoch + 1));
    } catch (thrown) {
      // QEMU may have died before this resume, or after an earlier one whose answer was lost. Only the session knows.
      const error = toMigrationError(thrown);
      if (error.code !== 'QEMU_GONE') throw error;
      const progress = await ports.target.progress(record.session);
      // An earlier resume has run the guest, which has ended by itself since. The next step finds out how.
      if (guestEndOf(progress) === null) throw lost(context, progress.hasRun, error);
      resumedAtUs = Date.parse(ports.clock.isoNow()) * US_PER_MS;
    }
    const blackoutMs = sinceStop(context);
    const { downtimeMs, ...figures } = await nativeFigures(context);
    return { ...figures, resumedAtUs, blackoutMs: blackoutMs + downtimeMs };
  },
  /**
   * Only after the VM was lost: the target forgets the session. While its QEMU still waits for pages that never come,
   * the target refuses that; it is asked again until a user has ended the VM there.
   */
  async undo({ record, ports }) {
    try {
      await ports.target.finish(record.session);
    } catch (thrown) {
      const error = toMigrationError(thrown);
      if (error.code !== 'CONFLICT') throw error;
      throw new MigrationError('VM_BUSY', error.message, { isRetryable: true, cause: error });
    }
  },
};

/** Returns the time since the stop, by the wall clock if an earlier life of the daemon stopped the VM. */
function sinceStop({ ports, marks, findings }: StepContext): number {
  if (marks.stoppedAtMs !== null) return ports.clock.nowMs() - marks.stoppedAtMs;
  if (findings.stoppedAt === null) return 0;
  return Math.max(0, Date.parse(ports.clock.isoNow()) - Date.parse(findings.stoppedAt));
}
