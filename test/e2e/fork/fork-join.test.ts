/**
 * A fork on two hosts, with real QEMU guests and without daemons (test/hosts/agent-pair.ts): the clones of the second
 * host run on an image that it reads from the first, while the parent runs on and both images fill.
 */
import { execFileSync } from 'node:child_process';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { PrepareForkRequest } from '../../../src/engine/ports/fork.js';
import { type AgentHost, AgentPair } from '../../hosts/agent-pair.js';
import { eventually } from '../../hosts/cluster.js';
import { forkRequest } from '../../hosts/fork-host.js';
import { fillTmpfs } from '../../hosts/full-file-system.js';
import { type Counts, TwoHostFork } from '../../hosts/two-host-fork.js';

const FILL_MS = 60_000;

let pair: AgentPair;

beforeAll(async () => {
  pair = await AgentPair.start();
});
afterEach(async () => {
  pair.removed.clear();
  await pair.clear();
});
afterAll(() => pair.end());

const code = (expected: string) => expect.objectContaining({ code: expected });

const forkOf = (vm: string, change?: Partial<PrepareForkRequest>, counts?: Counts) =>
  TwoHostFork.of(pair, vm, change, counts);

/** Half of the time the guest rests: with its clones there are more guests than processors. */
const boot = (touchMiB: number) => pair.boot({ name: 'web', touchMiB, restPercent: 50 });

function clonesOn(host: AgentHost): string[] {
  return host.vms.list().flatMap(({ name, state }) => (name.includes('-') && state === 'running' ? [name] : []));
}

async function expectSound(host: AgentHost, vms: readonly string[]): Promise<void> {
  for (const vm of vms) {
    await host.goesOn(vm);
    const { pages, bad } = await host.verify(vm);
    expect([vm, pages > 0, bad]).toEqual([vm, true, 0]);
    expect(await host.serial(vm)).not.toMatch(/VMG BAD/);
  }
}

