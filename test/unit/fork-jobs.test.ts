import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../src/errors.js';
import { forkAnswers, forkRequest, IMAGE, image } from './fork-facts.js';
import { request } from './planner-facts.js';
import { gate, rest, restFork, Scripted } from './scripted.js';

const UNDONE = ['A.discardFork', 'A.unreserve'];

describe('one VM is in one job', () => {
  test.each([
    ['a fork during a migration', 'B.prepare', true],
    ['a migration during a fork', 'A.prepareClones', false],
  ])('%s is refused', async (_, parkedCall, isMigrationFirst) => {
    const world = new Scripted();
    const parked = gate();
    world.on[parkedCall] = async () => {
      await parked.passed;
      return isMigrationFirst ? { nativeUri: null } : forkAnswers.prepareClones;
    };
    const { jobs } = await world.daemon();
    const first = isMigrationFirst ? jobs.submit(request) : jobs.submitFork(forkRequest);
    const { id } = await first;
    await expect(isMigrationFirst ? jobs.submitFork(forkRequest) : jobs.submit(request)).rejects.toMatchObject({
      code: 'PREFLIGHT_REFUSED',
      details: [{ code: 'VM_IN_JOB' }],
    });
    parked.open();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });

  test('a fork while the image of another still fills is refused, and says what to wait for', async () => {
    const world = new Scripted();
    const filling = gate();
    const parked = gate();
    world.on['A.forkProgress'] = async () => {
      filling.open();
      await parked.passed;
      return forkAnswers.forkProgress;
    };
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(forkRequest);
    await filling.passed;
    await expect(jobs.submitFork(forkRequest)).rejects.toMatchObject({
      details: [{ code: 'VM_IN_JOB', remedy: expect.stringContaining(`vmctl job ${id} --follow`) as string }],
    });
    parked.open();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
    expect(await rest(jobs, (await jobs.submitFork(forkRequest)).id)).toMatchObject({ state: 'done' });
  });

  test('two forks, one after the other', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    for (let round = 0; round < 2; round++) {
      expect(await rest(jobs, (await jobs.submitFork(forkRequest)).id)).toMatchObject({ state: 'done' });
    }
  });

  test('clones of an image hold no VM', async () => {
    const world = new Scripted();
    world.on['A.forkInventory'] = () => ({ ...(forkAnswers.forkInventory as object), image });
    const { jobs } = await world.daemon();
    const ofImage = { ...forkRequest, vm: null, image: IMAGE };
    const views = await Promise.all([jobs.submitFork(ofImage), jobs.submitFork(ofImage)]);
    for (const { id } of views) expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });
});

describe('requests', () => {
  test('for impossible numbers do not even reach the host', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    for (const cloneCount of [0, -1, 10_000]) {
      await expect(jobs.submitFork({ ...forkRequest, cloneCount })).rejects.toMatchObject({
        details: [{ code: 'CLONE_COUNT' }],
      });
    }
    expect(world.calls).toEqual([]);
    expect(jobs.list()).toEqual([]);
  });

  test('for a VM that has moved away name the host that has it', async () => {
    const world = new Scripted();
    const { jobs, registry } = await world.daemon();
    await registry.swapOwner('vm1', 3, { vm: 'vm1', owner: 'C', epoch: 4, session: null });
    expect((await jobs.dryRunFork(forkRequest)).refusals).toMatchObject([
      { code: 'VM_NOT_OWNED', remedy: 'ask the daemon on C' },
    ]);
  });

  test('a dry run shows the plan and touches nothing', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const { plan } = await jobs.dryRunFork(forkRequest);
    expect(plan?.steps).toHaveLength(8);
    expect(world.acts).toEqual([]);
  });
});

describe('a new daemon', () => {
  async function crashedAt(point: string) {
    const world = new Scripted();
    const crashed = gate();
    world.onFault = (hit) => {
      if (hit !== point) return Promise.resolve();
      crashed.open();
      return new Promise(() => undefined);
    };
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(forkRequest);
    await crashed.passed;
    world.onFault = () => Promise.resolve();
    world.calls.length = 0;
    return { world, id };
  }

  test.each(['before:reserveParent', 'after:prepareClones', 'after:forkPoint', 'before:commitFork'])(
    'undoes what had crashed at %s',
    async (point) => {
      const { world, id } = await crashedAt(point);
      const { jobs } = await world.daemon();
      expect(await rest(jobs, id)).toMatchObject({ kind: 'fork', state: 'failed', isCommitted: false });
      expect(world.acts.slice(-2)).toEqual(UNDONE);
    },
  );

  test('goes on where the agent knows of the commit and the journal does not', async () => {
    const { world, id } = await crashedAt('after:commitFork');
    world.on['A.discardFork'] = () => Promise.reject(new MigrationError('CONFLICT', 'committed'));
    const { jobs } = await world.daemon();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done', isCommitted: true });
    expect(world.acts).toEqual(['A.discardFork', 'A.finishFork', 'A.unreserve']);
  });

  test.each(['before:fillImage', 'after:fillImage', 'before:releaseParent'])(
    'finishes what had crashed at %s, and reports what the first had found',
    async (point) => {
      const { world, id } = await crashedAt(point);
      const { jobs } = await world.daemon();
      const view = await restFork(jobs, id);
      expect(view).toMatchObject({ state: 'done', isCommitted: true, clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
      expect(view.report).toMatchObject({ parentPauseMs: 12.5, faults: { parent: 5 } });
      expect(world.acts).toEqual(['A.finishFork', 'A.unreserve']);
    },
  );

  test('shows forks that are over, with their reports', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submitFork(forkRequest)).id);
    await jobs.close();
    const next = await world.daemon();
    expect(next.jobs.list()).toEqual([{ ...view, progress: null }]);
  });
});
