import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import { complete, crashedAt, gate, held, rest, restMigration, Scripted } from '../engine/scripted.js';
import { host, request, vm } from '../planner/planner-facts.js';

describe('submit', () => {
  test('is durable when it answers', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const view = await jobs.submit(request);
    expect(world.journalled()[0]).toMatchObject({ type: 'job', job: view.id, epoch: 3, accel: 'tcg' });
    await rest(jobs, view.id);
  });

  test('refuses with every reason, and leaves nothing behind', async () => {
    const world = new Scripted();
    world.on['A.vmInventory'] = () => ({ ...vm, state: 'paused', migrationBlockers: ['vfio'] });
    const { jobs } = await world.daemon();
    await expect(jobs.submit(request)).rejects.toMatchObject({
      code: 'PREFLIGHT_REFUSED',
      details: [{ code: 'VM_NOT_RUNNING' }, { code: 'DEVICE_NOT_MIGRATABLE' }],
    });
    expect(jobs.list()).toEqual([]);
    expect(world.journalStore.bytes).toHaveLength(0);
    expect(world.acts).toEqual([]);
  });

  test.each([
    ['a host that is no peer', ['A'], 'TARGET_UNREACHABLE'],
    ['the source itself', ['A', 'B'], 'TARGET_IS_SOURCE'],
  ])('refuses %s', async (_, peers, code) => {
    const world = new Scripted();
    world.peers = peers;
    const { jobs } = await world.daemon();
    const target = code === 'TARGET_IS_SOURCE' ? 'A' : 'B';
    expect(await jobs.dryRun({ ...request, target })).toMatchObject({ plan: null, refusals: [{ code }] });
  });

  test('a host that answers by another name is not the target', async () => {
    const world = new Scripted();
    const inventory = await world.agent('C').inventory.inventory();
    world.on['B.inventory'] = () => inventory;
    const { jobs } = await world.daemon();
    const { refusals } = await jobs.dryRun(request);
    expect(refusals).toMatchObject([{ code: 'TARGET_UNREACHABLE' }]);
    expect(refusals[0]?.reason).toMatch(/the address of B is C/);
  });

  test('a VM that has moved away is refused with the name of the host that has it', async () => {
    const world = new Scripted();
    const { jobs, registry } = await world.daemon();
    await registry.swapOwner('vm1', 3, { vm: 'vm1', owner: 'C', epoch: 4, session: null });
    const { refusals } = await jobs.dryRun(request);
    expect(refusals).toMatchObject([{ code: 'VM_NOT_OWNED', remedy: 'ask the daemon on C' }]);
  });

  test('one VM is in one job at a time, however close two requests are', async () => {
    const world = new Scripted();
    const preparing = held(world, 'B.prepare', { nativeUri: null });
    const { jobs } = await world.daemon();
    const both = await Promise.allSettled([jobs.submit(request), jobs.submit(request)]);
    expect(both.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
    await expect(jobs.submit(request)).rejects.toMatchObject({
      code: 'PREFLIGHT_REFUSED',
      details: [{ code: 'VM_IN_JOB' }],
    });
    preparing.release();
    await rest(jobs, jobs.list()[0]!.id);
  });

  test('a full disk refuses the job and frees the VM', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    world.journalStore.room = 3;
    await expect(jobs.submit(request)).rejects.toMatchObject({ code: 'NO_SPACE' });
    world.journalStore.room = null;
    await rest(jobs, (await jobs.submit(request)).id);
  });

  test.each([
    ['answers for none', 'STORAGE_NOT_PROVEN', () => [], /has not answered for/],
    [
      'is of an earlier build',
      'STORAGE_NOT_PROVEN',
      () => Promise.reject(new MigrationError('NOT_FOUND', 'no such call')),
      /older vmigrate/,
    ],
    ['fails', 'STORAGE_NOT_PROVEN', () => Promise.reject(new MigrationError('TIMEOUT', 'late')), /late/],
  ])('the markers are taken away again, also if the target %s', async (_, code, answer, reason) => {
    const world = new Scripted();
    const file = { path: '/d', use: 'disk d0', isWritable: true, format: 'raw' };
    const view = { path: '/d', problem: null, marker: 'x' };
    world.on['A.offerStorage'] = () => ({ proof: 'ef'.repeat(16), files: [file], views: [view] });
    world.on['B.viewStorage'] = answer;
    const { jobs } = await world.daemon();
    const { refusals } = await jobs.dryRun(request);
    expect(refusals).toMatchObject([{ code }]);
    expect(refusals[0]?.reason).toMatch(reason);
    expect(world.calls.filter((call) => call.endsWith('Storage'))).toEqual([
      'A.offerStorage',
      'B.viewStorage',
      'A.endStorage',
    ]);
    world.calls.length = 0;
    expect((await jobs.dryRun({ ...request, sharedStorage: 'assume' })).refusals).toEqual([]);
    expect(world.calls.filter((call) => call.endsWith('Storage'))).toEqual([]);
  });

  test.each([
    ['sees another file there', [{ problem: null, inode: '1:3' }], 1],
    ['sees nothing there', [{ problem: 'ENOENT', inode: '' }], 1],
    ['sees it', [{ problem: null, inode: '1:2' }], 0],
    ['cannot tell', [], 0],
  ])('shm is refused if the target does not reach the socket of the source: it %s', async (_, views, count) => {
    const world = new Scripted();
    const socketMark = { path: '/state/format', inode: '1:2' };
    for (const name of ['A', 'B'])
      world.on[`${name}.inventory`] = () => ({ ...host(name), machineId: 'one', socketMark });
    world.on['B.viewStorage'] = () => views;
    const { jobs } = await world.daemon();
    const { refusals } = await jobs.dryRun({ ...request, transport: 'shm' });
    expect(refusals.map(({ code }) => code)).toEqual(Array(count).fill('TRANSPORT_UNAVAILABLE'));
    world.calls.length = 0;
    await jobs.dryRun(request);
    expect(world.calls).not.toContain('B.viewStorage');
  });

  test('a dry run shows the plan and touches nothing', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const { plan, refusals } = await jobs.dryRun(request);
    expect(plan?.steps).toHaveLength(10);
    expect(refusals).toEqual([]);
    expect(world.acts).toEqual([]);
  });
});

