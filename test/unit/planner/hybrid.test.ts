import { describe, expect, test } from 'vitest';
import type { HostInventory, VmInventory } from '../../../src/domain/host.js';
import type { MigrationRequest } from '../../../src/domain/migration.js';
import type { VmSpec } from '../../../src/domain/vm.js';
import { planMigration } from '../../../src/planner/migration/plan.js';
import { goodFacts, host, request, spec, vm } from './planner-facts.js';
import { expectMigrationRemedyWorks } from './remedies.js';

interface Change {
  readonly request?: Partial<MigrationRequest>;
  readonly source?: Partial<HostInventory>;
  readonly target?: Partial<HostInventory>;
  readonly spec?: Partial<VmSpec>;
  readonly vm?: Partial<VmInventory>;
}

function planned(change: Change) {
  const { target, ...good } = goodFacts();
  return planMigration(
    { ...request, mode: 'hybrid', ...change.request },
    {
      ...good,
      sourceHost: { ...host('A'), ...change.source },
      target: { ...target, inventory: { ...host('B'), ...change.target } },
      vm: { ...vm, ...change.vm, spec: { ...spec, ...change.spec } },
    },
  );
}

describe('a hybrid', () => {
  test.each<[string, Change, string, RegExp]>([
    ['a VM without the preload', { spec: { hasPreload: false } }, 'PRELOAD_MISSING', /^vm1 runs without the preload/],
    [
      'a target of an earlier build',
      { target: { canFetchAhead: false } },
      'PROTOCOL_VERSION',
      /^B has a build that cannot fetch memory/,
    ],
    [
      'a source whose kernel does not note writes',
      { source: { canTrackWrites: false } },
      'WRITE_PROTECT_MISSING',
      /^the kernel of A cannot note/,
    ],
  ])('is refused for %s, and --postcopy works', (_, change, code, reason) => {
    const { plan, refusals } = planned(change);
    expect(plan).toBeNull();
    expect(refusals.map((refusal) => refusal.code)).toEqual([code]);
    expect(refusals[0]?.reason).toMatch(reason);
    expect(refusals[0]?.remedy).toContain('--postcopy');
    expectMigrationRemedyWorks(refusals[0]!, (to) => planned({ ...change, request: to }).refusals);
  });

  test.each<[string, Partial<VmInventory>, RegExp]>([
    ['others write', { escapingDevices: ['vhost-user-blk-pci'] }, /^vhost-user-blk-pci lets processes other than QEMU/],
    ['the guest may give back', { discardingDevices: ['virtio-balloon-pci'] }, /^virtio-balloon-pci lets vm1 free/],
    ['a disk may write past its page tables', { directDisks: ['disk0'] }, /^block node disk0 of vm1 reads with cache/],
  ])('is refused for a VM whose memory %s', (_, of, reason) => {
    const { refusals } = planned({ vm: of });
    expect(refusals.map((refusal) => refusal.code)).toEqual(['DEVICE_NOT_MIGRATABLE']);
    expect(refusals[0]?.reason).toMatch(reason);
  });

  test('needs nothing of the other host that it needs of one', () => {
    expect(planned({ source: { canFetchAhead: false }, target: { canTrackWrites: false } }).refusals).toEqual([]);
  });

  test('fetches memory before anything of the blackout, and says what moves when', () => {
    const { plan } = planned({ request: { verifyMemory: false } });
    const names = plan?.steps.map(({ name, host: at, isInBlackout }) => `${at} ${name}${isInBlackout ? ' *' : ''}`);
    expect(names?.slice(3, 6)).toEqual(['B connectTarget', 'B push', 'A stopSource *']);
    const push = plan?.steps.find(({ name }) => name === 'push');
    expect(push?.text).toBe(
      'fetch the memory while vm1 runs on A, and again what it writes meanwhile, while that pays',
    );
    expect(push?.timeoutMs).toBe(0);
    expect(plan?.notes.join()).toMatch(/512 MiB move while vm1 runs on the source.*what vm1 writes meanwhile/);
  });
});
