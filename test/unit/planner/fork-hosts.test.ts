import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { ForkRequest, HostWish } from '../../../src/domain/fork.js';
import type { ForkInventory, HostInventory } from '../../../src/domain/host.js';
import type { RefusalCode } from '../../../src/domain/refusal.js';
import { OWN_MACHINE_TRANSPORT } from '../../../src/domain/transport.js';
import { planHosts } from '../../../src/planner/fork/hosts.js';
import type { JoinFacts } from '../../../src/planner/fork/join-preflight.js';
import { planFork } from '../../../src/planner/fork/plan.js';
import { forkInventory, forkRequest, IMAGE, image } from './fork-facts.js';
import { goodFacts, host, spec, vm } from './planner-facts.js';

const MIB = 1024 * 1024;
const HOSTS = ['A', ...Array.from({ length: 8 }, (_, index) => `h${index}`)];
const EVEN: readonly HostWish[] = HOSTS.slice(0, 4).map((name) => ({ host: name, cloneCount: null }));

const diskless: ForkInventory = { ...forkInventory, vm: { ...forkInventory.vm, spec: { ...spec, disks: [] } } };

interface Change {
  readonly request?: Partial<ForkRequest>;
  readonly wishes?: readonly HostWish[];
  /** Of one host that joins. */
  readonly at?: string;
  readonly inventory?: Partial<HostInventory>;
  readonly fork?: Partial<ForkInventory>;
  readonly checks?: Partial<Extract<JoinFacts, { kind: 'reachable' }>['checks']>;
  readonly error?: MigrationError;
  readonly root?: Partial<ForkInventory>;
}

function planned(change: Change = {}) {
  const { wishes = EVEN, at, inventory = {}, fork = {}, checks = {}, error, root = {} } = change;
  const request: ForkRequest = { ...forkRequest, cloneCount: 8, transport: 'tcp', ...change.request, hosts: wishes };
  const joins = wishes
    .filter((wish) => wish.host !== 'A')
    .map(({ host: name }): JoinFacts => {
      const isChanged = name === at;
      if (isChanged && error !== undefined) return { kind: 'unreachable', host: name, error };
      return {
        ...{ kind: 'reachable', host: name },
        inventory: { ...host(name), ...(isChanged ? inventory : {}) },
        checks: { ...goodFacts().target.checks, disks: [], ...(isChanged ? checks : {}) },
        fork: { ...diskless, ...(isChanged ? fork : {}) },
        storage: { kind: 'unasked' },
      };
    });
  const facts = { root: host('A'), joins, topology: null, probes: [] };
  const own = { ...diskless, ...root };
  return { ...planHosts(request, wishes, own, facts), whole: { request, inventory: own, hosts: facts } };
}

const counts = (change: Change) =>
  Object.fromEntries((planned(change).plan?.shares ?? []).map(({ host: name, count }) => [name, count]));

