/** QEMUs that are started before a fork, and wait for it. */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { WarmRequest } from '../../../src/domain/fork.js';
import { AMPLE } from '../../hosts/agent-pair.js';
import { eventually } from '../../hosts/cluster.js';
import { ForkHost } from '../../hosts/fork-host.js';

const REMADE_MS = 60_000;

let forks: ForkHost;

beforeAll(async () => {
  forks = await ForkHost.start();
});
afterEach(async () => {
  await forks.host.agent.pool.drain(null);
  await forks.clear();
});
afterAll(() => forks.end());

const code = (expected: string) => expect.objectContaining({ code: expected });

function warmRequest(vm: string, cloneCount = 2): WarmRequest {
  const { namePrefix, parentMode, memory, network, disks } = forks.request(vm);
  return { vm, cloneCount, namePrefix, parentMode, memory, network, disks };
}

const readySets = () => forks.host.agent.pool.list().filter(({ state }) => state === 'ready');

function remade(other: string): Promise<string> {
  return eventually('the set is made again', REMADE_MS, () => {
    const set = readySets().find(({ image }) => image !== other);
    return set?.image;
  });
}

async function expectWorking(names: readonly string[]): Promise<void> {
  for (const name of names) {
    await forks.host.goesOn(name);
    expect(await forks.host.verify(name)).toMatchObject({ bad: 0 });
  }
}

describe('a waiting set', () => {
  test('is taken by the fork that fits, and made again afterwards', async () => {
    const { agent, vms } = forks.host;
    await forks.boot({ name: 'warm', touchMiB: 32, writePercent: 50 });
    const { image } = await agent.pool.warm(warmRequest('warm'));
    expect(readySets()).toMatchObject([{ image, vm: 'warm', cloneCount: 2, readyCount: 2 }]);
    // The pool leaves nothing that a user could mistake for an image, a clone or a running VM.
    expect(agent.images.list()).toEqual([]);
    expect(vms.list().filter(({ state }) => state === 'running')).toHaveLength(1);
    const inventory = await agent.forks.forkInventory(forks.request('warm'));
    expect(inventory.warmCloneCount).toBe(2);
    const outcome = await forks.fork(forks.request('warm'));
    expect(outcome).toMatchObject({ isWarm: true, image });
    await expectWorking(['warm', ...outcome.clones.map(({ name }) => name)]);
    await remade(image);
  });

  test('is not taken by one that does not', async () => {
    const { agent } = forks.host;
    await forks.boot({ name: 'shape', touchMiB: 16 });
    await agent.pool.warm(warmRequest('shape', 2));
    const { coldReason } = await agent.forks.forkInventory(
      forks.request('shape', { namePrefix: 'job', cloneCount: 1 }),
    );
    expect(coldReason).toMatch(/cannot be used: they wait for --clones 2, the default names$/);
    expect((await forks.fork(forks.request('shape', { cloneCount: 1 }))).isWarm).toBe(false);
    expect((await forks.fork(forks.request('shape', { network: 'isolated' }))).isWarm).toBe(false);
    expect((await forks.fork(forks.request('shape'))).isWarm).toBe(true);
  });

  test('goes when one of it dies, and is made again', async () => {
    const { agent, vms } = forks.host;
    await forks.boot({ name: 'mortal', touchMiB: 16 });
    const { image } = await agent.pool.warm(warmRequest('mortal'));
    const [first] = vms.all().filter((vm) => vm.image === image);
    process.kill(first!.pid, 'SIGKILL');
    await remade(image);
    await eventually('the rest of it is gone', REMADE_MS, () =>
      vms.all().some((vm) => vm.image === image) ? undefined : true,
    );
  });

  test('of an earlier daemon is ended and made again', async () => {
    await forks.boot({ name: 'again', touchMiB: 16 });
    const { image } = await forks.host.agent.pool.warm(warmRequest('again'));
    await forks.host.restart();
    expect(forks.host.vms.all().filter((vm) => vm.image === image)).toEqual([]);
    expect(forks.traces().filter((path) => path.includes(image))).toEqual([]);
    await remade(image);
  });

  test('that is drained leaves nothing and does not come again', async () => {
    const { agent, vms } = forks.host;
    await forks.boot({ name: 'drained', touchMiB: 16 });
    await agent.pool.warm(warmRequest('drained'));
    expect(await agent.pool.drain('another')).toEqual({ endedCount: 0 });
    expect(await agent.pool.drain('drained')).toEqual({ endedCount: 2 });
    expect(vms.list()).toHaveLength(1);
    expect(forks.traces()).toEqual([]);
    await forks.host.restart();
    expect(forks.host.agent.pool.list()).toEqual([]);
  });

  test('goes when tasks wait for memory, and comes back when they do so no longer', async () => {
    const { host } = forks;
    const { agent, vms } = host;
    await forks.boot({ name: 'tight', touchMiB: 16 });
    const { image } = await agent.pool.warm(warmRequest('tight'));
    try {
      host.memory = { ...AMPLE, stallPercent: 60 };
      await eventually('all are ended', REMADE_MS, () => (vms.list().length === 1 ? true : undefined));
      expect(agent.pool.list()).toEqual([]);
      await expect(agent.pool.warm(warmRequest('tight', 1))).rejects.toEqual(code('PREFLIGHT_REFUSED'));
    } finally {
      host.memory = AMPLE;
    }
    await remade(image);
  });

  test('that would be over the limit is refused before anything is started', async () => {
    const { agent, vms } = forks.host;
    await forks.boot({ name: 'many', touchMiB: 16 });
    await expect(agent.pool.warm(warmRequest('many', 300))).rejects.toEqual(code('PREFLIGHT_REFUSED'));
    expect(vms.list()).toHaveLength(1);
    expect(forks.traces()).toEqual([]);
  });
});