describe('a fork on two hosts', () => {
  test('its clones run on both, from pages of one moment, and share each image', async () => {
    const { a, b } = pair;
    await boot(64);
    const fork = await forkOf('web');
    await fork.upToLoad();
    await expect(b.agent.forks.runClones(fork.fork)).rejects.toThrow(code('CONFLICT'));
    // Another fork would bring the same image at the same time. Its undo leaves it to this one.
    const other = { ...fork.joining, fork: forkRequest(null).fork, namePrefix: 'other' };
    await expect(b.agent.forks.prepareClones(other)).rejects.toThrow(`image ${fork.fork} on B is capturing`);
    await b.agent.forks.discardFork(other.fork);
    await fork.commit();
    await fork.run();
    await fork.finish();
    expect([clonesOn(a).length, clonesOn(b).length]).toEqual([1, 2]);
    await expectSound(a, ['web', ...clonesOn(a)]);
    await expectSound(b, clonesOn(b));
    const [here, there] = [a, b].map(({ agent }) => agent.images.find(fork.fork));
    expect(there).toMatchObject({ state: 'complete', parent: 'web', pagesDone: here?.pagesTotal });
    // The holes of the image are holes on the other host, too.
    expect(there?.allocatedBytes).toBeLessThanOrEqual((here?.allocatedBytes ?? 0) * 1.1);
    expect(there?.allocatedBytes).toBeGreaterThan(0);
  });

  test('before the commit all of it is undone, before the fork point and after it', async () => {
    const { a, b } = pair;
    await boot(32);
    const early = await forkOf('web');
    await a.agent.forks.prepareClones(early.request);
    await a.agent.forks.armParent(early.fork);
    // An image that is still being captured is served by TCP, whatever is asked for.
    expect(await a.agent.forks.serveImage(early.fork, 'B', 'shm')).toMatchObject({ endpoint: { transport: 'tcp' } });
    await expect(a.agent.forks.connectImage(early.fork, 'tcp')).rejects.toThrow(code('CONFLICT'));
    await expect(a.agent.forks.sendForkState(early.fork, 'B')).rejects.toThrow(code('CONFLICT'));
    await a.agent.forks.discardFork(early.fork);
    expect([...a.forkTraces(), ...b.forkTraces()]).toEqual([]);

    const fork = await forkOf('web');
    await fork.upToLoad();
    await Promise.all([a, b].map(({ agent }) => agent.forks.discardFork(fork.fork)));
    await a.agent.source.unreserve('web', fork.request.job);
    expect([...a.forkTraces(), ...b.forkTraces()]).toEqual([]);
    expect(b.vms.list()).toEqual([]);
    await expectSound(a, ['web']);
    await expect(b.agent.forks.prepareClones(fork.joining)).rejects.toThrow(code('CONFLICT'));
  });

  test('a restarted daemon of the host that joined leaves the decision to the coordinator', async () => {
    const { a, b } = pair;
    await boot(32);
    const fork = await forkOf('web');
    await fork.upToLoad();
    // The commit was decided, and this host has not heard of it.
    await a.agent.forks.commitFork(fork.fork);
    await b.restart();
    expect(b.vms.list().map(({ state }) => state)).toEqual(['incoming', 'incoming']);
    await b.agent.forks.commitFork(fork.fork);
    await fork.run();
    await fork.finish();
    await expectSound(b, clonesOn(b));

    // Another fork, which is decided otherwise.
    const other = await forkOf('web');
    await other.upToLoad();
    await b.restart();
    expect(b.vms.list()).toHaveLength(4);
    pair.removed.add('A');
    await b.restart();
    expect(b.vms.list()).toHaveLength(2);
    await Promise.all([a, b].map(({ agent }) => agent.forks.discardFork(other.fork)));
    await a.agent.source.unreserve('web', other.request.job);
    expect(b.forkTraces().filter((path) => path.includes(other.fork))).toEqual([]);
    expect(clonesOn(b)).toHaveLength(2);
  });

  test('goes on when either daemon is restarted while the images fill', async () => {
    const { a, b } = pair;
    await boot(64);
    const fork = await forkOf('web');
    await fork.upToLoad();
    await fork.commit();
    // Nobody tells the host that joined where the image is now.
    await b.restart();
    await fork.run();
    await a.restart();
    await fork.finish();
    await expectSound(a, ['web', ...clonesOn(a)]);
    await expectSound(b, clonesOn(b));
  });

  test.each([
    ['the host of the parent', [0, 2]],
    ['the host that joins, which only gets the image,', [1, 0]],
  ] as const)('%s makes no clones', async (_, counts) => {
    const { a, b } = pair;
    await boot(32);
    const fork = await forkOf('web', {}, counts);
    await fork.upToLoad();
    await b.restart();
    await fork.commit();
    await a.restart();
    await fork.run();
    await fork.finish();
    expect([clonesOn(a).length, clonesOn(b).length]).toEqual(counts);
    expect(b.agent.images.find(fork.fork)).toMatchObject({ state: 'complete' });
    await expectSound(a, ['web', ...clonesOn(a)]);
    await expectSound(b, clonesOn(b));
    if (counts[1] > 0) return;
    // The image that was copied is as good as the original.
    const later = forkRequest(null, { image: fork.fork, cloneCount: 1 });
    await b.agent.forks.prepareClones(later);
    await b.agent.forks.loadClones(later.fork);
    await b.agent.forks.commitFork(later.fork);
    await b.agent.forks.runClones(later.fork);
    await expectSound(b, clonesOn(b));
    await b.agent.forks.finishFork(later.fork);
  });

  test('the image is read after the fork of its host is over, and is kept for its reader', async () => {
    const { a, b } = pair;
    await boot(64);
    const fork = await forkOf('web');
    await fork.upToLoad();
    await fork.commit();
    await a.agent.forks.runClones(fork.fork);
    await fork.finish([a]);
    // The holder of the capture is gone, and its files are read instead.
    await eventually('the image is found again', 5_000, async () =>
      b.log.find(({ message }) => message === 'the source is connected again'),
    );
    expect(await a.agent.forks.forkDecision(fork.fork)).toEqual({ decision: 'discarded' });
    await expect(a.agent.forks.forkProgress(fork.fork)).rejects.toThrow(code('NOT_FOUND'));
    await expect(a.agent.forks.prepareClones(fork.request)).rejects.toThrow(code('CONFLICT'));
    for (const name of clonesOn(a)) await a.vms.destroy(name);
    await expect(a.agent.images.remove(fork.fork)).rejects.toThrow('host B still reads image');
    await a.restart();
    expect(await a.agent.forks.forkDecision(fork.fork)).toEqual({ decision: 'discarded' });
    await expect(a.agent.images.remove(fork.fork)).rejects.toThrow('host B still reads image');
    await b.agent.forks.runClones(fork.fork);
    await fork.finish([b]);
    await expectSound(b, clonesOn(b));
    await eventually('nobody reads the image', 5000, async () =>
      a.agent.images.find(fork.fork).readers === undefined ? true : undefined,
    );
    await a.agent.images.remove(fork.fork);
  });

  test('an image that is gone from its host leaves its clones on the other host waiting, and that shows', async () => {
    const { a, b } = pair;
    await boot(32);
    const fork = await forkOf('web');
    await fork.upToLoad();
    await fork.commit();
    await a.agent.forks.runClones(fork.fork);
    await fork.finish([a]);
    for (const name of clonesOn(a)) await a.vms.destroy(name);
    await a.agent.images.remove(fork.fork, { isForced: true, isDroppingSaved: false });
    await b.agent.forks.runClones(fork.fork);
    await eventually('the trouble is visible', 10_000, async () => {
      const { state, error } = await b.agent.forks.forkProgress(fork.fork);
      expect(state).toBe('filling');
      return (error as { code?: string } | null)?.code === 'NOT_FOUND' ? true : undefined;
    });
    // Before it is gone it is being removed.
    await expect.poll(() => b.agent.images.find(fork.fork).problem, { timeout: 10_000 }).toContain('no image');
    // Their records say so a moment after the go.
    await eventually('the clones run', 10_000, async () => (clonesOn(b).length === 2 ? true : undefined));

    // Its operator removes the root from the peers.
    pair.removed.add('A');
    await b.restart();
    await eventually('the clones end', 10_000, async () => {
      const reasons = b.vms.list().map(({ exit }) => exit?.reason);
      return reasons.join() === 'root-removed,root-removed' ? true : undefined;
    });
    expect(b.agent.images.find(fork.fork)).toMatchObject({ state: 'failed', problem: expect.stringMatching('only A') });
    await eventually('the fork ends here', 10_000, () => b.agent.images.remove(fork.fork).catch(() => undefined));
  });

  test('an image that is read on demand takes what its clones touch, and is completed later', async () => {
    const { a, b } = pair;
    await boot(48);
    const fork = await forkOf('web', { fetch: 'demand' }, [0, 2]);
    await expect(b.agent.forks.completeImage(fork.fork)).rejects.toThrow(code('NOT_FOUND'));
    await fork.upToLoad();
    await fork.commit();
    await fork.run();
    expect(await b.agent.forks.forkProgress(fork.fork)).toMatchObject({ state: 'lazy', error: null });
    await fork.finish();
    await expect(b.agent.forks.forkProgress(fork.fork)).rejects.toThrow(code('NOT_FOUND'));
    await expect(b.agent.forks.discardFork(fork.fork)).rejects.toThrow(code('CONFLICT'));
    for (const name of clonesOn(b)) await b.goesOn(name);
    const share = () => {
      const { state, pagesDone, pagesTotal } = b.agent.images.find(fork.fork);
      expect(state).toBe('filling');
      return pagesDone / pagesTotal;
    };
    const before = share();
    await b.restart();
    for (const name of clonesOn(b)) await b.goesOn(name);
    expect([before > 0, share() >= before, share() < 0.75]).toEqual([true, true, true]);
    const [here, there] = [a, b].map(({ agent }) => agent.images.find(fork.fork).allocatedBytes);
    expect(there).toBeLessThan((here ?? 0) * 0.75);
    // Missing pages are holes of its files.
    await expect(b.agent.forks.prepareClones(forkRequest(clonesOn(b)[0] ?? null))).rejects.toThrow(code('VM_BUSY'));
    await expect(b.agent.images.remove(fork.fork)).rejects.toThrow('has clones');

    await b.agent.forks.completeImage(fork.fork);
    await eventually('the image is complete', FILL_MS, async () =>
      b.agent.images.find(fork.fork).state === 'complete' ? true : undefined,
    );
    await eventually('nothing is left of the fork', 5_000, async () =>
      b.forkTraces().some((path) => path.includes(`forks/${fork.fork}`) || path.includes('presence'))
        ? undefined
        : true,
    );
    expect(a.agent.images.find(fork.fork).readers).toBeUndefined();
    await b.agent.forks.completeImage(fork.fork);
    await expectSound(b, clonesOn(b));
  });

  test('an image that is read on demand can be removed when its clones have ended', async () => {
    const { a, b } = pair;
    await boot(32);
    const fork = await forkOf('web', { fetch: 'demand' }, [0, 2]);
    await fork.upToLoad();
    await fork.commit();
    await fork.run();
    await fork.finish();
    for (const name of clonesOn(b)) await b.vms.stop(name, { isForced: true });
    expect(a.agent.images.find(fork.fork).readers).toEqual(['B']);
    await b.agent.images.remove(fork.fork);
    expect(b.forkTraces()).toEqual([]);
    await eventually('nobody reads the image', 5_000, async () =>
      a.agent.images.find(fork.fork).readers === undefined ? true : undefined,
    );
  });

  test('a host without room for all pages has its clones ended, and those of the other run on', async () => {
    const { a, b } = pair;
    await boot(64);
    await b.stop();
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=512m', 'none', b.ramDir]);
    await b.start();
    try {
      const fork = await forkOf('web');
      await fork.upToLoad();
      // The room was there when it was promised. Then another program takes it.
      await fillTmpfs(b.ramDir);
      await fork.commit();
      await Promise.all([a, b].map(({ agent }) => agent.forks.runClones(fork.fork)));
      await eventually('the image has failed', FILL_MS, async () => {
        const { state, error } = await b.agent.forks.forkProgress(fork.fork);
        return state === 'failed' ? (expect(error).toMatchObject({ code: 'NO_SPACE' }) ?? true) : undefined;
      });
      await b.agent.forks.finishFork(fork.fork);
      await fork.finish([a]);
      expect([clonesOn(a).length, b.vms.list().map(({ state }) => state)]).toEqual([1, ['stopped', 'stopped']]);
      // None has read a zero instead of data.
      for (const { name } of b.vms.list()) expect(await b.serial(name)).not.toMatch(/VMG BAD/);
      await expectSound(a, ['web', ...clonesOn(a)]);
      expect(b.agent.images.find(fork.fork)).toMatchObject({ state: 'failed', allocatedBytes: 0 });
      for (const { name } of b.vms.list()) await b.vms.stop(name, { isForced: true });
      await b.agent.images.remove(fork.fork);
      expect([b.vms.list(), b.forkTraces()]).toEqual([[], []]);
      await expect.poll(() => a.agent.images.find(fork.fork).readers).toBeUndefined();
    } finally {
      await b.clear();
      await b.stop();
      execFileSync('umount', ['--lazy', b.ramDir]);
      await b.start();
    }
  });

  test('goes on when the parent dies after the fork point', async () => {
    const { a, b } = pair;
    await boot(64);
    const fork = await forkOf('web');
    await fork.upToLoad();
    process.kill(a.vms.get('web').pid ?? 0, 'SIGKILL');
    await fork.commit();
    await fork.run();
    await fork.finish();
    await expectSound(b, clonesOn(b));
  });

  test('a parent that stays stopped gives its files, also by shared memory', async () => {
    const { b } = pair;
    await boot(32);
    const fork = await forkOf('web', { parentMode: 'stop' });
    await fork.upToLoad();
    await b.agent.forks.connectImage(fork.fork, 'shm');
    await fork.commit();
    await fork.run();
    await fork.finish();
    await expectSound(b, clonesOn(b));
  });

  test('clones with memory of their own wait for all pages of the image, and not for their check', async () => {
    const { b } = pair;
    await boot(32);
    const fork = await forkOf('web', { memory: 'private' });
    await fork.upToLoad();
    await fork.commit();
    await fork.run();
    await fork.finish();
    expect(b.agent.images.find(fork.fork)).toMatchObject({ state: 'complete', isChecked: true });
    await expectSound(b, clonesOn(b));
  });
});