const REFUSED: readonly [what: string, change: Change, code: RefusalCode, names: RegExp][] = [
  [
    'a host that does not answer',
    { at: 'h1', error: new MigrationError('UNREACHABLE', 'connection refused') },
    'TARGET_UNREACHABLE',
    /^h1 does not answer: connection refused/,
  ],
  ['another protocol', { at: 'h1', inventory: { protocolVersion: 2 } }, 'PROTOCOL_VERSION', /A 1, h1 2/],
  [
    'a clock that nobody sets',
    { at: 'h2', inventory: { clockMs: host('A').clockMs + 400_000 } },
    'CLOCK_SKEW',
    /A and h2 differ by 400 s/,
  ],
  [
    'more hosts than can read one image',
    {
      wishes: Array.from({ length: 130 }, (_, index) => ({ host: index === 0 ? 'A' : `h${index}`, cloneCount: 1 })),
      request: { cloneCount: 130 },
    },
    'HOST_LIMIT',
    /129 hosts would read the image from A, which serves 128/,
  ],
  [
    'a host more than can read an image that others read still',
    {
      root: { image: { ...image, readers: ['h0', ...Array.from({ length: 127 }, (_, index) => `other-${index}`)] } },
      wishes: ['h0', 'h1'].map((name) => ({ host: name, cloneCount: 4 })),
      request: { vm: null, image: IMAGE },
    },
    'HOST_LIMIT',
    /129 hosts would read the image from A, which serves 128/,
  ],
  ['an old QEMU', { at: 'h1', inventory: { qemuVersion: '7.0.0' } }, 'QEMU_TOO_OLD', /h1 has QEMU 7\.0\.0/],
  [
    'an older QEMU than the parent has',
    { root: { vm: { ...diskless.vm, qemuVersion: '8.1.0' } } },
    'QEMU_TOO_OLD',
    /8\.1/,
  ],
  ['no such machine type', { at: 'h2', inventory: { machines: ['pc'] } }, 'MACHINE_MISSING', /h2.*pc-q35-7\.2/],
  ['no userfaultfd', { at: 'h2', inventory: { isUserfaultfdPermitted: false } }, 'USERFAULTFD_NOT_PERMITTED', /h2/],
  ['no preload library', { at: 'h2', inventory: { isPreloadPresent: false } }, 'PRELOAD_MISSING', /h2/],
  ['a missing bridge', { at: 'h0', inventory: { bridges: [] } }, 'BRIDGE_MISSING', /br0, which h0/],
  [
    'what the policy of one host forbids',
    { at: 'h0', checks: { files: [], forbidden: [{ what: 'qemuArgs', value: '-D', key: 'qemuArgs' }] } },
    'POLICY_FORBIDS',
    /the policy of h0 .* qemuArgs "-D"/,
  ],
  ['a missing kernel file', { at: 'h0', checks: { files: [] } }, 'FILE_MISSING', /h0 cannot read \/boot\/vmlinuz/],
  [
    'a name that is used on host 7',
    {
      wishes: HOSTS.map((name) => ({ host: name, cloneCount: null })),
      ...{ at: 'h7', fork: { namesTaken: ['vm1-3'] } },
    },
    'NAME_TAKEN',
    /already used on h7: vm1-3/,
  ],
  ['a full state directory', { at: 'h1', fork: { stateFreeBytes: 1 } }, 'NO_SPACE', /h1/],
  [
    'more clones than host 5 has room for',
    {
      request: { cloneCount: 120 },
      wishes: HOSTS.map((name) => ({ host: name, cloneCount: name === 'h5' ? 40 : 10 })),
      ...{ at: 'h5', fork: { memoryAvailableBytes: 512 * MIB + 20 * 32 * MIB } },
    },
    'CLONE_MEMORY',
    /^40 clones.*h5 has 1152 MIB.*20 clones fit/i,
  ],
  [
    'no room for the image',
    { wishes: [{ host: 'h5', cloneCount: 8 }], ...{ at: 'h5', fork: { imageBytesFree: MIB } } },
    'IMAGE_MEMORY',
    /budget for images on h5/,
  ],
  [
    'more clones than all hosts have room for',
    { request: { cloneCount: 1_000 } },
    'CLONE_MEMORY',
    /room for 448 of 1000 clones: A 112, h0 112, h1 112, h2 112/,
  ],
  [
    'a demand for pages over a device that registers all of them',
    { request: { transport: 'rdma', fetch: 'demand' } },
    'TRANSPORT_UNAVAILABLE',
    /registers all memory of the image on h0/,
  ],
  [
    'a transport within one machine',
    { request: { transport: OWN_MACHINE_TRANSPORT } },
    'TRANSPORT_UNAVAILABLE',
    /different machines/,
  ],
];

