/** The go of a fork: its clones run only after the commit, and a go that was interrupted is given again. */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { PrepareForkRequest } from '../../../src/engine/ports/fork.js';
import { eventually } from '../../hosts/cluster.js';
import { ForkHost } from '../../hosts/fork-host.js';

let forks: ForkHost;

beforeAll(async () => {
  forks = await ForkHost.start();
});
afterEach(() => forks.clear());
afterAll(() => forks.end());

const code = (expected: string) => expect.objectContaining({ code: expected });

async function expectWorking(names: readonly string[]): Promise<void> {
  for (const name of names) {
    await forks.host.goesOn(name);
    const { pages, bad } = await forks.host.verify(name);
    expect(pages).toBeGreaterThan(0);
    expect(bad).toBe(0);
  }
}

/** Forks up to the commit. */
async function commit(request: PrepareForkRequest): Promise<string[]> {
  const calls = forks.host.agent.forks;
  const { clones } = await calls.prepareClones(request);
  await calls.armParent(request.fork);
  await calls.forkPoint(request.fork);
  await calls.loadClones(request.fork);
  await calls.commitFork(request.fork);
  return clones.map(({ name }) => name);
}

async function finish(request: PrepareForkRequest): Promise<void> {
  await forks.filled(request.fork);
  await forks.host.agent.forks.finishFork(request.fork);
}

describe('between the commit and the go', () => {
  const states = (names: readonly string[]) => names.map((name) => forks.host.vms.get(name).state);

  test.each(['cow', 'private'] as const)('the clones (%s) wait, also through a restart', async (memory) => {
    await forks.boot({ name: 'ready', memoryMiB: 256, touchMiB: 96, writePercent: 50 });
    const request = forks.request('ready', { memory });
    const names = await commit(request);
    expect(states(names)).toEqual(['incoming', 'incoming']);
    await forks.host.restart();
    await forks.host.goesOn('ready');
    expect(states(names)).toEqual(['incoming', 'incoming']);
    for (const name of names) {
      expect(await forks.host.vms.get(name).process.loadState()).toBe('loaded');
      expect(await forks.host.serial(name)).toBe('');
    }
    await expect(forks.host.agent.forks.discardFork(request.fork)).rejects.toEqual(code('CONFLICT'));
    const { ready, failures } = await forks.host.agent.forks.runClones(request.fork);
    expect(failures).toEqual([]);
    expect(new Set(ready.map(({ index }) => index))).toEqual(new Set([0, 1]));
    // A repeated call says the same, and does nothing.
    expect((await forks.host.agent.forks.runClones(request.fork)).ready).toHaveLength(2);
    await finish(request);
    expect(states(names)).toEqual(['running', 'running']);
    await expectWorking(['ready', ...names]);
  });

  test('a clone that is killed has ended, and the others run', async () => {
    await forks.boot({ name: 'three', touchMiB: 32 });
    const { vms, agent } = forks.host;
    const request = forks.request('three', { namePrefix: 'one', cloneCount: 3 });
    await commit(request);
    process.kill(vms.get('one-1').pid, 'SIGKILL');
    const { ready, failures } = await agent.forks.runClones(request.fork);
    expect(new Set(ready.map(({ index }) => index))).toEqual(new Set([0, 2]));
    expect(failures).toMatchObject([{ index: 1, name: 'one-1', error: { code: 'QEMU_GONE' } }]);
    await finish(request);
    expect(vms.get('one-1').state).toBe('stopped');
    await expectWorking(['three', 'one-0', 'one-2']);
  });

  test('a user may end a clone by force', async () => {
    await forks.boot({ name: 'two', touchMiB: 32 });
    const { vms, agent } = forks.host;
    const request = forks.request('two', { namePrefix: 'of' });
    await commit(request);
    expect(agent.isUnclaimed('of-1')).toBe(true);
    await vms.stop('of-1', { isForced: true, isUnclaimed: true });
    expect((await agent.forks.runClones(request.fork)).failures).toMatchObject([{ name: 'of-1' }]);
    await finish(request);
    expect(vms.get('of-1').state).toBe('stopped');
    await expectWorking(['two', 'of-0']);
  });
});

test('a go that was interrupted runs the rest, and not what its user has paused', async () => {
  await forks.boot({ name: 'begun', touchMiB: 32 });
  const request = forks.request('begun', { namePrefix: 'child', cloneCount: 3 });
  const names = await commit(request);
  forks.host.failures.add('agent:fork:resume');
  await expect(forks.host.agent.forks.runClones(request.fork)).rejects.toEqual(code('CANCELLED'));
  await forks.host.restart();
  const first = await eventually('clones run', 10_000, () => {
    const running = names.filter((name) => forks.host.vms.get(name).state === 'running');
    return running.length === 2 ? running : undefined;
  });
  await forks.host.vms.pause(first[0]!);
  const { ready, failures } = await forks.host.agent.forks.runClones(request.fork);
  expect(failures).toEqual([]);
  expect(ready).toHaveLength(3);
  await finish(request);
  expect(forks.host.vms.get(first[0]!).state).toBe('paused');
  await forks.host.vms.resume(first[0]!);
  await expectWorking(['begun', ...names]);
});

test('an undo refuses to end a clone that somebody has resumed before the commit', async () => {
  await forks.boot({ name: 'meddled', touchMiB: 32 });
  const { vms, agent } = forks.host;
  const request = forks.request('meddled', { namePrefix: 'early' });
  await agent.forks.prepareClones(request);
  await agent.forks.armParent(request.fork);
  await agent.forks.forkPoint(request.fork);
  await agent.forks.loadClones(request.fork);
  await vms.get('early-1').process.run();
  await eventually('it is known to run', 10_000, () => (vms.get('early-1').hasRun ? true : undefined));
  await expect(agent.forks.discardFork(request.fork)).rejects.toMatchObject({
    ...{ code: 'STEP_FAILED', message: expect.stringContaining('early-1 has run') },
  });
  await forks.host.goesOn('early-1');
  expect(agent.isUnclaimed('early-0')).toBe(false);
  expect(agent.isUnclaimed('early-1')).toBe(true);
  await vms.stop('early-1', { isForced: true, isUnclaimed: true });
  await vms.stop('early-1', { isForced: true });
  await agent.forks.discardFork(request.fork);
  expect(vms.list().map(({ name }) => name)).toEqual(['meddled']);
  expect(forks.traces()).toEqual([]);
  await expectWorking(['meddled']);
});
