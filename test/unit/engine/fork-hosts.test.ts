import { describe, expect, test } from 'vitest';
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import type { ForkRequest } from '../../../src/domain/fork.js';
import { filled, IMAGE, identity, image } from '../planner/fork-facts.js';
import { onHosts, scriptedHosts } from './on-hosts.js';
import { crashedAt, held, rest, restFork, type Scripted } from './scripted.js';

const failing =
  (code: ErrorCode, message = 'as told') =>
  () =>
    Promise.reject(new MigrationError(code, message));
const partial: ForkRequest = { ...onHosts, isPartialAllowed: true };

async function run(world: Scripted, request = onHosts) {
  const { jobs } = await world.daemon();
  return restFork(jobs, (await jobs.submitFork(request)).id);
}

/** Fails unless every act of `earlier` comes before every act of `later`. */
function expectOrder(world: Scripted, earlier: readonly string[], later: readonly string[]): void {
  for (const one of earlier) {
    for (const other of later) {
      expect(world.acts, `${one} and ${other}`).toEqual(expect.arrayContaining([one, other]));
      expect(world.acts.lastIndexOf(one), `${one} before ${other}`).toBeLessThan(world.acts.indexOf(other));
    }
  }
}

const on = (hosts: string, call: string): string[] => hosts.split('').map((host) => `${host}.${call}`);

