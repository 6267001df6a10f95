import { describe, expect, test } from 'vitest';
import type { ForkPlan, ForkRequest, ForkStepName } from '../../../src/domain/fork.js';
import type { ForkInventory } from '../../../src/domain/host.js';
import type { ForkRefusalCode, RefusalCode } from '../../../src/domain/refusal.js';
import { firstForkStepOutOfOrder, planFork } from '../../../src/planner/fork/plan.js';
import { forkInventory, forkRequest, IMAGE, image } from './fork-facts.js';
import { expectForkRemedyWorks } from './remedies.js';

const MIB = 1024 * 1024;

interface Change {
  readonly request?: Partial<ForkRequest>;
  readonly inventory?: Partial<ForkInventory>;
  readonly vm?: Partial<ForkInventory['vm']>;
}

function planned({ request = {}, inventory = {}, vm = {} }: Change = {}) {
  const merged = { ...forkInventory, ...inventory };
  return planFork(
    { ...forkRequest, ...request },
    { host: 'A', inventory: { ...merged, vm: { ...merged.vm, ...vm } }, waitsFor: null },
  );
}

const ofClone: Change = { vm: { image: { id: IMAGE, isComplete: true, ownBytes: 0 } } };
const ofImage: Change = { request: { vm: null, image: IMAGE }, inventory: { image } };

const CASES: readonly [what: string, change: Change, code: RefusalCode, names: RegExp][] = [
  ['no clone', { request: { cloneCount: 0 } }, 'CLONE_COUNT', /1-1024, not 0$/],
  ['fewer than no clone', { request: { cloneCount: -1 } }, 'CLONE_COUNT', /1-1024, not -1/],
  [
    'ten thousand',
    { request: { cloneCount: 10_000 }, inventory: { cloneBytesNeeded: 0 } },
    'CLONE_COUNT',
    /1-1024, not 10000/,
  ],
  ['half a clone', { request: { cloneCount: 1.5 } }, 'CLONE_COUNT', /1\.5/],
  ['a name that no VM may have', { request: { namePrefix: 'Job_X' } }, 'CLONE_NAME', /named after "Job_X"/],
  [
    'more clones than descriptors',
    {
      inventory: {
        limits: {
          ...{ openFiles: { used: 964, max: 1024 }, openFilesOfHost: null, tasks: null },
          ...{ mappings: null, fileWatchesMax: null },
        },
      },
    },
    'HOST_LIMIT',
    /^A: open files of vmigrated are limited to 1024, 964 are in use, and about 68 more are needed$/,
  ],
  ['a VM of another host', { vm: { owner: 'C' } }, 'VM_NOT_OWNED', /belongs to C/],
  ['a paused VM', { vm: { state: 'paused' } }, 'VM_NOT_RUNNING', /is paused/],
  ['a VM in a job', { vm: { job: 'job-7' } }, 'VM_IN_JOB', /job-7/],
  ['a VM that is still arriving', { inventory: { isFilling: true } }, 'VM_FILLING', /still being transferred/],
  ['a device without a state', { vm: { migrationBlockers: ['ivshmem'] } }, 'DEVICE_NOT_MIGRATABLE', /ivshmem/],
  ['private memory', { vm: { isRamShared: false } }, 'RAM_NOT_SHARED', /private/],
  ['a device that writes past', { inventory: { escapingDevices: ['vhost-net n0'] } }, 'WRITES_ESCAPE', /vhost-net n0/],
  [
    'a clone that shall become an image without a copy',
    {
      request: { parentMode: 'stop' },
      vm: { image: { id: IMAGE, isComplete: true, ownBytes: 0 } },
    },
    'RAM_NOT_SHARED',
    /shares its memory with image 0011/,
  ],
  [
    'clones that would punch holes into their image',
    { request: { parentMode: 'stop' }, vm: { discardingDevices: ['virtio-balloon-pci'] } },
    'WRITES_ESCAPE',
    /virtio-balloon-pci.*for all clones/,
  ],
  [
    'the same of an image that is there',
    { ...ofImage, vm: { discardingDevices: ['virtio-mem-pci'] } },
    'WRITES_ESCAPE',
    /virtio-mem-pci.*for all clones/,
  ],
  ['an old kernel', { inventory: { isWriteProtectSupported: false } }, 'WRITE_PROTECT_MISSING', /write-protect/],
  ['a clone without preload', { ...ofClone, inventory: { hasPreload: false } }, 'PRELOAD_MISSING', /preload/],
  ['no preload', { inventory: { hasPreload: false } }, 'PRELOAD_MISSING', /preload/],
  ['a raw device', { inventory: { diskBlockers: ['d0 is a pipe'] } }, 'DISK_NOT_SNAPSHOTTABLE', /d0 is a pipe/],
  [
    'a device that somebody has added',
    { vm: { deviceChanges: ['device p was added'] } },
    'DEVICE_CHANGED',
    /p was added/,
  ],
  [
    'a port of the host',
    { inventory: { hostResources: [{ argument: '-vnc :7', what: 'the VNC display :7', isOfNetwork: true }] } },
    'HOST_RESOURCE',
    /only one VM of a host can have the VNC display :7, which vm1 takes by "-vnc :7"/,
  ],
  [
    'a socket of the host, in a network of its own too',
    {
      request: { network: 'isolated' },
      inventory: { hostResources: [{ argument: '-vnc unix:/v', what: 'the socket /v', isOfNetwork: false }] },
    },
    'HOST_RESOURCE',
    /socket \/v/,
  ],
  ['a full state directory', { inventory: { stateFreeBytes: 7 * MIB } }, 'NO_SPACE', /directory of A needs 8 MiB/],
  [
    'a disk of another moment',
    { ...ofImage, inventory: { image, diskProblem: { code: 'DISK_CHANGED', reason: '/srv/d has 5 bytes, not 4' } } },
    'DISK_CHANGED',
    /5 bytes, not 4/,
  ],
  [
    'a disk that somebody writes to',
    { ...ofImage, inventory: { image, diskProblem: { code: 'DISK_IN_USE', reason: 'web writes to /srv/d' } } },
    'DISK_IN_USE',
    /web writes to/,
  ],
  ['a long chain', { inventory: { longChains: ['disk d0 is a chain of 16 files'] } }, 'DISK_CHAIN_LONG', /16 files/],
  ['names of ended VMs', { inventory: { namesOfEnded: ['vm1-1'] } }, 'NAME_TAKEN', /exit codes and logs: vm1-1/],
  [
    'names that other hosts have',
    { inventory: { namesElsewhere: ['vm1-0 (running on B)'] } },
    'NAME_TAKEN',
    /on other hosts: vm1-0 \(running on B\)/,
  ],
  ['names that are taken', { inventory: { namesTaken: ['vm1-0', 'vm1-2'] } }, 'NAME_TAKEN', /vm1-0, vm1-2/],
  ['an image without room', { inventory: { imageBytesFree: 100 * MIB } }, 'IMAGE_MEMORY', /512 MiB.*100 MiB/],
  [
    'no room for the third clone',
    { inventory: { memoryAvailableBytes: 580 * MIB } },
    'CLONE_MEMORY',
    /3 clones .* 608 MiB; A has 580 MiB, 28 MiB too little; 2 clones fit/,
  ],
  ['an image that is not there', { ...ofImage, inventory: { image: null } }, 'IMAGE_INCOMPLETE', /no image 0011/],
  [
    'an image that still fills',
    { ...ofImage, inventory: { image: { ...image, state: 'filling' } } },
    'IMAGE_INCOMPLETE',
    /is filling/,
  ],
];

