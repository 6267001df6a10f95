/** Forks of real QEMU guests on one host, without daemons: see test/hosts/fork-host.ts. */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { ForkHost } from '../hosts/fork-host.js';

let forks: ForkHost;

beforeAll(async () => {
  forks = await ForkHost.start();
});
afterEach(() => forks.clear());
afterAll(() => forks.end());

async function expectClean(vm: string): Promise<void> {
  const { pages, bad } = await forks.host.verify(vm);
  expect(pages).toBeGreaterThan(0);
  expect(bad).toBe(0);
  expect(await forks.host.serial(vm)).not.toMatch(/VMG BAD/);
}

describe('a parent that stays stopped', () => {
  test('is the image of its clones, and ends', async () => {
    const { vms } = forks.host;
    await forks.boot({ name: 'frozen', touchMiB: 64 });
    const { clones, image, start } = await forks.fork(forks.request('frozen', { parentMode: 'stop', cloneCount: 3 }));
    expect(start.failures).toEqual([]);
    expect(start.ready).toHaveLength(3);
    expect(vms.get('frozen').state).toBe('stopped');
    for (const { name } of clones) {
      expect(vms.view(vms.get(name))).toMatchObject({ state: 'running', image });
      await forks.host.goesOn(name);
      await expectClean(name);
    }
  });
});
