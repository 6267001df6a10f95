import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { JournalEntry } from '../../../src/engine/ports/journal.js';
import { FileJournal } from '../../../src/jobs/journal.js';
import { planFork } from '../../../src/planner/fork/plan.js';
import { crashedAt, held, rest, restFork, Scripted } from '../engine/scripted.js';
import { filled, forkAnswers, forkInventory, forkRequest, IMAGE, image } from '../planner/fork-facts.js';
import { request } from '../planner/planner-facts.js';

const UNDONE = ['A.discardFork', 'A.unreserve'];

describe('one VM is in one job', () => {
  test.each([
    ['a fork during a migration', 'B.prepare', true],
    ['a migration during a fork', 'A.prepareClones', false],
  ])('%s is refused', async (_, parkedCall, isMigrationFirst) => {
    const world = new Scripted();
    const { release } = held(world, parkedCall, isMigrationFirst ? { nativeUri: null } : forkAnswers.prepareClones);
    const { jobs } = await world.daemon();
    const first = isMigrationFirst ? jobs.submit(request) : jobs.submitFork(forkRequest);
    const { id } = await first;
    await expect(isMigrationFirst ? jobs.submitFork(forkRequest) : jobs.submit(request)).rejects.toMatchObject({
      code: 'PREFLIGHT_REFUSED',
      details: [{ code: 'VM_IN_JOB' }],
    });
    release();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
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

describe('a fork of a VM that another fork has', () => {
  /** A fork whose image fills until `release`. */
  async function filling(limits = {}) {
    const world = new Scripted();
    const { came, release } = held(world, 'A.forkProgress', filled);
    const { jobs } = await world.daemon(limits);
    const first = await jobs.submitFork(forkRequest);
    await came;
    return { world, jobs, first, release };
  }
  const reserves = (world: Scripted) => world.calls.filter((call) => call === 'A.reserve').length;

  test('begins when that has ended, one after the other', async () => {
    const { world, jobs, first, release } = await filling();
    const second = await jobs.submitFork(forkRequest);
    const third = await jobs.submitFork(forkRequest);
    for (const view of [second, third]) expect(view).toMatchObject({ state: 'queued', waitsFor: first.id });
    expect(reserves(world)).toBe(1);
    const waits: unknown[] = [];
    jobs.subscribe(third.id, (view) => waits.push(view.kind === 'fork' ? `${view.state} ${view.waitsFor}` : null));
    release();
    for (const { id } of [first, second, third]) {
      expect(await rest(jobs, id)).toMatchObject({ state: 'done', waitsFor: null });
    }
    expect(reserves(world)).toBe(3);
    expect([...new Set(waits)].slice(0, 3)).toEqual([`queued ${first.id}`, `queued ${second.id}`, 'running null']);
  });

  test('shows how far that is, and says in its plan that it will wait', async () => {
    const { world, jobs, first, release } = await filling();
    const { plan } = await jobs.dryRunFork(forkRequest);
    expect(plan?.notes).toContainEqual(expect.stringContaining(`starts when ${first.id}`));
    const { id } = await jobs.submitFork(forkRequest);
    let pagesDone = 0;
    world.on['A.forkProgress'] = () => (pagesDone++ < 20 ? { ...filled, state: 'filling', pagesDone } : filled);
    const seen = new Promise((resolve) => {
      jobs.subscribe(id, ({ state, progress }) => {
        if (state === 'queued' && progress !== null) resolve(progress);
      });
    });
    release();
    expect(await seen).toMatchObject({ pagesTotal: 100 });
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });

  test('can be cancelled while it waits, and the first goes on', async () => {
    const { world, jobs, first, release } = await filling();
    const { id } = await jobs.submitFork(forkRequest);
    expect(await jobs.cancel(id)).toMatchObject({ state: 'cancelled' });
    await expect(jobs.submit(request)).rejects.toMatchObject({ details: [{ code: 'VM_IN_JOB' }] });
    release();
    expect(await rest(jobs, first.id)).toMatchObject({ state: 'done' });
    expect(reserves(world)).toBe(1);
  });

  test('takes no place of those that can begin', async () => {
    const { world, jobs, release } = await filling({ runningJobsMax: 2 });
    const { id } = await jobs.submitFork(forkRequest);
    world.on['A.forkInventory'] = () => ({ ...forkInventory, image });
    const ofImage = await jobs.submitFork({ ...forkRequest, vm: null, image: IMAGE });
    expect(await rest(jobs, ofImage.id)).toMatchObject({ state: 'done' });
    delete world.on['A.forkInventory'];
    expect(jobs.get(id)).toMatchObject({ state: 'queued' });
    release();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });

  test('is looked at once more when its turn has come', async () => {
    const { world, jobs, release } = await filling();
    const { id } = await jobs.submitFork(forkRequest);
    world.on['A.forkInventory'] = () => ({ ...forkInventory, vm: { ...forkInventory.vm, state: 'paused' } });
    release();
    expect(await rest(jobs, id)).toMatchObject({
      state: 'failed',
      error: { code: 'PREFLIGHT_REFUSED', details: [{ code: 'VM_NOT_RUNNING' }] },
    });
    expect(reserves(world)).toBe(1);
  });

  test.each([
    ['leaves the VM stopped', { ...forkRequest, parentMode: 'stop' as const }, {}],
    ['needs somebody to help it', forkRequest, { recoveryMsMax: 20 }],
  ])('is refused if that %s', async (_, firstRequest, limits) => {
    const world = new Scripted();
    world.on['A.forkProgress'] = () => ({ ...filled, state: 'filling', pagesDone: 5 });
    const { jobs } = await world.daemon(limits);
    const { id } = await jobs.submitFork(firstRequest);
    if ('recoveryMsMax' in limits) await rest(jobs, id);
    await expect(jobs.submitFork(forkRequest)).rejects.toMatchObject({
      details: [{ code: 'VM_IN_JOB', remedy: expect.stringContaining(`vmctl job ${id} --follow`) as string }],
    });
    delete world.on['A.forkProgress'];
    await jobs.recover(id);
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });

  test('is undone by a new daemon, which goes on with the first', async () => {
    const { world, jobs, first } = await filling();
    const { id } = await jobs.submitFork(forkRequest);
    delete world.on['A.forkProgress'];
    const next = await world.daemon();
    expect(await rest(next.jobs, id)).toMatchObject({ state: 'failed', isCommitted: false });
    expect(await rest(next.jobs, first.id)).toMatchObject({ state: 'done' });
    expect(await rest(next.jobs, (await next.jobs.submitFork(forkRequest)).id)).toMatchObject({ state: 'done' });
    expect(jobs.get(id).state).toBe('queued');
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
    expect(plan?.steps).toHaveLength(9);
    expect(world.acts).toEqual([]);
  });
});

describe('a new daemon', () => {
  const forkCrashedAt = (point: string) => crashedAt(point, (jobs) => jobs.submitFork(forkRequest));

  test.each(['before:reserveParent', 'after:prepareClones', 'after:forkPoint', 'before:commitFork'])(
    'undoes what had crashed at %s',
    async (point) => {
      const { world, id } = await forkCrashedAt(point);
      const { jobs } = await world.daemon();
      expect(await rest(jobs, id)).toMatchObject({ kind: 'fork', state: 'failed', isCommitted: false });
      expect(world.acts.slice(-2)).toEqual(UNDONE);
    },
  );

  test.each(['after:commitFork', 'before:runClones', 'after:runClones'])(
    'goes on at %s, where the agent knows of the commit and the journal does not',
    async (point) => {
      const { world, id } = await forkCrashedAt(point);
      world.on['A.discardFork'] = () => Promise.reject(new MigrationError('CONFLICT', 'committed'));
      const { jobs } = await world.daemon();
      const view = await restFork(jobs, id);
      expect(view).toMatchObject({ state: 'done', isCommitted: true, clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
      // The first daemon had found the clones. The agent has them in its record.
      expect(view.report).toMatchObject({ image: IMAGE, isWarm: true, parentPauseMs: 12.5, clones: [{}, {}, {}] });
      expect(view.report?.firstReadyMs).toBeGreaterThan(0);
      expect(world.acts).toEqual(['A.discardFork', 'A.runClones', 'A.finishFork', 'A.unreserve']);
    },
  );

  test.each(['before:fillImage', 'after:fillImage', 'before:releaseParent'])(
    'finishes what had crashed at %s, and reports what the first had found',
    async (point) => {
      const { world, id } = await forkCrashedAt(point);
      const { jobs } = await world.daemon();
      const view = await restFork(jobs, id);
      expect(view).toMatchObject({ state: 'done', isCommitted: true, clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
      expect(view.report).toMatchObject({ parentPauseMs: 12.5, faults: { parent: 5 } });
      expect(world.acts).toEqual(['A.finishFork', 'A.unreserve']);
    },
  );

  test.each([
    [false, UNDONE],
    [true, ['A.discardFork', 'A.finishFork', 'A.unreserve']],
  ])(
    'takes up a fork of an earlier build, whose clones ran before the commit (committed: %s)',
    async (isCommitted, acts) => {
      const world = new Scripted();
      const { plan } = planFork(forkRequest, { host: 'A', inventory: forkInventory, waitsFor: null });
      const steps = plan?.steps
        .filter(({ name }) => name !== 'runClones')
        .map((step) => (step.name === 'loadClones' ? { ...step, name: 'startClones' } : step));
      const { journal } = await FileJournal.on(world.journalStore);
      const at = new Date(0).toISOString();
      const fork = { type: 'fork', job: 'job-1', fork: IMAGE, plan: { ...plan, steps }, createdAt: at };
      await journal.append(fork as JournalEntry);
      const group = ['prepareClones', 'armParent', 'forkPoint', 'startClones', 'commitFork'] as const;
      await journal.append({ type: 'begin', job: 'job-1', step: 'reserveParent', at, group });
      if (isCommitted) world.on['A.discardFork'] = () => Promise.reject(new MigrationError('CONFLICT', 'committed'));
      const { jobs } = await world.daemon();
      expect(await rest(jobs, 'job-1')).toMatchObject({ state: isCommitted ? 'done' : 'failed', isCommitted });
      expect(world.acts.slice(-acts.length)).toEqual(acts);
      expect(world.acts).not.toContain('A.runClones');
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