describe('pre-flight', () => {
  test.each(CASES)('refuses %s', (_, change, code, names) => {
    const { plan, refusals } = planned(change);
    expect(plan).toBeNull();
    expect(refusals.map((refusal) => refusal.code)).toEqual([code]);
    expect(refusals[0]?.reason).toMatch(names);
    expect(refusals[0]?.remedy).not.toBe('');
    expectForkRemedyWorks(refusals[0]!, (to) => {
      return planned({ ...change, request: { ...change.request, ...to } }).refusals;
    });
  });

  test('the cases name every code that only forks have', () => {
    const codes: Record<ForkRefusalCode, true> = {
      CLONE_COUNT: true,
      CLONE_NAME: true,
      CLONE_MEMORY: true,
      IMAGE_MEMORY: true,
      IMAGE_INCOMPLETE: true,
      VM_FILLING: true,
      WRITES_ESCAPE: true,
      DISK_NOT_SNAPSHOTTABLE: true,
      HOST_RESOURCE: true,
      DISK_CHANGED: true,
      DISK_IN_USE: true,
      DISK_CHAIN_LONG: true,
    };
    const named = new Set(CASES.map(([, , code]) => code));
    expect(Object.keys(codes).filter((code) => !named.has(code as ForkRefusalCode))).toEqual([]);
  });

  test('clones in network namespaces of their own may have the same ports', () => {
    const hostResources = [{ argument: '-vnc :7', what: 'the VNC display :7', isOfNetwork: true }];
    expect(planned({ request: { network: 'isolated' }, inventory: { hostResources } }).refusals).toEqual([]);
  });

  test('a network namespace is advised only where one would be made', () => {
    const hostResources = [{ argument: '-vnc :7', what: 'the VNC display :7', isOfNetwork: true }];
    const [tap] = forkInventory.vm.spec.nics;
    const refused = (nics: ForkInventory['vm']['spec']['nics']) =>
      planned({ inventory: { hostResources }, vm: { spec: { ...forkInventory.vm.spec, nics } } }).refusals[0]?.remedy;
    expect(refused([{ ...tap!, type: 'tap' }])).toContain('--network isolated');
    expect(refused([])).not.toContain('--network');
  });

  test('a single clone of an image may have what its parent had', () => {
    const inventory = {
      image,
      hostResources: [{ argument: '-vnc unix:/v', what: 'the socket /v', isOfNetwork: false }],
    };
    const one = { vm: null, image: IMAGE, cloneCount: 1 };
    expect(planned({ request: one, inventory }).refusals).toEqual([]);
    expect(planned({ request: { ...one, cloneCount: 2 }, inventory }).refusals).toMatchObject([
      { code: 'HOST_RESOURCE' },
    ]);
  });

  test('gives all reasons at once', () => {
    const { refusals } = planned({ vm: { state: 'paused' }, inventory: { hasPreload: false, namesTaken: ['vm1-1'] } });
    expect(refusals.map(({ code }) => code)).toEqual(['VM_NOT_RUNNING', 'PRELOAD_MISSING', 'NAME_TAKEN']);
  });

  test('a figure that is no number is not enough', () => {
    expect(planned({ inventory: { memoryAvailableBytes: Number.NaN } }).refusals).toMatchObject([
      { code: 'CLONE_MEMORY' },
    ]);
    expect(planned({ inventory: { imageBytesFree: Number.NaN } }).refusals).toMatchObject([{ code: 'IMAGE_MEMORY' }]);
  });

  test('a parent that stays stopped needs no write-protection', () => {
    const { refusals } = planned({
      request: { parentMode: 'stop' },
      inventory: { escapingDevices: ['vfio'], isWriteProtectSupported: false, hasPreload: false },
    });
    expect(refusals).toEqual([]);
  });

  test('with --partial some clones are enough, none are not', () => {
    const some = planned({ request: { isPartialAllowed: true }, inventory: { memoryAvailableBytes: 580 * MIB } });
    expect(some.plan?.notes).toContainEqual(expect.stringMatching(/about 2 clones/));
    const none = planned({ request: { isPartialAllowed: true }, inventory: { memoryAvailableBytes: 500 * MIB } });
    expect(none.refusals).toMatchObject([{ code: 'CLONE_MEMORY' }]);
  });

  test('processes that wait have their memory already', () => {
    const { refusals } = planned({ inventory: { memoryAvailableBytes: 520 * MIB, warmCloneCount: 3 } });
    expect(refusals).toEqual([]);
  });
});

