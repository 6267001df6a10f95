/**
 * Brings the QEMU of one VM up: region files, taps, the preload's socket, the process, QMP. Everything it makes is
 * named in the VM's record beforehand or lies at a fixed place, so that whoever undoes it (VmManager, also after a
 * crash) needs no memory of how far it came.
 */

import { qemuArguments } from '../../backends/qemu/command-line.js';
import { QmpClient } from '../../backends/qemu/qmp.js';
import { MigrationError } from '../../domain/errors.js';
import { deferred } from '../../kit/deferred.js';
import { outputTail, startDetached } from '../../kit/process.js';
import { failureToError } from '../../native/binding.js';
import type { NativeBinding, VmMemoryHandle } from '../../native/types.js';
import { createTaps, inItsNetwork, joinIsolated } from './network.js';
import { checkRoom, createRegionFiles, type RamPlace } from './ram-files.js';
import type { Vm } from './vm.js';

/** A cold start takes 50 ms; this is for a machine that is busy with hundreds of them. */
const START_TIMEOUT_MS = 30_000;
/** One userfaultfd serves some 150 000 faults a second; more than a few readers only compete for the processors. */
const SYNC_DESCRIPTORS_MAX = 4;

export interface LaunchOptions {
  readonly place: RamPlace;
  readonly program: string;
  readonly native: NativeBinding | null;
  /** null: start without the preload. */
  readonly preloadPath: string | null;
  readonly isIncoming: boolean;
  /** Pages that are missing in the regions raise faults from the first mapping on. Default: as isIncoming. */
  readonly isRegistered?: boolean;
  /** Files that QEMU finds open for reading, as descriptors 3 and up. */
  readonly inputPaths?: readonly string[];
}

/**
 * QMP answers, all regions are mapped (and, incoming, registered), no vCPU has run. QEMU_FAILED with QEMU's own words
 * if it gave up.
 */
export async function launch(vm: Vm, options: LaunchOptions): Promise<void> {
  await checkRoom(options.place, vm.spec);
  await createRegionFiles(options.place, vm.spec, vm.regions, options.native);
  await createTaps(vm.spec, vm.record.taps);
  if (vm.start.signal.aborted) throw new MigrationError('CANCELLED', 'the start was given up');
  const preload = listen(vm, options);
  const { program, args, environment } = inItsNetwork(vm.spec, {
    program: options.program,
    args: commandLine(vm, options.isIncoming),
    environment: preload.environment,
  });
  const started = await startDetached(program, args, {
    outputPath: vm.paths.output,
    directory: vm.directory,
    environment,
    inputPaths: options.inputPaths ?? [],
  });
  vm.exited = started.exited;
  await vm.update({ process: started.identity });
  const giveUp = new AbortController();
  const signal = AbortSignal.any([giveUp.signal, vm.start.signal]);
  const died = started.exited.then(async (exit) => {
    giveUp.abort();
    const tail = await outputTail(vm.paths.output);
    const how = exit.signal === null ? `with exit code ${exit.code}` : `by ${exit.signal}`;
    throw new MigrationError('QEMU_FAILED', `QEMU ended ${how} while starting: ${tail}`, { details: { output: tail } });
  });
  const ready = (async () => {
    // QEMU makes its sockets before its memory, so that with a preload nobody has to try until one is there.
    await preload.complete(signal);
    vm.client = await QmpClient.connect(vm.paths.qmp, { timeoutMs: START_TIMEOUT_MS, signal, isRetrying: true });
  })();
  // QMP also ends when QEMU does, and sooner: QEMU's own words are the better reason.
  const orReason = ready.catch(async (error: unknown) => {
    const isOver = error instanceof MigrationError && (error.code === 'QEMU_GONE' || giveUp.signal.aborted);
    if (isOver) await Promise.race([died, new Promise((resolve) => setTimeout(resolve, 1000))]);
    throw error;
  });
  died.catch(() => undefined);
  await Promise.race([orReason, died]);
  await joinIsolated(vm.spec, vm.record.taps, started.identity.pid);
  if (vm.memory !== null) {
    const { state, pid, descriptors, ranges } = vm.memory.snapshot();
    await vm.update({ memory: { state, pid, descriptors, ranges } });
  }
}

/** The command line that this VM's QEMU has. */
export function commandLine(vm: Vm, isIncoming: boolean): string[] {
  return qemuArguments(vm.spec, {
    accel: vm.accel,
    qmpPath: vm.paths.qmp,
    monitorPath: vm.paths.monitor,
    serialPath: vm.paths.serial,
    serialLogPath: vm.paths.serialLog,
    exitPath: vm.paths.exit,
    agentPath: vm.paths.agent,
    ramPaths: vm.regions.map((region) => region.path),
    taps: vm.record.taps,
    isIncoming,
  });
}

interface PreloadWait {
  readonly environment: Record<string, string>;
  complete(signal: AbortSignal): Promise<void>;
}

function listen(vm: Vm, options: LaunchOptions): PreloadWait {
  if (options.preloadPath === null) return { environment: {}, complete: () => Promise.resolve() };
  if (options.native === null) {
    throw new MigrationError('UNSUPPORTED', 'the native addon is not built, and the preload needs it', {
      remedy: 'build it, or set preload: false in the VM spec',
    });
  }
  const settled = deferred<void>();
  settled.promise.catch(() => undefined);
  let memory: VmMemoryHandle | null = null;
  const look = () => {
    // An edge may still come after the handle has been closed.
    if (memory === null || vm.memory !== memory) return;
    const { state, failure } = memory.snapshot();
    if (state === 'complete') settled.resolve();
    else if (state === 'refused') {
      const what = `the preload of ${vm.spec.name}`;
      settled.reject(
        failure ? failureToError(failure, what) : new MigrationError('NATIVE_FAILED', `${what} was refused`),
      );
    } else if (state === 'gone') settled.reject(vm.gone());
  };
  memory = options.native.listenForVm({
    socketPath: vm.paths.preload,
    regions: vm.regions,
    isIncoming: options.isRegistered ?? options.isIncoming,
    onEdge: look,
  });
  vm.memory = memory;
  return {
    environment: {
      LD_PRELOAD: options.preloadPath,
      VMIGRATE_PRELOAD_SOCKET: vm.paths.preload,
      VMIGRATE_PRELOAD_FILES: vm.regions.map((region) => region.path).join('\n'),
      ...(vm.regions.some(({ isPrivate }) => isPrivate === true) ? { VMIGRATE_PRELOAD_PRIVATE: '1' } : {}),
      VMIGRATE_PRELOAD_SYNC_FDS: String(Math.min(vm.spec.cpus, SYNC_DESCRIPTORS_MAX)),
    },
    complete: async (signal) => {
      const late = () => settled.reject(new MigrationError('TIMEOUT', 'the preload has not reported all regions'));
      const onAbort = () => settled.reject(new MigrationError('CANCELLED', 'the start was given up'));
      const timer = setTimeout(late, START_TIMEOUT_MS);
      signal.addEventListener('abort', onAbort, { once: true });
      if (signal.aborted) onAbort();
      look();
      try {
        await settled.promise;
      } finally {
        clearTimeout(timer);
        signal.removeEventListener('abort', onAbort);
      }
    },
  };
}
