import { describe, expect, test } from 'vitest';
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import type { CloneFailure } from '../../../src/domain/fork.js';
import { filled, forkAnswers, forkRequest, IMAGE, identity, image } from '../planner/fork-facts.js';
import { held, rest, restFork, Scripted } from './scripted.js';

const failing =
  (code: ErrorCode, context = {}) =>
  () =>
    Promise.reject(new MigrationError(code, 'as told', context));
const UNDONE = ['A.discardFork', 'A.unreserve'];
const failure = (index: number): CloneFailure => ({
  index,
  name: `vm1-${index}`,
  error: new MigrationError('QEMU_FAILED', 'it died', { remedy: 'look at its log' }),
});

describe('forward', () => {
  test('calls what it must, in order, and nothing else', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(view).toMatchObject({ kind: 'fork', state: 'done', error: null, isCommitted: true, image: IMAGE });
    expect(view).toMatchObject({ clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
    expect(world.acts).toEqual([
      'A.reserve',
      'A.prepareClones',
      'A.armParent',
      'A.forkPoint',
      'A.loadClones',
      'A.commitFork',
      'A.runClones',
      'A.finishFork',
      'A.unreserve',
    ]);
  });

  test('an image is run without a parent', async () => {
    const world = new Scripted();
    world.on['A.forkInventory'] = () => ({ ...(forkAnswers.forkInventory as object), image });
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submitFork({ ...forkRequest, vm: null, image: IMAGE })).id);
    expect(view).toMatchObject({ state: 'done', vm: 'vm1' });
    expect(world.acts).toEqual(['A.prepareClones', 'A.loadClones', 'A.commitFork', 'A.runClones', 'A.finishFork']);
  });

  test('the agent gets the request with the ids of fork and job', async () => {
    const world = new Scripted();
    let prepared: unknown;
    world.on['A.prepareClones'] = (given: never) => {
      prepared = given;
      return forkAnswers.prepareClones;
    };
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(forkRequest);
    await rest(jobs, id);
    const entry = world.journalled()[0];
    expect(prepared).toEqual({ ...forkRequest, job: id, fork: entry?.type === 'fork' ? entry.fork : '' });
  });

  test('the report tells what the steps and counters say', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const { report } = await restFork(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(report).toMatchObject({
      image: IMAGE,
      parent: 'vm1',
      parentPauseMs: 12.5,
      isWarm: true,
      memoryBytes: 2 ** 29,
      bytes: { copied: 122_880, zeroSkipped: 70 * 4096, deviceState: 300_000, perHost: { A: 122_880 } },
      faults: { parent: 5, clones: 7 },
      failures: [],
    });
    expect(report?.clones).toHaveLength(3);
    expect(report?.clones[1]).toMatchObject({ ...identity(1), host: 'A', mac: '52:54:00:00:01:01' });
    // The time counts from the request, because the earlier steps take time too.
    expect(report?.firstReadyMs).toBeGreaterThanOrEqual(10);
    expect(report?.lastReadyMs).toBeCloseTo((report?.firstReadyMs ?? 0) + 2, 5);
    expect(report?.phases.map(({ name }) => name)).toContain('forkPoint.saveState');
  });

  test('between the announcement and the first instruction of a clone the journal is not written', async () => {
    const world = new Scripted();
    let writes = 0;
    const append = world.journalStore.append.bind(world.journalStore);
    world.journalStore.append = (bytes) => {
      writes++;
      return append(bytes);
    };
    world.on['A.reserve'] = () => {
      writes = 0;
    };
    let written = -1;
    world.on['A.runClones'] = () => {
      written = writes;
      return forkAnswers.runClones;
    };
    const { jobs } = await world.daemon();
    await rest(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(written).toBe(0);
  });
});

