/**
 * Starts one VM: region files, taps, the preload's socket, the process. Everything it makes is named in the VM's record
 * beforehand or has a fixed path. So VmManager can undo an interrupted start, also after a crash, without knowing how
 * far it came.
 */

import { chmod, chown, mkdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { Container } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import { deferred } from '../../kit/deferred.js';
import { failureToError } from '../../native/binding.js';
import type { NativeBinding, VmMemoryHandle, VmMemorySnapshot } from '../../native/types.js';
import type { VmCgroups } from '../contain/cgroups.js';
import { mountNamespaceOf } from '../contain/processes.js';
import { createTaps, inNamespace, isIsolated, joinIsolated } from './network.js';
import { setOomScore } from './oom-score.js';
import { resetChildPriority } from './priority.js';
import { createRegionFiles } from './ram-files.js';
import type { RamPlace } from './ram-place.js';
import type { Vm } from './vm.js';

/** A cold start takes 50 ms. The limit allows for a machine that is busy with hundreds of starts. */
const START_TIMEOUT_MS = 30_000;
/** One userfaultfd serves some 150 000 faults a second. More than a few readers only compete for the processors. */
const SYNC_DESCRIPTORS_MAX = 4;
/** The group may make files, and nobody removes those of others (sticky). */
const SOCKET_DIRECTORY_MODE = 0o1770;

export interface LaunchOptions {
  readonly place: RamPlace;
  readonly native: NativeBinding | null;
  /** Null: start without the preload. */
  readonly preloadPath: string | null;
  /** The library by which a contained process makes userfaultfds of its own. Null: there is none, or no need. */
  readonly postcopyLibrary: string | null;
  readonly isIncoming: boolean;
  /** If true, missing pages of the regions raise faults from the first mapping on. Default: as isIncoming. */
  readonly isRegistered?: boolean;
  /** For a clone: the file that its device state will come from. */
  readonly statePath?: string;
  /** The cgroups of the VM, if it is contained. */
  readonly cgroups: VmCgroups;
  /** For a clone: the sockets of the disks that another host serves, by the disk's id. */
  readonly diskSockets?: Readonly<Record<string, string>>;
}

/**
 * Resolves when QEMU is connected and has mapped all regions (and registered them if it is incoming). No vCPU has run
 * yet. Throws QEMU_FAILED with QEMU's own message if QEMU exits.
 */
export async function launch(vm: Vm, options: LaunchOptions): Promise<void> {
  await createRegionFiles(options.place, vm.spec, vm.regions, options.native);
  await createTaps(vm.spec, vm.record.taps, vm.record.qemuUid ?? null);
  const container = await makeContainer(vm, options);
  if (vm.start.signal.aborted) throw startCancelled(vm);
  const preload = listen(vm, options);
  const started = await vm.process.launch({
    spec: vm.spec,
    accel: vm.accel,
    ramPaths: vm.regions.map((region) => region.path),
    taps: vm.record.taps,
    isIncoming: options.isIncoming,
    ...(options.statePath === undefined ? {} : { statePath: options.statePath }),
    ...(options.diskSockets === undefined ? {} : { diskSockets: options.diskSockets }),
    container,
    environment: preload.environment,
    enclose: (command) => inNamespace(vm.spec, command),
    onSpawned: (pid) => {
      resetChildPriority(pid);
      setOomScore(pid, vm.spec);
    },
  });
  vm.exited = started.exited;
  await vm.update({ process: started.identity });
  await started.ready(preload.complete, vm.start.signal);
  await joinIsolated(vm.spec, vm.record.taps, started.identity.pid);
  const memory = vm.memory?.snapshot() ?? null;
  await vm.update({
    ...(container === null ? {} : { mountNamespace: mountNamespaceOf(started.identity.pid) }),
    ...(memory === null ? {} : { memory: withoutFailure(memory) }),
  });
}

function withoutFailure({ state, pid, descriptors, ranges }: VmMemorySnapshot): VmMemorySnapshot {
  return { state, pid, descriptors, ranges };
}

/** Makes what a contained process needs, and its directory for sockets. */
async function makeContainer(
  vm: Vm,
  { cgroups, postcopyLibrary, diskSockets = {} }: LaunchOptions,
): Promise<Container | null> {
  const { spec, place } = vm;
  const { qemuUid: uid, taps } = vm.record;
  if (uid === undefined) return null;
  await mkdir(place.socketDirectory, { mode: 0o700 });
  // The process makes its sockets beside those of the daemon, and cannot replace them.
  await chown(place.socketDirectory, 0, uid);
  await chmod(place.socketDirectory, SOCKET_DIRECTORY_MODE);
  return {
    uid,
    cgroups: await cgroups.make(spec.name),
    hasPostcopy: postcopyLibrary !== null,
    taps: isIsolated(spec) ? Object.values(taps) : [],
    socketDirectories: [...new Set(Object.values(diskSockets).map(dirname))],
  };
}

function startCancelled(vm: Vm): MigrationError {
  return new MigrationError('CANCELLED', `the start of ${vm.spec.name} was cancelled`);
}

interface PreloadWait {
  readonly environment: Record<string, string>;
  readonly complete: (signal: AbortSignal) => Promise<void>;
}

function listen(vm: Vm, options: LaunchOptions): PreloadWait {
  if (options.preloadPath === null) {
    const { postcopyLibrary: library } = options;
    return { environment: library === null ? {} : { LD_PRELOAD: library }, complete: () => Promise.resolve() };
  }
  if (options.native === null) {
    throw new MigrationError('UNSUPPORTED', 'the native addon is not built, and the preload needs it', {
      remedy: 'build the native addon, or set preload: false in the VM spec',
    });
  }
  const socketPath = join(vm.place.socketDirectory, 'preload.sock');
  const settled = deferred<void>();
  settled.promise.catch(() => undefined);
  let memory: VmMemoryHandle | null = null;
  const look = () => {
    // onEdge may still be called after the handle has been closed.
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
    socketPath,
    regions: vm.regions,
    isIncoming: options.isRegistered ?? options.isIncoming,
    ...(vm.record.qemuUid === undefined ? {} : { peerUid: vm.record.qemuUid }),
    onEdge: look,
  });
  vm.memory = memory;
  return {
    environment: {
      LD_PRELOAD: options.preloadPath,
      VMIGRATE_PRELOAD_SOCKET: socketPath,
      VMIGRATE_PRELOAD_FILES: vm.regions.map((region) => region.path).join('\n'),
      ...(vm.regions.some(({ isPrivate }) => isPrivate === true) ? { VMIGRATE_PRELOAD_PRIVATE: '1' } : {}),
      VMIGRATE_PRELOAD_SYNC_FDS: String(Math.min(vm.spec.cpus, SYNC_DESCRIPTORS_MAX)),
    },
    complete: async (signal) => {
      const late = () =>
        settled.reject(new MigrationError('TIMEOUT', `the preload of ${vm.spec.name} has not reported all regions`));
      const onAbort = () => settled.reject(startCancelled(vm));
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
