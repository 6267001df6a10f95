/** Forks of real QEMU guests on one host, without daemons: see test/hosts/fork-host.ts. */
import { execFileSync } from 'node:child_process';
import { rm, statfs } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { PrepareForkRequest } from '../../../src/engine/ports/fork.js';
import { eventually } from '../../hosts/cluster.js';
import { ForkHost } from '../../hosts/fork-host.js';
import { AGENT_POINTS_BEFORE_COMMIT } from '../../hosts/parking.js';

let forks: ForkHost;

beforeAll(async () => {
  forks = await ForkHost.start();
});
afterEach(() => forks.clear());
afterAll(() => forks.end());

const STEPS = ['prepareClones', 'armParent', 'forkPoint', 'loadClones'] as const;

const code = (expected: string) => expect.objectContaining({ code: expected });

async function expectClean(vm: string): Promise<void> {
  const { pages, bad } = await forks.host.verify(vm);
  expect(pages).toBeGreaterThan(0);
  expect(bad).toBe(0);
  expect(await forks.host.serial(vm)).not.toMatch(/VMG BAD/);
}

async function expectWorking(names: readonly string[]): Promise<void> {
  for (const name of names) {
    await forks.host.goesOn(name);
    await expectClean(name);
  }
}

async function upTo(last: (typeof STEPS)[number], request: PrepareForkRequest): Promise<void> {
  const { agent } = forks.host;
  await agent.forks.prepareClones(request);
  for (const step of STEPS.slice(1, STEPS.indexOf(last) + 1)) {
    if (step !== 'prepareClones') await agent.forks[step](request.fork);
  }
}

describe('a parent that runs on', () => {
  test('eight clones of a busy guest: no bad page in any of them, nor in the parent', async () => {
    const { vms, agent } = forks.host;
    await forks.boot({ name: 'busy', memoryMiB: 256, touchMiB: 96, writePercent: 50 });
    const { clones, image, run, point, progress } = await forks.fork(forks.request('busy', { cloneCount: 8 }));
    expect(run.failures).toEqual([]);
    expect(run.ready).toHaveLength(8);
    expect(point.deviceStateBytes).toBeGreaterThan(10_000);
    expect(progress.pagesDone).toBe(progress.pagesTotal);
    expect(progress.counters['pagesZero']).toBeGreaterThan(0);
    expect(vms.view(vms.get('busy'))).toMatchObject({ state: 'running', image: null, job: null });
    await expectWorking(['busy', ...clones.map(({ name }) => name)]);
    for (const { name, uuid } of clones) {
      expect(vms.view(vms.get(name))).toMatchObject({ state: 'running', image, uuid, epoch: 1 });
    }
    expect(agent.images.list()).toMatchObject([{ id: image, state: 'complete', parent: 'busy' }]);
    expect(agent.images.find(image).clones).toHaveLength(8);
    await expect(agent.images.remove(image)).rejects.toEqual(code('CONFLICT'));
    // Everything that only the copying needed is gone with it.
    expect(forks.traces().filter((path) => /\.(parent|presence)$/.test(path))).toEqual([]);
    for (const { name } of clones) await vms.stop(name, { isForced: true });
    await agent.images.remove(image);
    expect(forks.traces()).toEqual([]);
    await expectWorking(['busy']);
  });

  test('is forked twice, one after the other', async () => {
    await forks.boot({ name: 'twice', touchMiB: 32, restPercent: 50 });
    const first = await forks.fork(forks.request('twice'));
    const second = await forks.fork(forks.request('twice'));
    expect(second.image).not.toBe(first.image);
    await expectWorking(['twice', ...[...first.clones, ...second.clones].map(({ name }) => name)]);
  });

  test('an image is run once more, after its parent has ended', async () => {
    const { vms } = forks.host;
    await forks.boot({ name: 'gone', touchMiB: 32, restPercent: 50 });
    const { image } = await forks.fork(forks.request('gone', { cloneCount: 1 }));
    await vms.stop('gone', { isForced: true });
    const again = await forks.fork(forks.request(null, { image, namePrefix: 'again', cloneCount: 2 }));
    expect(again.image).toBe(image);
    expect(again.point.parentPauseMs).toBe(0);
    await expectWorking(['again-0', 'again-1']);
  });
});