describe('a fork over hosts', () => {
  test('calls each host in the order of the steps, and lets none run before the root has committed', async () => {
    const world = scriptedHosts();
    const view = await run(world);
    expect(view).toMatchObject({ state: 'done', clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
    expectOrder(world, ['A.reserve'], on('ABC', 'prepareClones'));
    expectOrder(world, on('ABC', 'prepareClones'), ['A.armParent']);
    expectOrder(world, ['A.armParent'], on('BC', 'connectImage'));
    expectOrder(world, on('BC', 'connectImage'), ['A.forkPoint']);
    expectOrder(world, ['A.forkPoint'], ['A.sendForkState', 'A.loadClones']);
    expectOrder(world, ['A.sendForkState', 'A.loadClones'], ['A.commitFork']);
    expectOrder(world, ['A.commitFork'], on('ABC', 'runClones'));
    expectOrder(world, on('ABC', 'runClones'), on('BC', 'finishFork'));
    expectOrder(world, on('BC', 'finishFork'), ['A.finishFork']);
    expect(world.acts.at(-1)).toBe('A.unreserve');
    expect(world.acts.filter((act) => act === 'A.sendForkState')).toHaveLength(2);
  });

  test('lets each host commit and run in one call, which says that the root has decided', async () => {
    const world = scriptedHosts();
    const told: Record<string, unknown[]> = {};
    for (const host of 'ABC') {
      const run = world.on[`${host}.runClones`] as () => unknown;
      world.on[`${host}.runClones`] = (...args: unknown[]) => {
        told[host] = args.slice(1);
        return run();
      };
    }
    await run(world);
    expect(told).toEqual({ A: [], B: ['committed'], C: ['committed'] });
    expect(world.acts.filter((act) => act.endsWith('commitFork'))).toEqual(['A.commitFork']);
  });

  test('tells each host its share, and the others where the image is', async () => {
    const world = scriptedHosts();
    const asked: Record<string, unknown> = {};
    for (const host of 'ABC') {
      const prepare = world.on[`${host}.prepareClones`]!;
      world.on[`${host}.prepareClones`] = (request: never) => {
        asked[host] = request;
        return prepare(request);
      };
    }
    await run(world);
    expect(asked.A).toMatchObject({ vm: 'vm1', cloneCount: 3, share: { first: 0, count: 1 } });
    expect(asked.A).not.toHaveProperty('origin');
    expect(asked.B).toMatchObject({ vm: null, cloneCount: 3, share: { first: 1, count: 1 }, origin: { host: 'A' } });
    expect(asked.C).toMatchObject({ vm: null, share: { first: 2, count: 1 }, origin: { image: expect.any(String) } });
  });

  test('the report says on which host each clone runs, and how many bytes have gone where', async () => {
    const world = scriptedHosts();
    world.on['B.forkProgress'] = () => ({
      ...filled,
      counters: { copiedBytes: 5_000, prefetchBytes: 5_000, cloneFaultCount: 2 },
    });
    world.on['C.forkProgress'] = () => ({ ...filled, counters: { copiedBytes: 7_000, prefetchBytes: 7_000 } });
    const { report } = await run(world);
    expect(report?.clones.map(({ index, host }) => `${index} ${host}`)).toEqual(['0 A', '1 B', '2 C']);
    expect(report?.bytes).toMatchObject({
      perHost: { A: 122_880, B: 5_000, C: 7_000 },
      rootEgress: 12_000 + 2 * 300_000,
    });
    expect(report?.faults.clones).toBe(7 + 2);
  });

  test('an image is brought to a host without a clone', async () => {
    const world = scriptedHosts();
    const inventory = world.on['A.forkInventory']!;
    world.on['A.forkInventory'] = () => ({ ...(inventory() as object), image });
    const hosts = [{ host: 'B', cloneCount: 0 }];
    const view = await run(world, { ...onHosts, vm: null, image: IMAGE, cloneCount: 0, hosts });
    expect(view).toMatchObject({ state: 'done', clones: [], report: { failures: [], image: IMAGE } });
    expectOrder(world, ['B.connectImage'], ['A.commitFork']);
    expect(world.acts).not.toContain('C.prepareClones');

    // No clone would tell of its loss.
    world.on['B.forkProgress'] = () => ({ ...filled, state: 'failed', error: { code: 'DAMAGED', message: 'page 7' } });
    const lost = await run(world, { ...onHosts, vm: null, image: IMAGE, cloneCount: 0, hosts });
    expect(lost).toMatchObject({ state: 'lost', error: { code: 'VM_LOST', cause: { code: 'DAMAGED' } } });
  });
});

const BEFORE_COMMIT = ['B.prepareClones', 'B.connectImage', 'A.sendForkState', 'B.loadClones'];

describe('before the commit of a fork over hosts', () => {
  test.each([...BEFORE_COMMIT, 'A.commitFork'])('a failure of %s takes the fork away on all hosts', async (call) => {
    const world = scriptedHosts();
    world.on[call] = failing('QEMU_FAILED');
    const view = await run(world);
    expect(view).toMatchObject({ state: 'failed', isCommitted: false, clones: [] });
    expect(world.acts).toEqual(expect.arrayContaining([...on('ABC', 'discardFork')]));
    expect(world.acts.at(-1)).toBe('A.unreserve');
    for (const act of on('ABC', 'runClones')) expect(world.acts).not.toContain(act);
    if (call.startsWith('B')) expect((view.error as Error).message).toMatch(/B: as told/);
  });

  test('a clone that cannot load on a joined host takes the whole fork away', async () => {
    const world = scriptedHosts();
    const error = new MigrationError('QEMU_FAILED', 'it died');
    world.on['C.loadClones'] = () => ({ failures: [{ index: 2, name: 'vm1-2', error }] });
    const view = await run(world);
    expect(view).toMatchObject({ state: 'failed', error: { details: [{ name: 'vm1-2', host: 'C' }] } });
    expect(world.acts).toEqual(expect.arrayContaining(on('ABC', 'discardFork')));
  });

  test('a joined host that cannot be undone does not keep the parent reserved, and is undone later', async () => {
    const world = scriptedHosts();
    world.on['C.loadClones'] = failing('QEMU_FAILED');
    world.on['B.discardFork'] = failing('UNREACHABLE');
    expect(await run(world)).toMatchObject({ state: 'failed' });
    expect(world.acts).toContain('A.unreserve');
    expect(world.journalled()).toContainEqual(expect.objectContaining({ type: 'leftover', step: 'prepareClones' }));
    delete world.on['B.discardFork'];
    await expect.poll(() => world.journalled().some(({ type }) => type === 'cleared')).toBe(true);
  });

  test.each(['uuid', 'name', 'macs'])('clones of two hosts with the same %s are refused', async (what) => {
    const world = scriptedHosts();
    const prepare = world.on['C.prepareClones'] as (...parameters: unknown[]) => { clones: object[] };
    world.on['C.prepareClones'] = (request: never) => {
      const reply = prepare(request);
      const same = { [what]: identity(1)[what as 'uuid'] };
      return { ...reply, clones: reply.clones.map((clone) => ({ ...clone, ...same })) };
    };
    const view = await run(world);
    expect(view).toMatchObject({ state: 'failed', error: { cause: { code: 'CONFLICT' } } });
    expect(world.acts).toEqual(expect.arrayContaining(on('ABC', 'discardFork')));
    expect(world.acts).not.toContain('A.armParent');
  });

  test.each(BEFORE_COMMIT)('with --partial a failure of %s leaves out the host', async (call) => {
    const world = scriptedHosts();
    const answer = world.on[call] as (...args: unknown[]) => unknown;
    world.on[call] = (...args: unknown[]) => {
      if (call.startsWith('B') || args[1] === 'B') throw new MigrationError('QEMU_FAILED', 'as told');
      return answer(...args);
    };
    const view = await run(world, partial);
    expect(view).toMatchObject({ state: 'done', clones: ['vm1-0', 'vm1-2'] });
    expect(view.report?.failures).toMatchObject([{ index: 1, name: 'vm1-1', host: 'B' }]);
    expect(world.acts).toContain('B.discardFork');
    for (const act of ['B.runClones', 'B.finishFork']) expect(world.acts).not.toContain(act);
  });

  test('with --partial the clones of a host that was left out do not count as loaded', async () => {
    const world = scriptedHosts();
    const error = new MigrationError('QEMU_FAILED', 'it died');
    world.on['B.connectImage'] = failing('UNREACHABLE');
    world.on['A.loadClones'] = () => ({ failures: [{ index: 0, name: 'vm1-0', error }] });
    world.on['C.loadClones'] = () => ({ failures: [{ index: 2, name: 'vm1-2', error }] });
    expect(await run(world, partial)).toMatchObject({ state: 'failed' });
    expect(world.acts).not.toContain('A.commitFork');
  });

  test('with --partial a host that was left out is told once more at the end', async () => {
    const world = scriptedHosts();
    world.on['B.connectImage'] = failing('UNREACHABLE');
    world.on['B.discardFork'] = failing('UNREACHABLE');
    expect(await run(world, partial)).toMatchObject({ state: 'done' });
    expect(world.acts.filter((act) => act === 'B.discardFork')).toHaveLength(2);
    expectOrder(world, ['B.discardFork'], ['A.finishFork']);
  });
});

describe('after the commit of a fork over hosts', () => {
  test('a silent host keeps no other from its go', async () => {
    const world = scriptedHosts();
    const answer = world.on['B.runClones']!;
    world.on['B.runClones'] = failing('UNREACHABLE', 'nobody is there');
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(onHosts);
    await expect.poll(() => jobs.get(id)).toMatchObject({ state: 'recovering', clones: ['vm1-0', 'vm1-2'] });
    expect((jobs.get(id).error as Error).message).toMatch(/^B: nobody is there/);
    expect(world.acts).not.toContain('C.finishFork');
    world.on['B.runClones'] = answer;
    expect(await restFork(jobs, id)).toMatchObject({ state: 'done', error: null, report: { failures: [] } });
    expect(jobs.get(id)).toMatchObject({ clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
    expect(world.acts).not.toContain('B.discardFork');
  });

  test('a host that has lost its part is named, and the job ends', async () => {
    const world = scriptedHosts();
    world.on['B.runClones'] = failing('NOT_FOUND');
    const view = await run(world);
    expect(view).toMatchObject({ state: 'done', clones: ['vm1-0', 'vm1-2'] });
    expect(view.report?.failures).toMatchObject([{ index: 1, name: 'vm1-1', host: 'B', error: { code: 'NOT_FOUND' } }]);
  });

  test('a host that refuses the commit has discarded its part, as its discard shows', async () => {
    const world = scriptedHosts();
    world.on['B.runClones'] = failing('CONFLICT', 'the fork has ended');
    const { report } = await run(world);
    expect(report?.failures).toMatchObject([{ name: 'vm1-1', host: 'B' }]);
    expectOrder(world, ['B.runClones'], ['B.discardFork']);
  });

  test('a host that refuses its go and the discard is committed, and gets its go again', async () => {
    const world = scriptedHosts();
    const answer = world.on['B.runClones']!;
    world.on['B.runClones'] = failing('CONFLICT');
    world.on['B.discardFork'] = () => {
      world.on['B.runClones'] = answer;
      throw new MigrationError('CONFLICT', 'it is committed');
    };
    expect(await run(world)).toMatchObject({ state: 'done', report: { failures: [] }, clones: { length: 3 } });
  });

  test('the parent is released before slower hosts have all pages, and the report has the root’s figures', async () => {
    const world = scriptedHosts();
    let isFilling = true;
    world.on['B.forkProgress'] = () => ({ ...filled, state: isFilling ? 'filling' : 'complete' });
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(onHosts);
    await expect.poll(() => world.acts).toContain('A.unreserve');
    expect(world.acts).not.toContain('B.finishFork');
    world.on['A.forkProgress'] = failing('NOT_FOUND');
    isFilling = false;
    const { report } = await restFork(jobs, id);
    expect(report?.bytes).toMatchObject({ copied: 122_880, perHost: { A: 122_880 } });
    expect(report?.faults.parent).toBe(5);
  });

  test('a daemon that ends after the parent is released leaves the root’s figures for the report', async () => {
    const world = scriptedHosts();
    const complete = world.on['B.forkProgress']!;
    world.on['B.forkProgress'] = () => ({ ...filled, state: 'filling' });
    const { jobs: first } = await world.daemon();
    const { id } = await first.submitFork(onHosts);
    await expect.poll(() => world.acts).toContain('A.unreserve');
    await first.close();
    world.on['A.forkProgress'] = failing('NOT_FOUND');
    world.on['A.discardFork'] = failing('CONFLICT');
    world.on['B.forkProgress'] = complete;
    const { jobs } = await world.daemon();
    const { report } = await restFork(jobs, id);
    expect(report?.bytes).toMatchObject({ copied: 122_880, perHost: { A: 122_880 } });
    expect(report?.faults.parent).toBe(5);
  });

  test('a host that a user has removed from the peers is given up by the next daemon', async () => {
    const silent = scriptedHosts();
    silent.on['B.runClones'] = failing('UNREACHABLE');
    const { jobs: first } = await silent.daemon();
    const { id } = await first.submitFork(onHosts);
    await expect.poll(() => first.get(id)).toMatchObject({ state: 'recovering' });
    await first.close();
    silent.peers = ['A', 'C'];
    silent.on['A.discardFork'] = failing('CONFLICT');
    const { jobs } = await silent.daemon();
    const { state, report } = await restFork(jobs, id);
    expect([state, report?.clones.map(({ host }) => host)]).toEqual(['done', ['A', 'C']]);
    expect(report?.failures).toMatchObject([{ index: 1, host: 'B', error: { code: 'NOT_FOUND' } }]);
  });

  test('a host that does not name a clone has lost it', async () => {
    const world = scriptedHosts();
    world.on['B.runClones'] = () => ({ ready: [], failures: [] });
    const { report } = await run(world);
    expect(report?.failures).toMatchObject([{ name: 'vm1-1', host: 'B', error: { code: 'NOT_FOUND' } }]);
  });

  test('the clones of a host whose pages cannot come are named, although they have run', async () => {
    const world = scriptedHosts();
    world.on['B.forkProgress'] = () => ({
      ...filled,
      state: 'failed',
      error: { code: 'NO_SPACE', message: 'the file system is full' },
    });
    const view = await run(world);
    expect(view).toMatchObject({ state: 'done', clones: ['vm1-0', 'vm1-2'] });
    expect(view.report?.failures).toMatchObject([{ name: 'vm1-1', host: 'B', error: { code: 'NO_SPACE' } }]);
  });

  test('an image that can never be complete ends the fork on all hosts, as soon as each of them can', async () => {
    const world = scriptedHosts();
    world.on['A.forkProgress'] = () => ({ ...filled, state: 'failed', error: { code: 'NO_SPACE', message: 'full' } });
    let isFilling = true;
    world.on['B.finishFork'] = () => {
      if (isFilling) throw new MigrationError('CONFLICT', 'pages are missing');
    };
    expect(await run(world)).toMatchObject({ state: 'lost', error: { code: 'VM_LOST' } });
    expect(world.acts).toEqual(expect.arrayContaining(['A.finishFork', 'A.unreserve']));
    isFilling = false;
    await expect.poll(() => world.journalled().some(({ type }) => type === 'cleared')).toBe(true);
  });
});

describe('a daemon that dies in a fork over hosts', () => {
  const submit = (request: ForkRequest) => (jobs: Parameters<Parameters<typeof crashedAt>[1]>[0]) =>
    jobs.submitFork(request);

  test.each(['prepareClones', 'armParent', 'connectHosts', 'forkPoint', 'loadClones'])(
    'after %s: the next one undoes it on all hosts',
    async (step) => {
      const { world, id } = await crashedAt(`after:${step}`, submit(onHosts), scriptedHosts());
      const { jobs } = await world.daemon();
      expect(await rest(jobs, id)).toMatchObject({ state: 'failed', isCommitted: false });
      expect(world.acts).toEqual(expect.arrayContaining([...on('ABC', 'discardFork'), 'A.unreserve']));
    },
  );

  test.each(['commitFork', 'runClones', 'fillImage', 'releaseParent'])(
    'after %s: the next one goes on, and the report names all clones',
    async (step) => {
      const { world, id } = await crashedAt(`after:${step}`, submit(onHosts), scriptedHosts());
      world.on['A.discardFork'] = failing('CONFLICT');
      const { jobs } = await world.daemon();
      const { state, report } = await restFork(jobs, id);
      expect({ state, failures: report?.failures }).toEqual({ state: 'done', failures: [] });
      expect(report?.clones.map(({ name, host }) => `${name} ${host}`)).toEqual(['vm1-0 A', 'vm1-1 B', 'vm1-2 C']);
    },
  );

  test('a host that is silent then is asked later what it has', async () => {
    const { world, id } = await crashedAt('after:commitFork', submit(onHosts), scriptedHosts());
    world.on['A.discardFork'] = failing('CONFLICT');
    const running = held(world, 'B.runClones', { ready: [{ index: 1, atMs: 1 }], failures: [] });
    const progress = world.on['B.forkProgress']!;
    world.on['B.forkProgress'] = failing('UNREACHABLE');
    const { jobs } = await world.daemon();
    await running.came;
    world.on['B.forkProgress'] = progress;
    running.release();
    const { report } = await restFork(jobs, id);
    expect(report?.clones.map(({ name }) => name)).toEqual(['vm1-0', 'vm1-1', 'vm1-2']);
  });

  test('a host whose clock is behind has no clone that was ready before the request', async () => {
    const { world, id } = await crashedAt('after:commitFork', submit(onHosts), scriptedHosts());
    world.on['A.discardFork'] = failing('CONFLICT');
    const progress = world.on['B.forkProgress'] as () => typeof filled;
    const ready = [{ index: 1, at: '2020-01-01T00:00:00.000Z' }];
    world.on['B.forkProgress'] = () => ({ ...progress(), committed: { ...progress().committed!, ready } });
    const { jobs } = await world.daemon();
    const { state, report } = await restFork(jobs, id);
    expect(state).toBe('done');
    for (const { readyMs } of report?.clones ?? []) expect(readyMs).toBeGreaterThanOrEqual(0);
    expect(report?.clones).toHaveLength(3);
  });

  test('a host that was left out stays named', async () => {
    const left = scriptedHosts();
    left.on['B.connectImage'] = failing('UNREACHABLE');
    const { world, id } = await crashedAt('before:fillImage', submit(partial), left);
    const { jobs } = await world.daemon();
    const { report } = await restFork(jobs, id);
    expect(report?.failures).toMatchObject([{ name: 'vm1-1', host: 'B', error: { code: 'UNREACHABLE' } }]);
    expect(world.acts).not.toContain('B.runClones');
  });

  test('a host that was left out, of which the journal knows nothing, has nothing to commit', async () => {
    const left = scriptedHosts();
    left.on['B.loadClones'] = failing('QEMU_FAILED');
    const { world, id } = await crashedAt('after:commitFork', submit(partial), left);
    world.on['A.discardFork'] = failing('CONFLICT');
    world.on['B.runClones'] = failing('CONFLICT', 'it has ended');
    const { jobs } = await world.daemon();
    const { state, report } = await restFork(jobs, id);
    expect(state).toBe('done');
    expect(report?.failures).toMatchObject([{ index: 1, host: 'B' }]);
  });
});
