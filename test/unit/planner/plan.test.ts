import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { HostInventory, VmInventory } from '../../../src/domain/host.js';
import type { MigrationOrder, MigrationRequest, StepName } from '../../../src/domain/migration.js';
import type { RdmaInventory } from '../../../src/domain/transport.js';
import { describeBytes } from '../../../src/planner/bytes.js';
import type { PreflightFacts, TargetFacts } from '../../../src/planner/migration/facts.js';
import {
  firstStepOutOfOrder,
  PREREQUISITES,
  planMigration,
  STEPS_OF_MODE,
} from '../../../src/planner/migration/plan.js';
import { goodFacts, host, NO_RDMA, request, spec, vm } from './planner-facts.js';

/** Usually a value of a good case, otherwise any value. */
const near = <T>(good: T, wild: fc.Arbitrary<T>): fc.Arbitrary<T> =>
  fc.oneof({ weight: 39, arbitrary: fc.constant(good) }, { weight: 1, arbitrary: wild });
const figure = fc.oneof(fc.double(), fc.nat(), fc.constant(-1));

const inventory = (name: string): fc.Arbitrary<HostInventory> => {
  const good = host(name);
  return fc.record({
    host: fc.constant(name),
    machineId: near(good.machineId, fc.constant('machine-of-A')),
    protocolVersion: near(1, figure),
    canFetchAhead: near(true, fc.boolean()),
    canTrackWrites: near(true, fc.boolean()),
    dataSecurity: near('integrity', fc.constantFrom('none', 'integrity', 'encrypt')),
    qemuVersion: near(good.qemuVersion, fc.option(fc.string())),
    machines: near(good.machines, fc.array(fc.string())),
    isKvmUsable: fc.boolean(),
    isUserfaultfdPermitted: near(true, fc.boolean()),
    hasMinorFaults: near(true, fc.boolean()),
    isPreloadPresent: near(true, fc.boolean()),
    memoryAvailableBytes: near(good.memoryAvailableBytes, figure),
    ramFileFreeBytes: near(good.ramFileFreeBytes, figure),
    hugePagesFree: fc.dictionary(fc.string(), figure),
    dataAddress: fc.string(),
    rdma: fc.record({
      problem: near<RdmaInventory['problem']>(null, fc.constant(NO_RDMA.problem)),
      devices: near(good.rdma.devices, fc.constant([])),
      address: near(good.rdma.address, fc.option(fc.string())),
      port: near(good.rdma.port, fc.option(figure)),
      lockableBytes: near(good.rdma.lockableBytes, fc.option(figure)),
      cgroupFreeBytes: near(good.rdma.cgroupFreeBytes, fc.option(figure)),
    }),
    vmNames: near(good.vmNames, fc.array(fc.string())),
    bridges: near(good.bridges, fc.array(fc.string())),
    certificateExpiresAt: near(good.certificateExpiresAt, fc.option(fc.string())),
    clockMs: near(good.clockMs, figure),
  });
};

const vmInventory: fc.Arbitrary<VmInventory> = fc.record({
  spec: fc.constantFrom(spec, { ...spec, memory: { ...spec.memory, pageBytes: 2 ** 21 } }),
  state: near('running', fc.constantFrom('starting', 'paused', 'incoming', 'departed', 'stopped')),
  epoch: fc.nat(),
  owner: near('A', fc.string()),
  job: near<string | null>(null, fc.string()),
  qemuVersion: near('7.2.22', fc.string()),
  accel: near<'kvm' | 'tcg'>('tcg', fc.constant('kvm')),
  isRamShared: near(true, fc.boolean()),
  isRamNamedFile: near(true, fc.boolean()),
  migrationBlockers: near<string[]>([], fc.array(fc.string())),
  ramAllocatedBytes: near(2 ** 27, figure),
  discardingDevices: near<string[]>([], fc.array(fc.string())),
  image: near<VmInventory['image']>(
    null,
    fc.record({ id: fc.string(), isComplete: fc.boolean(), ownBytes: fc.double() }),
  ),
  identityIssue: near<string | null>(null, fc.string()),
  exitCode: fc.constant(null),
  fleetingDisks: near<string[]>([], fc.array(fc.string())),
});

const migrationOrder: fc.Arbitrary<MigrationOrder> = fc.record({
  vm: fc.constant('vm1'),
  target: fc.constant('B'),
  mode: fc.constantFrom('postcopy', 'hybrid', 'native-precopy', 'native-postcopy'),
  transport: fc.constantFrom('tcp', 'auto', 'shm', 'rdma'),
  bandwidthBytesPerS: figure,
  downtimeMsMax: figure,
});

const facts: fc.Arbitrary<PreflightFacts> = fc.record({
  sourceHost: inventory('A'),
  vm: vmInventory,
  target: fc.oneof(
    { weight: 8, arbitrary: inventory('B').map((found): TargetFacts => ({ ...goodFacts().target, inventory: found })) },
    {
      weight: 1,
      arbitrary: fc.string().map(
        (text): TargetFacts => ({
          kind: 'unreachable',
          error: new MigrationError('UNREACHABLE', text),
        }),
      ),
    },
    { weight: 1, arbitrary: fc.constant<TargetFacts>({ kind: 'isSource' }) },
  ),
});