test('a clone is forked itself: what it has written is in the clones of it, and in nobody else', async () => {
  const { vms, agent } = forks.host;
  await forks.boot({ name: 'first', touchMiB: 48, restPercent: 50, writePercent: 50 });
  const children = await forks.fork(forks.request('first', { namePrefix: 'child' }));
  await forks.host.goesOn('child-0');
  const grandchildren = await forks.fork(forks.request('child-0', { namePrefix: 'grandchild' }));
  expect(vms.view(vms.get('grandchild-1')).image).toBe(grandchildren.image);
  // Parent and clones no longer need each other.
  await vms.stop('child-0', { isForced: true });
  await expectWorking(['first', 'child-1', 'grandchild-0', 'grandchild-1']);
  await vms.stop('child-1', { isForced: true });
  await agent.images.remove(children.image);
  await expectWorking(['grandchild-0']);
  await expect(agent.forks.prepareClones(forks.request('grandchild-0', { parentMode: 'stop' }))).rejects.toEqual(
    code('UNSUPPORTED'),
  );
});

describe('a parent that stays stopped', () => {
  test('is the image of its clones, and ends', async () => {
    const { vms } = forks.host;
    await forks.boot({ name: 'frozen', touchMiB: 64, restPercent: 50 });
    const { clones, image, run } = await forks.fork(forks.request('frozen', { parentMode: 'stop', cloneCount: 3 }));
    expect(run.failures).toEqual([]);
    expect(run.ready).toHaveLength(3);
    expect(vms.get('frozen').state).toBe('stopped');
    for (const { name } of clones) expect(vms.view(vms.get(name))).toMatchObject({ state: 'running', image });
    await expectWorking(clones.map(({ name }) => name));
  });
});

