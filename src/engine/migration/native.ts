/**
 * QEMU's own migration, for VMs whose RAM vmigrate cannot move. QEMU moves the memory; the engine still decides when
 * the owner changes and on which host the VM runs.
 */

import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { MODE_TRAITS } from '../../domain/migration.js';
import type { MigrationProgress } from '../../domain/progress.js';
import { pause, withDeadline } from '../deadline.js';
import { PollPace } from '../poll.js';
import { describeProgress, troubleOf } from '../progress.js';
import { noteAdvance, reportTrouble } from '../walk-context.js';
import type { Findings, StepContext, StepExecutor } from './context.js';
import { guestEndOf, lost } from './lost.js';

/** A post-copy of which nothing arrives for so long has lost its stream, even if no end of it has been told. */
const SILENT_MS = 20_000;

type NativeReading = Readonly<Record<string, number | string>>;

export const nativeStart: StepExecutor = {
  async forward(context) {
    const { record, ports, cancel } = context;
    const { vm, target, mode, bandwidthBytesPerS, downtimeMsMax } = record.plan.request;
    const watching = new AbortController();
    const moving = ports.source.nativeMigrate(vm, record.session, {
      target,
      isPostcopy: MODE_TRAITS[mode].fetches,
      bandwidthBytesPerS,
      downtimeMsMax,
    });
    void watch(context, AbortSignal.any([watching.signal, cancel]));
    try {
      await moving;
    } finally {
      watching.abort();
    }
    // QEMU stopped the source during the call. It knows how long ago, and is asked when the guest runs again (see
    // nativeFigures).
    context.marks.stoppedAtMs = ports.clock.nowMs();
    return undefined;
  },
  /** The undo also works after the migration has ended: then the source is stopped, and continueVm resumes it. */
  async undo({ record, ports }) {
    const { vm } = record.plan.request;
    await ports.source.nativeCancel(vm, record.session);
    await ports.source.continueVm(vm, record.session);
  },
};

export const nativeSwitchover: StepExecutor = {
  async forward({ record, ports }) {
    await ports.target.awaitLoaded(record.session);
    return undefined;
  },
  async undo() {
    // The undo of nativeStart resumes the source; that of prepareTarget discards the loaded state.
  },
};

/**
 * Asks QEMU for its figures up to the end of nativeStart: its share of the blackout, and figures of the report. If that
 * fails, the report goes without them.
 */
export async function nativeFigures(
  context: StepContext,
): Promise<Partial<Findings> & { readonly downtimeMs: number }> {
  if (MODE_TRAITS[context.record.plan.request.mode].mover === 'pager') return { downtimeMs: 0 };
  try {
    const reading = await read(context);
    return { ...figures(context, reading), downtimeMs: numberOf(reading, 'downtimeMs') };
  } catch (error) {
    context.observer.onWarning("the report lacks QEMU's own figures", error);
    return { downtimeMs: 0 };
  }
}

/**
 * Waits for the end of a native-postcopy migration. Both QEMUs must stay alive. Their stream goes through both daemons,
 * so the restart of one breaks it, as a cut of the network does; then both pause, and are connected again.
 */
