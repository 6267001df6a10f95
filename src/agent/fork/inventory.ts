/** Answers what pre-flight asks about a fork. Each call inspects the host again and changes nothing. */

import type { SpecDevices } from '../../backends/backend.js';
import type { ForkInventory, VmInventory } from '../../domain/host.js';
import type { VmSpec } from '../../domain/vm.js';
import type { ForkOrigin, ForkQuestion } from '../../engine/ports/fork.js';
import { isKernelAtLeast } from '../../kit/kernel-version.js';
import { refuseOtherOrigin } from '../image/join-disks.js';
import type { ImageRecord } from '../image/record.js';
import { startProblem } from '../image/start-check.js';
import { vmInventory } from '../inventory/inventory.js';
import { hostLimits } from '../inventory/limits.js';
import { cloneNames } from './clones/names.js';
import type { ForkContext } from './context.js';
import { diskBlockers, longChains } from './parent-disks.js';
import type { Pool, PooledSet } from './pool.js';
import { fillingImageOf } from './shape.js';

/**
 * Memory of a clone's QEMU when its guest resumes: 16 MiB of the process, and some pages that the guest writes at once.
 */
const CLONE_BYTES = 20 * 1024 * 1024;
/** The first kernel that can write-protect shared memory. */
const KERNEL_MIN = [5, 19] as const;

export async function forkInventory(
  context: ForkContext,
  question: ForkQuestion,
  pool: Pool,
  arriving: (vm: string) => Promise<string | null>,
): Promise<ForkInventory> {
  const { images, vms, native } = context;
  const free = await vms.room.free();
  const stateFreeBytes = await vms.stateFreeBytes();
  const common = {
    isWriteProtectSupported: isKernelAtLeast(KERNEL_MIN) && native.support().userfaultfdPermitted,
    imageBytesFree: await images.bytesFree(),
    cloneBytesFree: free.cloneBytes,
    memoryAvailableBytes: free.hostBytes,
    limits: await hostLimits(),
    ...(stateFreeBytes === undefined ? {} : { stateFreeBytes }),
  };
  if (question.origin !== undefined) return { ...common, ...(await joinInventory(context, question, question.origin)) };
  if (question.image !== null) {
    const image = images.get(question.image);
    return {
      ...common,
      vm: inventoryOf(context, image),
      image: images.view(image.id),
      ...{ escapingDevices: [], hasPreload: true, isFilling: false, diskBlockers: [], imageBytesNeeded: 0 },
      cloneBytesNeeded: cloneBytes(question, image.spec),
      warmCloneCount: 0,
      hostResources: vms.backend.devicesIn(image.spec).hostResources,
      ...(await namesInUse(context, question, image.spec, null)),
      diskProblem: image.state === 'complete' ? await startProblem(context, image.id) : null,
      ...(await serving(context, image.spec, image.served)),
      argumentFiles: vms.backend.filesIn(image.spec).map(({ path }) => path),
    };
  }
  const parent = vms.get(question.vm ?? '');
  const { spec, memory } = parent;
  const warm = pool.find(parent, question);
  const asked = await vmInventory(context, spec.name);
  // The pages of a clone can be copied as well, from its process.
  const isClone = parent.image !== null && question.parentMode === 'continue';
  const vm: VmInventory = isClone ? { ...asked, isRamShared: true, isRamNamedFile: true } : asked;
  const isFilling = fillingImageOf(context, parent) !== undefined;
  return {
    ...common,
    vm,
    image: null,
    escapingDevices: escapingDevices(vm, vms.backend.devicesIn(spec)),
    hasPreload: memory !== null,
    isFilling: isFilling || (await arriving(spec.name)) !== null,
    diskBlockers: await diskBlockers(parent),
    imageBytesNeeded: question.parentMode === 'stop' ? 0 : isClone ? spec.memory.sizeBytes : vm.ramAllocatedBytes,
    cloneBytesNeeded: cloneBytes(question, spec),
    warmCloneCount: warm?.clones.length ?? 0,
    hostResources: vms.backend.devicesIn(spec).hostResources,
    ...(await namesInUse(context, question, spec, warm)),
    longChains: question.parentMode === 'stop' ? [] : await longChains(context, parent),
    coldReason: warm === null ? pool.whyCold(parent, question) : null,
    ...(await serving(context, spec)),
  };
}

