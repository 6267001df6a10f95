/** What a daemon does at its start with VMs whose records, or whose sessions' and forks' records, do not fit. */
import { mkdir, writeFile } from 'node:fs/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { SessionStore, type TargetRecord } from '../../../../src/agent/migration/session-store.js';
import type { VmSpec } from '../../../../src/domain/vm.js';
import { FakeHost } from '../../../support/agent-fakes.js';

const [FIRST, SECOND] = ['1'.repeat(32), '2'.repeat(32)];

let host: FakeHost;
beforeEach(async () => {
  host = await FakeHost.make();
});
afterEach(() => host.end());

describe('an incoming VM without a session', () => {
  beforeEach(() => {
    host.vm['state'] = 'incoming';
    host.vm['session'] = FIRST;
  });

  test('is removed if it has never run', async () => {
    await host.agent.start();
    expect(host.destroyed).toEqual(['web']);
  });

  test('is kept if the owner record says that it has run here', async () => {
    await host.registry.swapOwner('web', 1, { vm: 'web', owner: 'A', epoch: 2, session: FIRST });
    await host.agent.start();
    expect(host.destroyed).toEqual([]);
  });

  test.each([
    ['by another session', 'A', SECOND],
    ['on another host', 'B', FIRST],
  ])('is removed if the owner record says that the VM has run %s', async (_, owner, session) => {
    await host.registry.swapOwner('web', 1, { vm: 'web', owner, epoch: 2, session });
    await host.agent.start();
    expect(host.destroyed).toEqual(['web']);
  });
});

describe('an incoming clone without a fork', () => {
  beforeEach(() => {
    host.vm['state'] = 'incoming';
    host.vm['image'] = 'a'.repeat(16);
  });

  test('is removed', async () => {
    await host.agent.start();
    expect(host.destroyed).toEqual(['web']);
  });

  test('is kept while the record of a fork cannot be read, which may be its own', async () => {
    await mkdir(`${host.stateDir}/forks`);
    await writeFile(`${host.stateDir}/forks/${'b'.repeat(16)}.json`, '{}');
    await host.agent.start();
    expect(host.destroyed).toEqual([]);
  });
});

test.each(['running', 'paused'])('a %s VM that belongs to another host is not taken for ours', async (state) => {
  host.vm['state'] = state;
  await host.registry.swapOwner('web', 1, { vm: 'web', owner: 'B', epoch: 2, session: FIRST });
  await host.agent.start();
  expect(host.vm['state']).toBe('departed');
  expect(host.destroyed).toEqual([]);
});

describe('a VM that has run here by the record of its session, but not by its owner record', () => {
  const record = (): TargetRecord => ({
    ...{ version: 1, role: 'target', session: FIRST, job: 'job-77', spec: host.vm['spec'] as VmSpec, source: 'Z' },
    ...{ epoch: 1, mode: 'postcopy', accel: 'tcg', token: 'd'.repeat(64), bandwidthBytesPerS: 0, state: 'resumed' },
    ...{ incarnation: 'e'.repeat(32), nativeUri: null, endpoint: null },
  });
  beforeEach(async () => {
    host.vm['session'] = FIRST;
    await (await SessionStore.open(host.stateDir)).save(record());
  });

  test.each(['restored', 'lost'])('is not discarded, and its owner record is put right: %s', async (how) => {
    if (how === 'lost') await host.registry.removeOwner('web', 1);
    await host.agent.start();
    await expect(host.agent.target.discard(FIRST)).rejects.toMatchObject({ code: 'CONFLICT' });
    expect(host.destroyed).toEqual([]);
    expect(await host.registry.owner('web')).toEqual({
      ...{ vm: 'web', owner: 'A', epoch: 2, session: FIRST, incarnation: 'e'.repeat(32) },
    });
  });

  test('and has left since, is not taken back', async () => {
    await host.registry.swapOwner('web', 1, { vm: 'web', owner: 'B', epoch: 3, session: SECOND });
    await host.agent.start();
    expect(await host.registry.owner('web')).toMatchObject({ owner: 'B', epoch: 3 });
  });
});
