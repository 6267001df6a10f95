/**
 * Creates a VM and starts its process. The VM's record and directory are durable before anything else of it is made.
 */
import { constants } from 'node:fs';
import { access, mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { VmBackend } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import { makeDirectoryDurably } from '../../durable/durable-file.js';
import { type LaunchOptions, launch } from './launch.js';
import { tapNames } from './network.js';
import type { VmManagerOptions } from './options.js';
import { regionFiles } from './ram-files.js';
import type { RamPlace } from './ram-place.js';
import type { IdentityDue, VmRecord } from './record.js';
import { Vm } from './vm.js';

export interface VmStart extends Pick<VmRecord, 'state' | 'epoch' | 'accel' | 'session'> {
  /** The image of a clone. Absent for any other VM. */
  readonly image?: string;
  readonly identityDue?: IdentityDue;
  /** Absent: the process has the daemon's user. */
  readonly qemuUid?: number;
}

/** Creates the record in `directory`/NAME and removes what was there. The caller has checked that the name is free. */
export async function createVm(
  directory: string,
  input: VmSpec,
  start: VmStart,
  context: { place: RamPlace; backend: VmBackend },
): Promise<Vm> {
  const { place, backend } = context;
  const spec: VmSpec = { ...input, machine: await backend.resolveMachine(input.machine) };
  const image = start.image ?? null;
  const record: VmRecord = {
    version: 1,
    spec,
    ...start,
    image,
    qemuVersion: (await backend.installed()).version,
    job: null,
    process: null,
    regions: await regionFiles(place, spec, image),
    memory: null,
    taps: tapNames(place.host, spec),
    identityDue: start.identityDue ?? null,
    exit: null,
    exitCodeBefore: null,
    createdAt: new Date().toISOString(),
  };
  const vm = new Vm(join(directory, spec.name), record, backend);
  backend.checkPlace(vm.place);
  await rm(vm.directory, { recursive: true, force: true });
  // Like its record, the directory of a waiting clone need not survive a crash of the machine.
  await (image !== null && start.state === 'incoming'
    ? mkdir(vm.directory, { mode: 0o700 })
    : makeDirectoryDurably(vm.directory));
  await vm.update({});
  return vm;
}

export interface BringUpOptions
  extends Pick<LaunchOptions, 'isIncoming' | 'isRegistered' | 'statePath' | 'diskSockets' | 'cgroups'> {
  /** Default: the value in the spec. */
  readonly hasPreload?: boolean;
}

export async function bringUp(
  vm: Vm,
  { hasPreload = vm.spec.hasPreload, ...launchOptions }: BringUpOptions,
  manager: VmManagerOptions,
  place: RamPlace,
): Promise<void> {
  const isContained = vm.record.qemuUid !== undefined;
  const isPreloaded = hasPreload && vm.regions.length > 0;
  if (isPreloaded && manager.preloadPath === null) {
    throw new MigrationError('UNSUPPORTED', 'this daemon has no preload library', {
      remedy: 'build the preload library, or set preload: false in the VM spec',
    });
  }
  if (isPreloaded && manager.preloadPath !== null) await checkPreload(manager.preloadPath);
  await launch(vm, {
    ...launchOptions,
    place,
    native: manager.native,
    preloadPath: isPreloaded ? manager.preloadPath : null,
    postcopyLibrary: isContained && !isPreloaded && launchOptions.isIncoming ? manager.preloadPath : null,
  });
}

/** Without this check QEMU would start without the library, and the daemon would wait for it until its time limit. */
async function checkPreload(path: string): Promise<void> {
  await access(path, constants.R_OK).catch((cause: unknown) => {
    throw new MigrationError('UNSUPPORTED', `the preload library ${path} is missing`, {
      remedy: 'install or build vmigrate again on this host, then restart vmigrated',
      cause,
    });
  });
}