describe('cancel', () => {
  test('before the commit: the VM runs on the source when it answers', async () => {
    const world = new Scripted();
    const loading = held(world, 'B.awaitLoaded');
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    await loading.came;
    expect(await jobs.cancel(id)).toMatchObject({ state: 'cancelled', error: { code: 'CANCELLED' } });
    expect(world.acts.slice(-4)).toEqual(['A.continueVm', 'A.unexpose', 'B.discard', 'A.unreserve']);
    expect(await jobs.cancel(id)).toMatchObject({ state: 'cancelled' });
  });

  test('after the commit: refused, and the job goes on', async () => {
    const world = new Scripted();
    const resuming = held(world, 'B.resume', { resumedAtUs: 0 });
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    await resuming.came;
    await expect(jobs.cancel(id)).rejects.toMatchObject({
      code: 'CONFLICT',
      message: expect.stringMatching(/has moved/) as string,
    });
    resuming.release();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
    await expect(jobs.cancel(id)).rejects.toMatchObject({ code: 'CONFLICT' });
  });

  test('of a job that waits for its turn: it never begins', async () => {
    const world = new Scripted();
    const preparing = held(world, 'B.prepare', { nativeUri: null });
    world.on['A.vmInventory'] = (name: never) => ({ ...vm, spec: { ...vm.spec, name } });
    const { jobs } = await world.daemon({ runningJobsMax: 1 });
    const first = await jobs.submit(request);
    const second = await jobs.submit({ ...request, vm: 'vm2' });
    expect(second.state).toBe('queued');
    expect(await jobs.cancel(second.id)).toMatchObject({ state: 'cancelled' });
    preparing.release();
    await rest(jobs, first.id);
    expect(world.calls.filter((call) => call === 'A.reserve')).toHaveLength(1);
  });
});

test('no more jobs run at a time than the limit says', async () => {
  const world = new Scripted();
  let running = 0;
  let runningMost = 0;
  world.on['A.vmInventory'] = (name: never) => ({ ...vm, spec: { ...vm.spec, name } });
  world.on['A.reserve'] = () => void (runningMost = Math.max(runningMost, ++running));
  world.on['B.finish'] = () => void running--;
  const { jobs, registry } = await world.daemon({ runningJobsMax: 2 });
  const views = [];
  for (let number = 2; number < 8; number++) {
    await registry.swapOwner(`vm${number}`, null, { vm: `vm${number}`, owner: 'A', epoch: 3, session: null });
    views.push(await jobs.submit({ ...request, vm: `vm${number}` }));
  }
  const ends = await Promise.all(views.map(({ id }) => rest(jobs, id)));
  expect(ends.map(({ state }) => state)).toEqual(Array(6).fill('done'));
  expect(runningMost).toBe(2);
  expect(jobs.list().map(({ vm: name }) => name)).toEqual(['vm2', 'vm3', 'vm4', 'vm5', 'vm6', 'vm7']);
});