describe('a plan', () => {
  test('exists exactly when nothing is refused, and planning never throws', () => {
    let planCount = 0;
    fc.assert(
      fc.property(migrationOrder, facts, (wanted, found) => {
        const { plan, refusals } = planMigration(wanted, found);
        expect(plan === null).toBe(refusals.length > 0);
        for (const { reason, remedy } of refusals) expect(reason !== '' && remedy !== '').toBe(true);
        if (plan === null) return;
        planCount++;
        expect(firstStepOutOfOrder(plan.steps)).toBeNull();
        const before = new Set<StepName>();
        for (const { name, timeoutMs, text } of plan.steps) {
          for (const needed of PREREQUISITES[name].all) expect(before.has(needed)).toBe(true);
          before.add(name);
          expect(timeoutMs).toBeGreaterThanOrEqual(0);
          expect(text).not.toMatch(/undefined|NaN/);
        }
      }),
      { numRuns: 2_000 },
    );
    expect(planCount).toBeGreaterThan(200);
  });

  test.each(Object.entries(STEPS_OF_MODE))('%s: no two steps may change places across a prerequisite', (_, names) => {
    expect(firstStepOutOfOrder(names.map((name) => ({ name })))).toBeNull();
    for (const left of names.keys()) {
      for (let right = left + 1; right < names.length; right++) {
        const swapped = [...names];
        [swapped[left], swapped[right]] = [names[right]!, names[left]!];
        // Only these two pairs do not depend on each other.
        const isFree = `${names[left]} ${names[right]}` === 'prepareTarget exposeSource';
        expect(firstStepOutOfOrder(swapped.map((name) => ({ name }))) === null, swapped.join(' ')).toBe(isFree);
      }
    }
  });

  test('commit cannot be left out, nor the state that it commits, nor done twice', () => {
    const names = STEPS_OF_MODE.postcopy;
    const without = (gone: StepName) => names.filter((name) => name !== gone).map((name) => ({ name }));
    expect(firstStepOutOfOrder(without('commit'))).toBe('resumeTarget');
    expect(firstStepOutOfOrder(without('transferState'))).toBe('commit');
    expect(firstStepOutOfOrder([...names, 'drain' as const].map((name) => ({ name })))).toBe('drain');
    expect(firstStepOutOfOrder([])).toBe('commit');
  });

  test('says for each step where it acts, and which ones the guest waits for', () => {
    const { plan } = planMigration(request, goodFacts());
    expect(plan?.steps.map(({ name, host: at, isInBlackout }) => `${at} ${name}${isInBlackout ? ' *' : ''}`)).toEqual([
      'A reserve',
      'B prepareTarget',
      'A exposeSource',
      'B connectTarget',
      'A stopSource *',
      'A transferState *',
      'A commit *',
      'B resumeTarget *',
      'B drain',
      'A releaseSource',
    ]);
    expect(plan?.memoryBytes).toBe(spec.memory.sizeBytes);
    expect(plan?.source).toBe('A');
  });

  test('a native pre-copy gets time for many passes at the rate it may use', () => {
    const slow: MigrationRequest = { ...request, mode: 'native-precopy', bandwidthBytesPerS: 1024 * 1024 };
    const { plan } = planMigration(slow, { ...goodFacts(), vm });
    const start = plan?.steps.find(({ name }) => name === 'nativeStart');
    expect(start?.timeoutMs).toBe(512 * 1000 * 20);
    expect(plan?.notes.join()).toMatch(/about 512 s at the limit of 1 MiB\/s/);
  });

  test('auto is rdma where both hosts have it and get to each other, else tcp, and says why', () => {
    const good = goodFacts();
    const order: MigrationOrder = { ...request, transport: 'auto' };
    const chosen = (facts: PreflightFacts, change: Partial<MigrationOrder> = {}) => {
      const { plan } = planMigration({ ...order, ...change }, facts);
      return plan === null ? null : `${plan.request.transport}: ${plan.transportReason}`;
    };
    const onTarget = (change: Partial<typeof good.target>): PreflightFacts => ({
      ...good,
      target: { ...good.target, ...change },
    });
    expect(chosen(good)).toBe('rdma: A (mlx5_0, 10.0.1.1) and B (mlx5_0, 10.0.1.2) reach each other by RDMA');
    expect(chosen(onTarget({ inventory: { ...host('B'), rdma: NO_RDMA } }))).toBe(
      'tcp: B cannot use RDMA: it has no RDMA device',
    );
    expect(chosen(onTarget({ checks: { ...good.target.checks, rdma: { isReached: false } } }))).toMatch(
      /^tcp: B cannot reach A/,
    );
    expect(chosen({ ...good, vm: { ...vm, discardingDevices: ['virtio-mem-pci'] } })).toMatch(/^tcp: .*virtio-mem/);
    expect(chosen(good, { mode: 'native-precopy' })).toMatch(/^tcp: .* QEMU's own migration over RDMA/);
    expect(chosen(good, { transport: 'tcp' })).toBe('tcp: asked for');
  });

  test('registering a large memory has the time that it takes', () => {
    const memory = { ...spec.memory, sizeBytes: 2 ** 32 };
    const facts = { ...goodFacts(), vm: { ...vm, spec: { ...spec, memory }, ramAllocatedBytes: 2 ** 32 } };
    const timeouts = (transport: 'tcp' | 'rdma') =>
      planMigration(
        { ...request, transport },
        {
          ...facts,
          target: {
            ...facts.target,
            inventory: { ...host('B'), memoryAvailableBytes: 2 ** 34, ramFileFreeBytes: 2 ** 34 },
          },
        },
      )
        .plan?.steps.filter(({ name }) => name === 'exposeSource' || name === 'connectTarget')
        .map(({ timeoutMs }) => timeoutMs);
    expect(timeouts('tcp')).toEqual([10_000, 10_000]);
    expect(timeouts('rdma')).toEqual([26_000, 26_000]);
  });
});

test.each([
  [0, '0 bytes'],
  [1023, '1023 bytes'],
  [4096, '4 KiB'],
  [1.5 * 2 ** 30, '1.5 GiB'],
  [2 ** 63, '8192 PiB'],
])('%d is %s', (bytes, text) => {
  expect(describeBytes(bytes)).toBe(text);
});