describe('before the commit', () => {
  test.each(['A.prepareClones', 'A.armParent', 'A.forkPoint', 'A.loadClones', 'A.commitFork'])(
    'a failure of %s takes the fork away, and the parent runs',
    async (call) => {
      const world = new Scripted();
      world.on[call] = failing('QEMU_FAILED', { remedy: 'look at it' });
      const { jobs } = await world.daemon();
      expect(await rest(jobs, (await jobs.submitFork(forkRequest)).id)).toMatchObject({
        state: 'failed',
        isCommitted: false,
        clones: [],
        error: { code: 'STEP_FAILED', remedy: 'look at it', cause: { code: 'QEMU_FAILED' } },
      });
      expect(world.acts.slice(-2)).toEqual(UNDONE);
      expect(world.acts).not.toContain('A.runClones');
      expect(world.acts).not.toContain('A.finishFork');
    },
  );

  test('one clone that cannot load is named, and none is left', async () => {
    const world = new Scripted();
    world.on['A.loadClones'] = () => ({ failures: [failure(1), failure(2)] });
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(view).toMatchObject({
      state: 'failed',
      error: { remedy: 'look at its log', details: [{ name: 'vm1-1', error: { message: 'it died' } }, {}] },
    });
    expect((view.error as Error).message).toMatch(/clone vm1-1 \(and 1 more\) could not be loaded: it died/);
    expect(world.acts.slice(-2)).toEqual(UNDONE);
    expect(world.acts).not.toContain('A.commitFork');
  });

  test('with --partial the others run, and the report names it', async () => {
    const world = new Scripted();
    world.on['A.prepareClones'] = () => ({
      image: IMAGE,
      isWarm: false,
      clones: [identity(0), identity(1)],
      failures: [failure(2)],
    });
    world.on['A.loadClones'] = () => ({ failures: [failure(1)] });
    world.on['A.runClones'] = () => ({ ready: [{ index: 0, atMs: 3 }], failures: [] });
    const { jobs } = await world.daemon();
    const view = await restFork(jobs, (await jobs.submitFork({ ...forkRequest, isPartialAllowed: true })).id);
    expect(view).toMatchObject({ state: 'done', clones: ['vm1-0'] });
    expect(view.report?.failures).toMatchObject([{ name: 'vm1-1', error: { code: 'QEMU_FAILED' } }, { name: 'vm1-2' }]);
  });

  test('with --partial and no clone at all it fails', async () => {
    const world = new Scripted();
    world.on['A.loadClones'] = () => ({ failures: [failure(0), failure(1), failure(2)] });
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submitFork({ ...forkRequest, isPartialAllowed: true })).id);
    expect(view).toMatchObject({ state: 'failed' });
    expect(world.acts.slice(-2)).toEqual(UNDONE);
  });

  test('a cancel takes the fork away before it answers', async () => {
    const world = new Scripted();
    const loading = held(world, 'A.loadClones');
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(forkRequest);
    await loading.came;
    expect(await jobs.cancel(id)).toMatchObject({ state: 'cancelled' });
    expect(world.acts.slice(-2)).toEqual(UNDONE);
  });

  test('an undo that fails for a moment is tried again', async () => {
    const world = new Scripted();
    let attempts = 0;
    world.on['A.forkPoint'] = failing('QEMU_FAILED');
    world.on['A.discardFork'] = () => {
      if (++attempts < 3) throw new MigrationError('TIMEOUT', 'busy');
    };
    const { jobs } = await world.daemon();
    await rest(jobs, (await jobs.submitFork(forkRequest)).id);
    // The fourth comes before the parent is free for other jobs.
    expect(attempts).toBe(4);
    expect(world.acts.slice(-2)).toEqual(['A.discardFork', 'A.unreserve']);
    expect(world.journalled().filter(({ type }) => type === 'leftover')).toEqual([]);
  });

  test('the parent stays reserved until nothing of the fork is left', async () => {
    const world = new Scripted();
    let isStuck = true;
    world.on['A.loadClones'] = failing('STEP_FAILED');
    world.on['A.discardFork'] = () => {
      if (isStuck) throw new MigrationError('STEP_FAILED', 'the state disk is full');
    };
    const { jobs } = await world.daemon();
    await rest(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(world.acts).not.toContain('A.unreserve');
    isStuck = false;
    await expect.poll(() => world.acts.at(-1), { timeout: 20_000 }).toBe('A.unreserve');
    expect(world.acts.filter((act) => act === 'A.unreserve')).toHaveLength(1);
  });
});

describe('the commit', () => {
  test('whose answer was lost is found out by the discard that is refused', async () => {
    const world = new Scripted();
    world.on['A.commitFork'] = failing('TIMEOUT');
    world.on['A.discardFork'] = failing('CONFLICT');
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submitFork(forkRequest)).id)).toMatchObject({
      state: 'done',
      isCommitted: true,
    });
    expect(world.acts.slice(-2)).toEqual(['A.finishFork', 'A.unreserve']);
  });

  test('that did not take place is undone by the same discard', async () => {
    const world = new Scripted();
    world.on['A.commitFork'] = failing('NO_SPACE');
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submitFork(forkRequest)).id)).toMatchObject({ state: 'failed' });
    expect(world.acts.slice(-3)).toEqual(['A.discardFork', ...UNDONE]);
  });

  test('of which nobody can say whether it took place needs recovery, and is found out then', async () => {
    const world = new Scripted();
    world.on['A.commitFork'] = failing('TIMEOUT');
    world.on['A.discardFork'] = failing('CORRUPT');
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(forkRequest);
    expect(await rest(jobs, id)).toMatchObject({ state: 'needsRecovery', error: { code: 'NEEDS_RECOVERY' } });
    world.on['A.discardFork'] = failing('CONFLICT');
    await jobs.recover(id);
    expect(await rest(jobs, id)).toMatchObject({ state: 'done', clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
  });
});