describe('a fork that is given up', () => {
  test('after each step: the parent runs on, and nothing is left', async () => {
    const { agent, vms } = forks.host;
    await forks.boot({ name: 'kept', touchMiB: 32, restPercent: 50, writePercent: 50 });
    for (const last of STEPS) {
      const request = forks.request('kept', { cloneCount: 3 });
      await upTo(last, request);
      await agent.forks.discardFork(request.fork);
      expect([last, vms.list().map(({ name }) => name), forks.traces()]).toEqual([last, ['kept'], []]);
      await expectWorking(['kept']);
      await agent.forks.discardFork(request.fork);
      await expect(agent.forks.prepareClones(request), last).rejects.toEqual(code('CONFLICT'));
    }
    // The same VM again: nothing is left of all attempts.
    await forks.fork(forks.request('kept', { cloneCount: 1 }));
  });

  test('because of a failure at any point before the commit', async () => {
    const { vms, failures, agent } = forks.host;
    await forks.boot({ name: 'faulty', touchMiB: 32, restPercent: 50, writePercent: 50 });
    for (const point of AGENT_POINTS_BEFORE_COMMIT) {
      const request = forks.request('faulty');
      failures.add(point);
      await expect(forks.fork(request), point).rejects.toEqual(code('CANCELLED'));
      expect([point, failures]).toEqual([point, new Set()]);
      await agent.forks.discardFork(request.fork);
      await agent.source.unreserve('faulty', request.job);
      const left = vms.list().map(({ name, state }) => `${name} ${state}`);
      expect([point, left, forks.traces()]).toEqual([point, ['faulty running'], []]);
      await forks.host.goesOn('faulty');
    }
    await expectClean('faulty');
  });

  test('after the commit it is not given up any more', async () => {
    const { agent } = forks.host;
    await forks.boot({ name: 'forked', touchMiB: 32, restPercent: 50 });
    const request = forks.request('forked', { cloneCount: 1 });
    await agent.forks.prepareClones(request);
    await agent.forks.armParent(request.fork);
    await agent.forks.forkPoint(request.fork);
    await agent.forks.loadClones(request.fork);
    await expect(agent.forks.runClones(request.fork)).rejects.toEqual(code('CONFLICT'));
    await agent.forks.commitFork(request.fork);
    await expect(agent.forks.discardFork(request.fork)).rejects.toEqual(code('CONFLICT'));
    // Nor is it forgotten before the clones have run.
    await expect(agent.forks.finishFork(request.fork)).rejects.toEqual(code('CONFLICT'));
    await agent.forks.runClones(request.fork);
    await forks.filled(request.fork);
    await agent.forks.finishFork(request.fork);
  });

  test('because a clone dies before it loads: the clone is named, and its QEMU quoted', async () => {
    const { agent, vms } = forks.host;
    await forks.boot({ name: 'unlucky', touchMiB: 32, restPercent: 50 });
    const request = forks.request('unlucky', { cloneCount: 3, namePrefix: 'sad' });
    await agent.forks.prepareClones(request);
    await agent.forks.armParent(request.fork);
    await agent.forks.forkPoint(request.fork);
    process.kill(vms.get('sad-1').pid, 'SIGKILL');
    await expect(agent.forks.loadClones(request.fork)).rejects.toMatchObject({
      message: expect.stringContaining('sad-1'),
    });
    await agent.forks.discardFork(request.fork);
    expect(vms.list().map(({ name }) => name)).toEqual(['unlucky']);
    await expectWorking(['unlucky']);
  });

  test('not if the others are enough', async () => {
    const { agent, vms } = forks.host;
    await forks.boot({ name: 'lucky', touchMiB: 32, restPercent: 50 });
    const request = forks.request('lucky', { cloneCount: 3, namePrefix: 'some', isPartialAllowed: true });
    await agent.forks.prepareClones(request);
    await agent.forks.armParent(request.fork);
    await agent.forks.forkPoint(request.fork);
    process.kill(vms.get('some-1').pid, 'SIGKILL');
    const { failures } = await agent.forks.loadClones(request.fork);
    expect(failures).toMatchObject([{ index: 1, name: 'some-1' }]);
    await agent.forks.commitFork(request.fork);
    const { ready } = await agent.forks.runClones(request.fork);
    expect(new Set(ready.map(({ index }) => index))).toEqual(new Set([0, 2]));
    await forks.filled(request.fork);
    await agent.forks.finishFork(request.fork);
    expect(vms.has('some-1')).toBe(false);
    await expectWorking(['lucky', 'some-0', 'some-2']);
  });
});

test('a parent that is killed while its image is filled: the clones lack nothing', async () => {
  const { vms, agent } = forks.host;
  await forks.boot({ name: 'killed', memoryMiB: 384, touchMiB: 256 });
  const request = forks.request('killed');
  const { clones } = await agent.forks.prepareClones(request);
  await agent.forks.armParent(request.fork);
  await agent.forks.forkPoint(request.fork);
  process.kill(vms.get('killed').pid, 'SIGKILL');
  await agent.forks.loadClones(request.fork);
  await agent.forks.commitFork(request.fork);
  await agent.forks.runClones(request.fork);
  await forks.filled(request.fork);
  await agent.forks.finishFork(request.fork);
  await expect.poll(() => vms.get('killed').state).toBe('stopped');
  await expectWorking(clones.map(({ name }) => name));
});

test('a clone that is killed while the image is filled does not keep the others from it', async () => {
  const { vms, agent } = forks.host;
  await forks.boot({ name: 'family', memoryMiB: 384, touchMiB: 256 });
  const request = forks.request('family', { namePrefix: 'child', cloneCount: 3 });
  await agent.forks.prepareClones(request);
  await agent.forks.armParent(request.fork);
  await agent.forks.forkPoint(request.fork);
  await agent.forks.loadClones(request.fork);
  await agent.forks.commitFork(request.fork);
  await agent.forks.runClones(request.fork);
  process.kill(vms.get('child-1').pid, 'SIGKILL');
  await forks.filled(request.fork);
  await agent.forks.finishFork(request.fork);
  await expectWorking(['family', 'child-0', 'child-2']);
});