async function serving(
  { vms }: ForkContext,
  { disks }: VmSpec,
  served?: ImageRecord['served'],
): Promise<Pick<ForkInventory, 'servingProblem'>> {
  if (disks.length === 0) return {};
  if (served !== undefined) return { servingProblem: `it reads ${served.disks.join(', ')} from ${served.host} itself` };
  return { servingProblem: await vms.backend.diskExports.problem() };
}

/** For a host that would join a fork: the image is another host's, and comes here unless it is here already. */
async function joinInventory(context: ForkContext, question: ForkQuestion, origin: ForkOrigin) {
  const { images, vms } = context;
  const { spec, accel, qemuVersion, image: id, allocatedBytes } = origin;
  const image = images.has(id) ? images.view(id) : null;
  if (image !== null) refuseOtherOrigin(images.get(id), origin.host, context.host);
  return {
    vm: inventoryOf(context, { spec, accel, qemuVersion }),
    image,
    ...{ escapingDevices: [], hasPreload: true, isFilling: false, diskBlockers: [], warmCloneCount: 0 },
    imageBytesNeeded: image?.state === 'complete' ? 0 : allocatedBytes,
    cloneBytesNeeded: cloneBytes(question, spec),
    hostResources: vms.backend.devicesIn(spec).hostResources,
    ...(await namesInUse(context, question, spec, null)),
  };
}

function cloneBytes({ memory }: ForkQuestion, spec: VmSpec): number {
  return CLONE_BYTES + (memory === 'private' ? spec.memory.sizeBytes : 0);
}

/**
 * Returns the clones' names that other VMs have. Only names from a user's prefix can collide. A waiting set has its
 * names already. An ended VM is replaced if the request says so, because its exit code and log go with it.
 */
async function namesInUse(
  { vms, names }: ForkContext,
  question: ForkQuestion,
  spec: VmSpec,
  warm: PooledSet | null,
): Promise<Required<Pick<ForkInventory, 'namesTaken' | 'namesOfEnded' | 'namesElsewhere'>>> {
  if (question.namePrefix === null) return { namesTaken: [], namesOfEnded: [], namesElsewhere: [] };
  const own = new Set(warm?.clones.map(({ vm }) => vm.spec.name));
  const wanted = cloneNames({ ...question, fork: '' }, spec.name).filter((name) => !own.has(name));
  const used = wanted.filter((name) => vms.has(name));
  const isEnded = (name: string) => vms.get(name).state === 'stopped';
  return {
    namesTaken: used.filter((name) => !isEnded(name)),
    namesOfEnded: question.isReplacing === true ? [] : used.filter(isEnded),
    // The UUIDs are new, and known only when the fork has an id.
    namesElsewhere: wanted.length === 0 ? [] : await names.namesElsewhere(wanted.map((name) => ({ name, uuid: '' }))),
  };
}

function escapingDevices({ discardingDevices }: VmInventory, { escaping }: SpecDevices): string[] {
  return [
    ...discardingDevices.map((device) => `${device} discards guest memory, and with it pages of the image`),
    ...escaping.map((what) => `${what} lets processes other than QEMU write to guest memory`),
  ];
}

/** Describes the VM of an image for pre-flight. The image's record is all that is left of that VM. */
function inventoryOf(
  { host, vms }: ForkContext,
  { spec, accel, qemuVersion }: Pick<ImageRecord, 'spec' | 'accel' | 'qemuVersion'>,
): VmInventory {
  return {
    ...{ spec, accel, qemuVersion, state: 'stopped', epoch: 0, owner: host, job: null },
    ...{ isRamShared: true, isRamNamedFile: true, migrationBlockers: [], ramAllocatedBytes: 0 },
    discardingDevices: [...vms.backend.devicesIn(spec).discarding],
    ...{ image: null, identityIssue: null, fleetingDisks: [], exitCode: null },
  };
}