describe('the go', () => {
  test('whose answer was lost is given again, and the clones are named once', async () => {
    const world = new Scripted();
    let calls = 0;
    world.on['A.runClones'] = () => {
      if (++calls === 1) throw new MigrationError('TIMEOUT', 'the answer was lost');
      return {
        ready: [
          { index: 0, atMs: -40 },
          { index: 2, atMs: 1 },
        ],
        failures: [failure(1)],
      };
    };
    const { jobs } = await world.daemon();
    const view = await restFork(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(view).toMatchObject({
      state: 'done',
      clones: ['vm1-0', 'vm1-2'],
      report: { failures: [{ name: 'vm1-1' }] },
    });
    expect(world.acts).not.toContain('A.discardFork');
    expect(view.report?.firstReadyMs).toBeGreaterThanOrEqual(0);
  });

  test('leaves out a clone that cannot run, although the request demands all: the fork is committed', async () => {
    const world = new Scripted();
    world.on['A.runClones'] = () => ({ ready: [], failures: [failure(0), failure(1), failure(2)] });
    const { jobs } = await world.daemon();
    const view = await restFork(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(view).toMatchObject({ state: 'done', isCommitted: true, clones: [] });
    expect(view.report?.failures.map(({ name }) => name)).toEqual(['vm1-0', 'vm1-1', 'vm1-2']);
    expect(world.acts).not.toContain('A.discardFork');
  });

  test('is given by the next daemon if this one died between commit and go', async () => {
    const world = new Scripted();
    const going = held(world, 'A.runClones');
    const first = await world.daemon();
    const { id } = await first.jobs.submitFork(forkRequest);
    await going.came;
    delete world.on['A.runClones'];
    world.on['A.discardFork'] = failing('CONFLICT');
    const { jobs } = await world.daemon();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done', clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
    expect(world.acts.slice(-4)).toEqual(['A.discardFork', 'A.runClones', 'A.finishFork', 'A.unreserve']);
  });

  test('of a fork that the agent has finished is not missed', async () => {
    const world = new Scripted();
    world.on['A.runClones'] = failing('NOT_FOUND');
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submitFork(forkRequest)).id)).toMatchObject({ state: 'done' });
  });
});

describe('after the commit', () => {
  test('a cancel is refused, and says why', async () => {
    const world = new Scripted();
    const filling = held(world, 'A.forkProgress', filled);
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(forkRequest);
    await filling.came;
    await expect(jobs.cancel(id)).rejects.toThrow(/the fork is committed/);
    filling.release();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });

  test('progress tells pages, rate and faults', async () => {
    const world = new Scripted();
    let pagesDone = 0;
    world.on['A.forkProgress'] = () => {
      pagesDone += 10;
      return {
        ...filled,
        state: pagesDone < 100 ? 'filling' : 'complete',
        pagesDone,
        counters: { cloneFaultCount: 3 },
      };
    };
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submitFork(forkRequest)).id);
    expect(view.progress).toMatchObject({ pagesTotal: 100, pagesDone: 100, bytesDone: 100 * 4096, faultCount: 3 });
  });

  test.each([
    ['REGION_CHANGED', 'the file has shrunk'],
    ['NO_SPACE', 'the file system is full'],
  ])(
    'an image that can never be complete (%s) is lost: the host forgets the fork, and the parent is let go',
    async (code, message) => {
      const world = new Scripted();
      world.on['A.forkProgress'] = () => ({ ...filled, state: 'failed', error: { code, message } });
      const { jobs } = await world.daemon();
      const view = await rest(jobs, (await jobs.submitFork(forkRequest)).id);
      expect(view).toMatchObject({
        state: 'lost',
        error: { code: 'VM_LOST', remedy: expect.stringContaining(`vmctl image rm ${IMAGE}`) as string },
      });
      expect((view.error as Error).message).toContain(message);
      expect(world.acts.slice(-2)).toEqual(['A.finishFork', 'A.unreserve']);
      expect(world.acts).not.toContain('A.discardFork');
      delete world.on['A.forkProgress'];
      expect(await rest(jobs, (await jobs.submitFork(forkRequest)).id)).toMatchObject({ state: 'done' });
    },
  );

  test('without any advance it needs recovery', async () => {
    const world = new Scripted();
    world.on['A.forkProgress'] = () => ({ ...filled, state: 'filling', pagesDone: 5 });
    const { jobs } = await world.daemon({ recoveryMsMax: 60 });
    const { id } = await jobs.submitFork(forkRequest);
    expect(await rest(jobs, id)).toMatchObject({ state: 'needsRecovery', isCommitted: true });
    delete world.on['A.forkProgress'];
    await jobs.recover(id);
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });
});
