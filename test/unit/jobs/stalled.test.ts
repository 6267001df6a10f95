/** Jobs that need recovery go on by themselves. Nobody calls `recover` here, except where a test says so. */
import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { JobView } from '../../../src/domain/job.js';
import type { JobManager } from '../../../src/jobs/jobs.js';
import { StalledJobs } from '../../../src/jobs/stalled.js';
import { complete, rest, Scripted } from '../engine/scripted.js';
import { forkRequest } from '../planner/fork-facts.js';
import { request, vm } from '../planner/planner-facts.js';

const LIMITS = { recoveryMsMax: 20, stalledMsFirst: 2, stalledMsMax: 8 };
const filling = { ...complete, state: 'filling', pagesPresent: 20 };
const cut = { ...filling, state: 'disconnected' };

function failing(code: 'DISCONNECTED' | 'CORRUPT' | 'TIMEOUT' | 'CONFLICT') {
  return () => {
    throw new MigrationError(code, `${code} as told`);
  };
}

function reaches(jobs: JobManager, id: string, state: JobView['state']): Promise<JobView> {
  return new Promise((resolve) => {
    const look = (view: JobView): void => {
      if (view.state !== state) return;
      end();
      resolve(view);
    };
    const end = jobs.subscribe(id, look);
    look(jobs.get(id));
  });
}

/** A move whose hosts cannot reach each other any more. */
async function stalledMove(limits: object = LIMITS) {
  const world = new Scripted();
  world.on['B.progress'] = () => cut;
  world.on['B.reconnect'] = failing('DISCONNECTED');
  const { jobs, registry } = await world.daemon(limits);
  const { id } = await jobs.submit(request);
  await reaches(jobs, id, 'needsRecovery');
  return { world, jobs, registry, id };
}

const attempts = (world: Scripted): number => world.calls.filter((call) => call === 'B.reconnect').length;

describe('a stalled job', () => {
  test('is tried again and again, stays what it is, and ends well when the link is back', async () => {
    const { world, jobs, id } = await stalledMove();
    const states = new Set<string>();
    jobs.subscribe(id, ({ state }) => states.add(state));
    const before = attempts(world);
    await expect.poll(() => attempts(world)).toBeGreaterThan(before + 5);
    expect([...states].filter((state) => state !== 'needsRecovery')).toEqual([]);
    delete world.on['B.reconnect'];
    delete world.on['B.progress'];
    expect(await reaches(jobs, id, 'done')).toMatchObject({ error: null });
    expect(world.calls.filter((call) => call === 'B.resume')).toHaveLength(1);
  });

  test('shows what has arrived and no rate, and live figures once pages arrive without a new connection', async () => {
    const { world, jobs, id } = await stalledMove();
    expect(jobs.get(id).progress).toMatchObject({ pagesDone: 20, bytesPerS: 0, secondsLeft: null });
    let pagesPresent = 20;
    world.on['B.progress'] = () => ({ ...filling, pagesPresent: pagesPresent++ });
    expect(await reaches(jobs, id, 'running')).toMatchObject({ error: null });
    await expect.poll(() => jobs.get(id).progress?.pagesDone).toBeGreaterThan(30);
    delete world.on['B.progress'];
    await reaches(jobs, id, 'done');
  });

  test('takes no place of a running job', async () => {
    const { world, jobs, registry, id } = await stalledMove({ ...LIMITS, runningJobsMax: 1 });
    world.on['A.vmInventory'] = (name: never) => ({ ...vm, spec: { ...vm.spec, name } });
    await registry.swapOwner('vm2', null, { vm: 'vm2', owner: 'A', epoch: 3, session: null });
    delete world.on['B.progress'];
    world.on['B.progress'] = (session: never) => (session === world.sessionOf(id) ? cut : complete);
    const other = await jobs.submit({ ...request, vm: 'vm2' });
    expect(await rest(jobs, other.id)).toMatchObject({ state: 'done' });
    expect(jobs.get(id).state).toBe('needsRecovery');
  });

  test('does not wait for its turn when somebody says recover', async () => {
    const { world, jobs, id } = await stalledMove({ ...LIMITS, stalledMsFirst: 3_600_000, stalledMsMax: 3_600_000 });
    delete world.on['B.progress'];
    expect(await jobs.recover(id)).toMatchObject({ state: 'recovering' });
    await reaches(jobs, id, 'done');
  });

  test('ends with the daemon, and goes on in the next', async () => {
    const { world, jobs, id } = await stalledMove({ ...LIMITS, stalledMsFirst: 3_600_000 });
    await jobs.close();
    delete world.on['B.progress'];
    const next = await world.daemon();
    await reaches(next.jobs, id, 'done');
  });

  test('whose commit nobody knows is asked about until somebody does', async () => {
    const world = new Scripted();
    world.on['A.commitFork'] = failing('TIMEOUT');
    world.on['A.discardFork'] = failing('CORRUPT');
    const { jobs } = await world.daemon(LIMITS);
    const { id } = await jobs.submitFork(forkRequest);
    await reaches(jobs, id, 'needsRecovery');
    world.on['A.discardFork'] = failing('CONFLICT');
    await reaches(jobs, id, 'done');
  });
});

