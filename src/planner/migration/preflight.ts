/**
 * Checks a migration before anything is changed. It is pure and never throws, whatever a peer's inventory says: a
 * figure that is not a number counts as "not enough". It returns all reasons at once, so that a person can repair them
 * together.
 */

import type { HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import { type MigrationRequest, MODE_TRAITS } from '../../domain/migration.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';
import type { DiskSpec } from '../../domain/vm.js';
import { inJob, notRunning } from '../busy.js';
import { availableMib, describeBytes, neededMib } from '../bytes.js';
import { checkLimits, checkState } from '../limits.js';
import {
  checkBootFiles,
  checkBridges,
  checkPeers,
  checkPolicy,
  checkQemu,
  isFileReadable,
  type QemuNeeds,
} from '../target-host.js';
import { checkClone } from './clone-preflight.js';
import { checkDowntime } from './downtime.js';
import type { PreflightFacts, TargetFacts } from './facts.js';
import { checkFetchAhead, checkTracking } from './hybrid.js';
import { checkStorage } from './storage.js';
import { checkTransport } from './transport.js';

/**
 * QEMU's own memory besides the guest's RAM. Measured: 64 idle processes took 16–30 MiB each; devices and TCG buffers
 * add to that.
 */
const QEMU_OVERHEAD_BYTES = 128 * 1024 * 1024;

const SMALL_PAGE_BYTES = 4096;

export function preflight(request: MigrationRequest, facts: PreflightFacts): Refusal[] {
  const { sourceHost, target, vm } = facts;
  const refusals = [
    ...checkVm(request, facts),
    ...checkRam(request, vm),
    ...checkState(sourceHost.host, sourceHost.stateFreeBytes),
    ...checkClone(request, sourceHost, vm),
    ...checkTracking(request, sourceHost, vm),
    ...checkDowntime(request, vm.spec.memory.sizeBytes),
  ];
  switch (target.kind) {
    case 'isSource':
      refusals.push(
        refuse('TARGET_IS_SOURCE', `${request.vm} is already on ${sourceHost.host}`, 'choose another target host'),
      );
      break;
    case 'unreachable':
      refusals.push(
        refuse(
          'TARGET_UNREACHABLE',
          `${request.target} does not answer: ${target.error.message}`,
          target.error.remedy ??
            `check that vmigrated runs on ${request.target} and that ${sourceHost.host} knows it as a peer`,
        ),
      );
      break;
    case 'reachable':
      refusals.push(
        ...checkPeers(sourceHost, target.inventory),
        ...checkQemu(target.inventory, vm, needsOf(request)),
        ...checkMemory(request, target.inventory, vm),
        ...checkVerification(request, [sourceHost, target.inventory]),
        ...checkFetchAhead(request, target.inventory),
        ...checkState(target.inventory.host, target.inventory.stateFreeBytes),
        ...checkLimits(sourceHost.host, sourceHost.limits, { vmCount: 1, cpus: 0 }),
        ...checkLimits(target.inventory.host, target.inventory.limits, { vmCount: 1, cpus: vm.spec.cpus }),
      );
      refusals.push(...checkAllFiles(request, sourceHost, target, vm));
      refusals.push(
        ...checkTransport(request.transport, request.mode, {
          ...{ source: sourceHost, target: target.inventory, checks: target.checks, vm },
          dataSecurity: request.dataSecurity,
          ...(target.isSocketSeen === undefined ? {} : { isSocketSeen: target.isSocketSeen }),
        }),
      );
      break;
  }
  return refusals;
}

/** A host of an earlier build would move the VM and prove nothing, without a word. */
function* checkVerification(
  { verifyMemory, mode }: MigrationRequest,
  hosts: readonly HostInventory[],
): Iterable<Refusal> {
  if (verifyMemory !== true) return;
  const code = 'MEMORY_NOT_VERIFIABLE';
  if (MODE_TRAITS[mode].mover === 'backend') {
    const reason = 'QEMU moves its pages by itself, and nobody can say what has arrived';
    yield refuse(code, reason, "leave out either --verify-memory or QEMU's own migration");
    return;
  }
  for (const { host, canVerifyMemory } of hosts) {
    if (canVerifyMemory === true) continue;
    yield refuse(
      code,
      `${host} has a build that cannot verify memory`,
      `install the same vmigrate on ${host}, or leave --verify-memory out`,
    );
  }
}

function needsOf({ mode }: MigrationRequest): QemuNeeds {
  const { mover, fetches } = MODE_TRAITS[mode];
  const isPaged = mover === 'pager';
  // The pages of a pre-copy, too, are mapped while the VM runs.
  return { isPaged, fetches: isPaged || fetches };
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}

function* checkVm(
  { vm: name }: MigrationRequest,
  { sourceHost: source, vm, isJobCancellable = false }: PreflightFacts,
): Iterable<Refusal> {
  if (vm.owner !== source.host) {
    yield refuse(
      'VM_NOT_OWNED',
      `${name} belongs to ${vm.owner}, not to ${source.host}`,
      `ask the daemon on ${vm.owner}`,
    );
  }
  for (const refusal of [notRunning(name, vm), inJob(name, vm, isJobCancellable)]) if (refusal !== null) yield refusal;
  for (const blocker of vm.migrationBlockers) {
    yield refuse(
      'DEVICE_NOT_MIGRATABLE',
      `a device of ${name} cannot migrate: ${blocker}`,
      'remove the device from the VM, or replace it by a device that can migrate',
    );
  }
  for (const change of vm.deviceChanges ?? []) {
    yield refuse(
      'DEVICE_CHANGED',
      `the devices of ${name} are not those of its spec: ${change}`,
      "undo the change on the VM's monitor socket (device_del, device_add), or stop the VM and change its spec",
    );
  }
}

function* checkRam({ mode, vm: name }: MigrationRequest, vm: VmInventory): Iterable<Refusal> {
  // checkClone checks the memory of clones.
  if (MODE_TRAITS[mode].mover !== 'pager' || vm.image !== null) return;
  const remedy = 'run the VM with memory.backing "shared", or use --native';
  if (!vm.isRamShared) {
    yield refuse(
      'RAM_NOT_SHARED',
      `the RAM of ${name} is private to its QEMU, so no other process can move it`,
      remedy,
    );
  } else if (!vm.isRamNamedFile) {
    yield refuse(
      'RAM_NOT_NAMED_FILE',
      `the RAM of ${name} is shared but is not a named file, so it cannot be opened`,
      remedy,
    );
  }
}

function* checkMemory(request: MigrationRequest, target: HostInventory, vm: VmInventory): Iterable<Refusal> {
  const { memory } = vm.spec;
  const { host } = target;
  const remedy = `free memory on ${host}, or choose another host`;
  const isHuge = memory.pageBytes > SMALL_PAGE_BYTES;
  const neededBytes = QEMU_OVERHEAD_BYTES + (isHuge ? 0 : memory.sizeBytes);
  if (!(target.memoryAvailableBytes >= neededBytes)) {
    yield refuse(
      'TARGET_MEMORY',
      needs(request.vm, neededBytes, host, target.memoryAvailableBytes, 'of memory'),
      remedy,
    );
  }
  if (isHuge) {
    const pageCount = Math.ceil(memory.sizeBytes / memory.pageBytes);
    const freeCount = target.hugePagesFree[String(memory.pageBytes)] ?? 0;
    if (!(freeCount >= pageCount)) {
      const needed = `${pageCount} free huge pages of ${describeBytes(memory.pageBytes)}`;
      yield refuse(
        'TARGET_HUGE_PAGES',
        `${request.vm} needs ${needed}; ${host} has ${freeCount}`,
        `reserve more on ${host} (vm.nr_hugepages)`,
      );
    }
  } else if (memory.backing !== 'private' && !(target.ramFileFreeBytes >= memory.sizeBytes)) {
    yield refuse(
      'TARGET_MEMORY',
      needs(request.vm, memory.sizeBytes, host, target.ramFileFreeBytes, 'in the file system of the region files'),
      `free space there, enlarge the mount (size=), or set ramDir in the configuration of vmigrated on ${host}`,
    );
  }
}

function needs(vm: string, neededBytes: number, host: string, availableBytes: number, where: string): string {
  return `${vm} needs ${neededMib(neededBytes)} ${where}; ${host} has ${availableMib(availableBytes)}`;
}

/** A file that the target cannot use at all is not compared as well. */
function checkAllFiles(
  request: MigrationRequest,
  source: HostInventory,
  { inventory, checks, storage }: Extract<TargetFacts, { kind: 'reachable' }>,
  vm: VmInventory,
): Refusal[] {
  const { disks, kernel, initrd } = vm.spec;
  const boot = [kernel, initrd].filter((path) => path !== undefined);
  const refusedPaths = new Set([
    ...disks.filter((disk) => !isDiskUsable(disk, checks)).map(({ path }) => path),
    ...boot.filter((path) => !isFileReadable(path, checks)),
  ]);
  return [
    ...checkFiles(request, inventory, checks, vm),
    ...checkStorage({ request, source, target: inventory, storage, refusedPaths }),
  ];
}

function isDiskUsable(disk: DiskSpec, { disks }: TargetChecks): boolean {
  const check = disks.find(({ path }) => path === disk.path);
  return check !== undefined && check.isReadable && (disk.isReadOnly || check.isWritable);
}

function* checkFiles(
  request: MigrationRequest,
  target: HostInventory,
  checks: TargetChecks,
  vm: VmInventory,
): Iterable<Refusal> {
  const { host } = target;
  const { spec } = vm;
  const remedy = `make the same file available on ${host} under the same path`;
  if (target.vmNames.includes(spec.name)) {
    // The memory that is still fetched from there is that VM. Ending it would lose this one.
    const isOwnSource = vm.arrivingFrom === host && vm.job !== null;
    yield refuse(
      'NAME_TAKEN',
      `${host} already has a VM named ${spec.name}`,
      isOwnSource
        ? `${host} frees it as soon as all memory of ${spec.name} has arrived: "vmctl job ${vm.job} --follow"`
        : `end it there with "vmctl stop ${spec.name}" if it is not needed, or choose another host`,
    );
  }
  for (const disk of spec.disks) {
    const check = checks.disks.find(({ path }) => path === disk.path);
    if (isDiskUsable(disk, checks) || check?.forbidden !== undefined) continue;
    const how = check?.isReadable === true ? 'cannot write' : 'cannot open';
    const why = check?.reason === undefined ? '' : `: ${check.reason}`;
    yield refuse('DISK_MISSING', `${host} ${how} the disk ${disk.id} of ${request.vm} (${disk.path})${why}`, remedy);
  }
  yield* checkPolicy(
    host,
    spec.name,
    checks,
    spec.disks.map(({ path }) => path),
  );
  yield* checkBootFiles(host, spec, checks);
  yield* checkBridges(target, spec);
}