export async function fetchRestNatively(context: StepContext): Promise<Partial<Findings>> {
  const { ports, limits, marks, halt, observer, record } = context;
  const pace = new PollPace(limits);
  let recoveredAtMs = Number.NEGATIVE_INFINITY;
  for (;;) {
    const asking = ports.target.progress(record.session);
    const target = await withDeadline(ports.clock, asking, limits.callMsMax, 'asking the target for progress');
    const guestEnd = guestEndOf(target);
    if (guestEnd !== null) return { guestEnd, pageBytes: record.spec.memory.pageBytes };
    if (target.state === 'gone') throw lost(context, target.hasRun, troubleOf(target, 'the target'));
    const reading = await read(context);
    const nowMs = ports.clock.nowMs();
    noteAdvance(context, numberOf(reading, 'ramTransferredBytes'), nowMs);
    const described = describe(context, reading);
    observer.onProgress(described);
    reportTrouble(context, null);
    if (reading.status === 'completed') return figures(context, reading);
    const hasPaused =
      reading.status === 'postcopy-paused' || nowMs - Math.max(marks.advancedAtMs, recoveredAtMs) > SILENT_MS;
    const trouble = hasPaused ? await recover(context) : null;
    if (hasPaused) reportTrouble(context, trouble);
    // A recovery that worked gets time, but not for ever if nothing comes of it.
    const isInVain = trouble !== null || (hasPaused && recoveredAtMs > marks.advancedAtMs);
    if (hasPaused && trouble === null) recoveredAtMs = ports.clock.nowMs();
    const quietMs = ports.clock.nowMs() - marks.advancedAtMs;
    if (reading.status === 'failed' || (isInVain && quietMs > limits.recoveryMsMax)) {
      throw new MigrationError('NEEDS_RECOVERY', `QEMU's own post-copy has stopped: ${reading.status ?? 'no status'}`, {
        remedy: 'each QEMU keeps its part of the VM, and the hosts connect them again; vmctl stop --force ends the VM',
        cause: trouble ?? reasonOf(reading) ?? troubleOf(target, 'the target'),
      });
    }
    await pause(ports.clock, pace.nextMs(described.secondsLeft), halt);
  }
}

/** Connects both QEMUs again. Returns why that has failed, or null. */
async function recover({ ports, record, limits }: StepContext): Promise<MigrationError | null> {
  const { vm, target } = record.plan.request;
  try {
    const recovering = ports.source.nativeRecover(vm, record.session, target);
    await withDeadline(ports.clock, recovering, limits.callMsMax, "connecting QEMU's post-copy again");
    return null;
  } catch (thrown) {
    return toMigrationError(thrown);
  }
}

async function watch(context: StepContext, signal: AbortSignal): Promise<void> {
  try {
    for (;;) {
      await pause(context.ports.clock, context.limits.pollMs, signal);
      const reading = await read(context);
      if (!signal.aborted) context.observer.onProgress(describe(context, reading));
    }
  } catch (thrown) {
    if (!signal.aborted)
      context.observer.onWarning(
        'the progress of the native migration cannot be read any more',
        toMigrationError(thrown),
      );
  }
}

async function read({ ports, limits, record }: StepContext): Promise<NativeReading> {
  const reading = ports.source.nativeProgress(record.plan.request.vm);
  return withDeadline(ports.clock, reading, limits.callMsMax, "reading QEMU's progress");
}

function figures(context: StepContext, reading: NativeReading): Partial<Findings> {
  return {
    pushBytes: numberOf(reading, 'ramTransferredBytes'),
    rounds: numberOf(reading, 'rounds'),
    pageBytes: context.record.spec.memory.pageBytes,
  };
}

function describe({ record }: StepContext, reading: NativeReading): MigrationProgress {
  const { pageBytes } = record.spec.memory;
  const totalBytes = numberOf(reading, 'ramTotalBytes');
  const leftBytes = numberOf(reading, 'ramRemainingBytes');
  return describeProgress({
    pagesTotal: Math.ceil(totalBytes / pageBytes),
    pagesDone: Math.floor(Math.max(0, totalBytes - leftBytes) / pageBytes),
    pageBytes,
    bytesLeft: leftBytes,
    bytesDone: numberOf(reading, 'ramTransferredBytes'),
    bytesPerS: numberOf(reading, 'bytesPerS'),
    faultCount: 0,
  });
}

/** Returns QEMU's error text as an error, if there is one. */
function reasonOf({ errorText }: NativeReading): MigrationError | undefined {
  return typeof errorText === 'string' ? new MigrationError('QEMU_FAILED', errorText) : undefined;
}

function numberOf(reading: NativeReading, key: string): number {
  const value = reading[key];
  return typeof value === 'number' && Number.isFinite(value) ? value : 0;
}