describe('the hosts of a fork', () => {
  test('may have clocks that differ by some minutes', () => {
    expect(planned({ at: 'h2', inventory: { clockMs: host('A').clockMs - 299_000 } }).refusals).toEqual([]);
  });

  test('may be as many as can read one image', () => {
    const wishes = Array.from({ length: 128 }, (_, index) => ({ host: `h${index}`, cloneCount: 1 }));
    expect(planned({ wishes, request: { cloneCount: 128 } })).toMatchObject({
      refusals: [],
      plan: { transport: 'tcp' },
    });
  });

  test('share its clones, the root first', () => {
    const { plan, refusals } = planned();
    expect(refusals).toEqual([]);
    expect(plan).toMatchObject({ transport: 'tcp', transportReason: 'asked for', notes: [] });
    expect(plan?.shares).toEqual([
      { host: 'A', first: 0, count: 2 },
      { host: 'h0', first: 2, count: 2 },
      { host: 'h1', first: 4, count: 2 },
      { host: 'h2', first: 6, count: 2 },
    ]);
  });

  test.each(REFUSED)('are refused: %s', (_, change, code, names) => {
    const { plan, refusals } = planned(change);
    expect(plan).toBeNull();
    expect(refusals.map((refusal) => refusal.code)).toContain(code);
    expect(refusals.find((refusal) => refusal.code === code)?.reason).toMatch(names);
    for (const { remedy } of refusals) expect(remedy).not.toBe('');
  });

  test('get all their reasons for a refusal at once', () => {
    const { refusals } = planned({ at: 'h1', inventory: { bridges: [], machines: [] }, fork: { namesTaken: ['x'] } });
    expect(refusals.map(({ code }) => code)).toEqual(['MACHINE_MISSING', 'BRIDGE_MISSING', 'NAME_TAKEN']);
  });

  test('need no bridge for clones without a network of their own', () => {
    expect(planned({ request: { network: 'none' }, at: 'h0', inventory: { bridges: [] } }).refusals).toEqual([]);
  });

  test('with disks are not taken without looking whether the others see them', () => {
    const { plan, refusals } = planned({ root: { vm: { ...vm, owner: 'A' } } });
    expect(plan).toBeNull();
    expect(new Set(refusals.flatMap(({ reason }) => /\bh\d/.exec(reason)?.[0] ?? []))).toEqual(
      new Set(['h0', 'h1', 'h2']),
    );
  });

  test('with disks that the root would serve over more connections than it has are refused', () => {
    const room = { memoryAvailableBytes: 2 ** 50 };
    const { plan, refusals } = planned({
      ...{ wishes: [{ host: 'h0', cloneCount: 600 }], at: 'h0', fork: room },
      root: { ...room, vm: { ...vm, owner: 'A' }, image },
      request: { vm: null, image: image.id, cloneCount: 600 },
    });
    expect(plan).toBeNull();
    expect(refusals).toMatchObject([
      { code: 'HOST_LIMIT', reason: expect.stringMatching(/600 connections to disks of A/) },
    ]);
  });

  test('may leave out the root, which then makes no clones', () => {
    const { plan } = planned({ wishes: EVEN.slice(1) });
    expect(plan?.shares[0]).toEqual({ host: 'A', first: 0, count: 0 });
    expect(plan?.notes).toEqual(['A, the host of vm1, makes no clones, because it is not named']);
  });

  test('take part only with clones', () => {
    const { plan } = planned({ request: { placement: 'pack' } });
    expect(plan?.shares).toEqual([{ host: 'A', first: 0, count: 8 }]);
    expect(plan).not.toHaveProperty('transport');
  });

  test('get an image without a clone if a user wants that', () => {
    const wishes = [{ host: 'h0', cloneCount: 0 }];
    const ofImage = { vm: null, image: IMAGE, cloneCount: 0 };
    const { plan, whole } = planned({ wishes, request: ofImage, root: { image } });
    expect(plan?.shares).toEqual([
      { host: 'A', first: 0, count: 0 },
      { host: 'h0', first: 0, count: 0 },
    ]);
    const { plan: steps } = planFork(whole.request, { host: 'A', waitsFor: null, ...whole });
    expect(steps?.steps.map(({ name }) => name)).toEqual([
      'prepareClones',
      'connectHosts',
      'loadClones',
      'commitFork',
      'runClones',
      'fillImage',
      'releaseParent',
    ]);
  });
});

describe('with --partial', () => {
  const request = { isPartialAllowed: true };

  test('a host that cannot take part is left out, and the others make its clones', () => {
    const change = { request, at: 'h1', inventory: { machines: [] } };
    expect(counts(change)).toEqual({ A: 3, h0: 3, h2: 2 });
    expect(planned(change).plan?.notes).toEqual([expect.stringMatching(/^h1 is left out: .*pc-q35-7\.2/)]);
  });

  test('a host that does not answer is left out', () => {
    const change = { request, at: 'h1', error: new MigrationError('UNREACHABLE', 'nobody is there') };
    expect(counts(change)).toEqual({ A: 3, h0: 3, h2: 2 });
  });

  test('clones without room are left to the report', () => {
    const { plan } = planned({ request: { ...request, cloneCount: 1_000 } });
    expect(plan?.shares.map(({ count }) => count)).toEqual([112, 112, 112, 112]);
    expect(plan?.notes).toEqual(['there is room for 448 clones; the report will list the others']);
  });

  test('a host makes no more than it has room for, whatever it has been given', () => {
    const wishes = ['A', 'h0'].map((name) => ({ host: name, cloneCount: 4 }));
    expect(counts({ request, wishes, at: 'h0', fork: { memoryAvailableBytes: 512 * MIB + 64 * MIB } })).toEqual({
      A: 4,
      h0: 2,
    });
  });

  test('a fork of which nothing is left is refused', () => {
    const wishes = [{ host: 'h0', cloneCount: null }];
    const { plan, refusals } = planned({ request, wishes, at: 'h0', inventory: { machines: [] } });
    expect(plan).toBeNull();
    expect(refusals).toMatchObject([{ code: 'MACHINE_MISSING' }, { code: 'CLONE_MEMORY' }]);
  });
});

describe('the transport', () => {
  test('is the best one that serves all hosts', () => {
    const { plan } = planned({ request: { transport: 'auto' } });
    expect(plan).toMatchObject({ transport: 'rdma', transportReason: 'all hosts reach A by RDMA' });
  });

  test('is TCP if one host is not reached by the better one, and the plan says why', () => {
    const { plan } = planned({
      request: { transport: 'auto' },
      at: 'h1',
      checks: { rdma: { isReached: false } },
    });
    expect(plan?.transport).toBe('tcp');
    expect(plan?.transportReason).toMatch(/h1/);
  });

  test('is TCP for a fork whose hosts read only what they need', () => {
    const { plan } = planned({ request: { transport: 'auto', fetch: 'demand' } });
    expect(plan?.transport).toBe('tcp');
    expect(plan?.transportReason).toMatch(/registers all memory/);
  });
});