describe('a new daemon', () => {
  const migrationCrashedAt = (point: string) => crashedAt(point, (jobs) => jobs.submit(request));

  test.each([
    ['before:reserve', ['A.unreserve']],
    ['after:prepareTarget', ['B.discard', 'A.unreserve']],
    ['before:stopSource', ['A.continueVm', 'A.unexpose', 'B.discard', 'A.unreserve']],
    ['before:commit', ['A.continueVm', 'A.unexpose', 'B.discard', 'A.unreserve']],
  ])('undoes what had crashed at %s', async (point, acts) => {
    const { world, id } = await migrationCrashedAt(point);
    const { jobs, registry } = await world.daemon();
    expect(await rest(jobs, id)).toMatchObject({ state: 'failed', isCommitted: false });
    expect(world.acts).toEqual(acts);
    expect(await registry.owner('vm1')).toMatchObject({ owner: 'A' });
  });

  test.each([
    ['after:commit', ['B.resume', 'A.release', 'B.finish']],
    ['before:drain', ['A.release', 'B.finish']],
    ['after:releaseSource', ['A.release', 'B.finish']],
  ])('finishes what had crashed at %s', async (point, acts) => {
    const { world, id } = await migrationCrashedAt(point);
    const { jobs } = await world.daemon();
    const view = await restMigration(jobs, id);
    expect(view).toMatchObject({ state: 'done', isCommitted: true });
    expect(world.acts).toEqual(acts);
    expect(view.report?.blackoutMs).toBeGreaterThanOrEqual(0);
  });

  test('undoes although the target is no peer any more, and clears up when it is again', async () => {
    const { world, id } = await migrationCrashedAt('before:commit');
    world.peers = ['A'];
    const { jobs } = await world.daemon();
    expect(await rest(jobs, id)).toMatchObject({ state: 'failed' });
    expect(world.acts).toEqual(['A.continueVm', 'A.unexpose', 'A.unreserve']);
    await jobs.close();
    world.peers = ['A', 'B'];
    const next = await world.daemon();
    await expect.poll(() => world.calls).toContain('B.discard');
    await next.jobs.close();
  });

  test('lists what had ended, with its report', async () => {
    const world = new Scripted();
    const first = await world.daemon();
    const before = await rest(first.jobs, (await first.jobs.submit(request)).id);
    const { jobs } = await world.daemon();
    expect(jobs.get(before.id)).toMatchObject({ state: 'done', isCommitted: true, report: before.report });
    await expect(jobs.recover(before.id)).rejects.toMatchObject({ code: 'CONFLICT' });
    expect(() => jobs.get('job-none')).toThrow(expect.objectContaining({ code: 'NOT_FOUND' }) as Error);
  });
});

describe('close', () => {
  test('undoes what is not committed', async () => {
    const world = new Scripted();
    const loading = held(world, 'B.awaitLoaded');
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    await loading.came;
    await jobs.close();
    expect(jobs.get(id).state).toBe('cancelled');
    expect(world.acts).toContain('A.continueVm');
    await expect(jobs.submit(request)).rejects.toMatchObject({ code: 'UNREACHABLE' });
  });

  test('leaves what is committed to the next daemon', async () => {
    const world = new Scripted();
    const draining = gate();
    world.on['B.progress'] = () => {
      draining.open();
      return { ...complete, state: 'filling', pagesPresent: 5 };
    };
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    await draining.passed;
    await jobs.close();
    expect(world.acts).not.toContain('A.release');
    delete world.on['B.progress'];
    const next = await world.daemon();
    expect(await rest(next.jobs, id)).toMatchObject({ state: 'done' });
  });
});

test('a subscriber that throws harms nobody, and one that leaves hears no more', async () => {
  const world = new Scripted();
  const { jobs } = await world.daemon();
  const seen: string[] = [];
  jobs.subscribe('*', () => {
    throw new MigrationError('INTERNAL', 'as told');
  });
  const end = jobs.subscribe('*', ({ step }) => {
    if (step !== null && seen.at(-1) !== step) seen.push(step);
    if (step === 'commit') end();
  });
  expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'done' });
  expect(seen).toEqual([
    'reserve',
    'prepareTarget',
    'exposeSource',
    'connectTarget',
    'stopSource',
    'transferState',
    'commit',
  ]);
  expect(world.warnings).toContain('a subscriber failed');
});
