import type { ForkInventory, VmInventory } from '../../src/domain/host.js';
import type { VmSpec } from '../../src/domain/vm.js';
import { image as completeImage, forkInventory } from '../unit/planner/fork-facts.js';
import { vm } from '../unit/planner/planner-facts.js';
import { PAGES, type VmRecord } from './world.js';

export const INCARNATION = 'f'.repeat(32);

export const vmSpec: VmSpec = {
  name: 'vm1',
  uuid: '9d3c1f1e-0000-4000-8000-000000000001',
  machine: 'pc-q35-7.2',
  accel: 'tcg',
  cpuModel: 'qemu64',
  cpus: 1,
  memory: { sizeBytes: 2 ** 28, pageBytes: 4096, regions: [{ id: 'ram0', lengthBytes: 2 ** 28 }], backing: 'shared' },
  disks: [],
  nics: [],
  hasSerial: true,
  devices: [],
  qemuArgs: [],
  hasPreload: true,
};

/** The VM as it runs on the source at the beginning. */
export function startedVm(): VmRecord {
  return {
    spec: vmSpec,
    job: null,
    memory: { pages: Array.from({ length: PAGES }, () => 1) },
    qemu: { isAlive: true, state: 'running', version: 1 },
    epoch: 1,
    loadedVersion: 0,
  };
}

/** What a host says when it is asked for a fork. `image`: an image that it has. */
export function forkFacts({
  state,
  job,
  image,
}: {
  readonly state: VmInventory['state'];
  readonly job: string | null;
  readonly image: string | null;
}): ForkInventory {
  return {
    ...forkInventory,
    vm: {
      ...vm,
      ...{ spec: vmSpec, state, epoch: 1, owner: 'A', job, ramAllocatedBytes: vmSpec.memory.sizeBytes },
    },
    image: image === null ? null : { ...completeImage, id: image },
  };
}