describe('a committed job that a user gives up on the source', () => {
  test('is lost, holds nothing, and the target forgets it when its QEMU has ended', async () => {
    const { world, jobs, id } = await stalledMove();
    let isWaiting = true;
    world.on['B.finish'] = () => {
      if (isWaiting) throw new MigrationError('CONFLICT', 'pages are missing');
    };
    await jobs.giveUp(id);
    expect(jobs.get(id)).toMatchObject({
      state: 'lost',
      error: { code: 'VM_LOST', remedy: expect.stringContaining('vmctl stop --force vm1') as string },
    });
    expect(world.acts).toContain('A.unreserve');
    expect(world.acts).not.toContain('A.release');
    await expect.poll(() => world.calls.filter((call) => call === 'B.finish').length).toBeGreaterThan(1);
    isWaiting = false;
    await expect.poll(() => world.journalled().at(-1)).toMatchObject({ type: 'cleared', step: 'resumeTarget' });
    const next = await world.daemon();
    expect(next.jobs.get(id)).toMatchObject({ state: 'lost' });
  });

  test('is not lost if the last page came first', async () => {
    const { world, jobs, id } = await stalledMove();
    let isThere = false;
    world.on['B.progress'] = () => (isThere ? complete : cut);
    world.on['A.release'] = failing('DISCONNECTED');
    isThere = true;
    await expect.poll(() => world.calls).toContain('A.release');
    await expect(jobs.giveUp(id)).rejects.toMatchObject({ code: 'CONFLICT' });
    delete world.on['A.release'];
    await reaches(jobs, id, 'done');
  });

  test('is refused before the commit', async () => {
    const world = new Scripted();
    world.on['B.awaitLoaded'] = () => new Promise(() => undefined);
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    await expect.poll(() => world.calls).toContain('B.awaitLoaded');
    await expect(jobs.giveUp(id)).rejects.toMatchObject({ code: 'CONFLICT' });
    await jobs.cancel(id);
  });
});

describe('a VM that was stopped by force on the target', () => {
  test('is lost by its own name, and both hosts are freed', async () => {
    const world = new Scripted();
    const forced = { code: 'QEMU_GONE', message: 'vm1 was stopped by force on B', details: { reason: 'stopped' } };
    world.on['B.progress'] = () => ({ ...complete, state: 'gone', error: forced });
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    const { error } = await reaches(jobs, id, 'lost');
    expect(error).toMatchObject({ code: 'VM_LOST', cause: { message: 'vm1 was stopped by force on B' } });
    expect((error as { message: string }).message).toMatch(/^vm1 was stopped by force on B/);
    expect(world.acts).toContain('A.release');
    await expect.poll(() => world.acts.at(-1)).toBe('B.finish');
  });

  test('does not free the source if nobody forced it', async () => {
    const world = new Scripted();
    world.on['B.progress'] = () => ({ ...complete, state: 'gone', error: { code: 'QEMU_GONE', message: 'it ended' } });
    const { jobs } = await world.daemon();
    await reaches(jobs, (await jobs.submit(request)).id, 'lost');
    expect(world.acts).not.toContain('A.release');
    await expect.poll(() => world.acts.at(-1)).toBe('B.finish');
  });
});

test('waits grow up to a limit, and no two jobs wait alike', async () => {
  const waits: number[] = [];
  let draw = 0;
  const jobs = new StalledJobs({
    clock: { nowMs: () => 0, isoNow: () => '', sleep: async (ms) => void waits.push(ms) },
    random: { hex: () => ['0000', '8000', 'ffff'][draw++ % 3]! },
    limits: { stalledMsFirst: 1_000, stalledMsMax: 10_000 },
    signal: new AbortController().signal,
  });
  let left = 8;
  const stalled = { kind: 'stalled', error: new MigrationError('NEEDS_RECOVERY', 'x') } as const;
  const attempt = async () => (--left === 0 ? ({ kind: 'done', report: null } as const) : stalled);
  expect(await jobs.retry({} as never, attempt, () => undefined)).toMatchObject({ kind: 'done' });
  const about = [1_000, 2_000, 4_000, 8_000, 10_000, 10_000, 10_000, 10_000];
  for (const [index, ms] of about.entries()) {
    const factor = [0.75, 1, 1.25][index % 3]!;
    expect(waits[index]).toBeCloseTo(ms * factor, -1);
  }
});