test('clones with memory of their own are VMs that need no image', async () => {
  const { vms, agent } = forks.host;
  await forks.boot({ name: 'giver', touchMiB: 64, writePercent: 50 });
  const { clones, image } = await forks.fork(forks.request('giver', { memory: 'private' }));
  for (const { name } of clones) {
    expect(vms.view(vms.get(name))).toMatchObject({ state: 'running', image: null, job: null });
    expect(vms.get(name).spec.memory.backing).toBe('shared');
  }
  await agent.images.remove(image);
  await expectWorking(['giver', ...clones.map(({ name }) => name)]);
  // The clone is an ordinary VM, so it can be forked itself.
  const next = await forks.fork(forks.request(clones[0]!.name, { cloneCount: 1 }));
  await expectWorking(next.clones.map(({ name }) => name));
});

test('a file system that is full before the clones run: the fork is given up, and the parent runs on', async () => {
  const small = await ForkHost.start({ ramMiB: 448 });
  const filler = join(small.host.ramDir, 'filler');
  try {
    const { vms, agent } = small.host;
    await small.boot({ name: 'large', memoryMiB: 192, touchMiB: 64, writePercent: 50 });
    // The guest itself must not need more space than it has, because that would be a failure of its own.
    const [memory] = vms.get('large').regions;
    execFileSync('fallocate', ['-l', '192M', memory!.path]);
    const request = small.request('large');
    await agent.forks.prepareClones(request);
    // Other files take the space that was free when the image was created.
    const { bavail, bsize } = await statfs(small.host.ramDir);
    execFileSync('fallocate', ['-l', String(bavail * bsize - 40 * 2 ** 20), filler]);
    await agent.forks.armParent(request.fork);
    await agent.forks.forkPoint(request.fork);
    await eventually('the failure', 60_000, async () =>
      (await agent.forks.forkProgress(request.fork)).state === 'failed' ? true : undefined,
    );
    await expect(agent.forks.loadClones(request.fork)).rejects.toEqual(code('NO_SPACE'));
    await agent.forks.discardFork(request.fork);
    await rm(filler);
    expect(vms.list().map(({ name }) => name)).toEqual(['large']);
    expect(small.traces()).toEqual([]);
    await small.host.goesOn('large');
    expect(await small.host.verify('large')).toMatchObject({ bad: 0 });
  } finally {
    await small.end();
  }
});

describe('a host whose daemon is restarted', () => {
  test('before the commit undoes the fork, and the parent runs on', async () => {
    await forks.boot({ name: 'survivor', touchMiB: 32, restPercent: 50, writePercent: 50 });
    for (const last of ['armParent', 'forkPoint', 'loadClones'] as const) {
      await upTo(last, forks.request('survivor'));
      await forks.host.restart();
      await eventually('the parent is alone', 60_000, () => (forks.host.vms.list().length === 1 ? true : undefined));
      expect([last, forks.traces()]).toEqual([last, []]);
      await expectWorking(['survivor']);
    }
  });

  test('after the commit goes on filling the image', async () => {
    await forks.boot({ name: 'lasting', memoryMiB: 384, touchMiB: 256, writePercent: 50 });
    const request = forks.request('lasting');
    const { agent } = forks.host;
    const { clones } = await agent.forks.prepareClones(request);
    await agent.forks.armParent(request.fork);
    await agent.forks.forkPoint(request.fork);
    await agent.forks.loadClones(request.fork);
    await agent.forks.commitFork(request.fork);
    await agent.forks.runClones(request.fork);
    await forks.host.restart();
    await forks.filled(request.fork);
    await forks.host.agent.forks.finishFork(request.fork);
    await expectWorking(['lasting', ...clones.map(({ name }) => name)]);
    for (const { name } of clones) expect(forks.host.vms.get(name).state).toBe('running');
  });
});