describe('the plan', () => {
  const names = (plan: ForkPlan | null): ForkStepName[] => (plan?.steps ?? []).map(({ name }) => name);

  test('of a VM: the parent stands still in one step', () => {
    const { plan } = planned();
    expect(names(plan)).toEqual([
      'reserveParent',
      'prepareClones',
      'armParent',
      'forkPoint',
      'loadClones',
      'commitFork',
      'runClones',
      'fillImage',
      'releaseParent',
    ]);
    expect(plan?.steps.filter(({ isInPause }) => isInPause).map(({ name }) => name)).toEqual(['forkPoint']);
    expect(plan).toMatchObject({ host: 'A', parent: 'vm1', memoryBytes: 512 * MIB });
    expect(plan?.notes.join('\n')).toMatch(/3 QEMU processes must be started \(cold\)/);
  });

  test('of an image: nobody stands still', () => {
    const { plan } = planned(ofImage);
    expect(names(plan)).toEqual(['prepareClones', 'loadClones', 'commitFork', 'runClones', 'releaseParent']);
    expect(plan?.steps.some(({ isInPause }) => isInPause)).toBe(false);
  });

  test('gives many clones more time', () => {
    const timeoutMs = (cloneCount: number): number =>
      planned({ request: { cloneCount } }).plan?.steps.find(({ name }) => name === 'prepareClones')?.timeoutMs ?? 0;
    expect(timeoutMs(64)).toBeGreaterThan(timeoutMs(1));
  });

  test('is walked in this order only', () => {
    const steps = planned().plan?.steps ?? [];
    expect(firstForkStepOutOfOrder(steps)).toBeNull();
    for (let index = 0; index < steps.length; index++) {
      expect(firstForkStepOutOfOrder(steps.filter((_, at) => at !== index))).not.toBeNull();
    }
    expect(firstForkStepOutOfOrder([...steps].reverse())).toBe('releaseParent');
    expect(firstForkStepOutOfOrder(planned(ofImage).plan?.steps ?? [])).toBeNull();
    expect(firstForkStepOutOfOrder([])).toBe('prepareClones');
  });
});
