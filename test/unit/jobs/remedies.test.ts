/**
 * The walk over all states of a job: every command that a remedy names, there or in a refusal of another request for
 * the same VM, is one that the daemon accepts in that state.
 */
import { describe, expect, test } from 'vitest';
import { VmMoves } from '../../../src/agent/vm-moves.js';
import { jobError } from '../../../src/cli/follow.js';
import { MigrationError, toMigrationError } from '../../../src/domain/errors.js';
import { JOB_STATES, type JobState } from '../../../src/domain/job.js';
import type { Refusal } from '../../../src/domain/refusal.js';
import type { VmState } from '../../../src/domain/vm.js';
import type { JobManager } from '../../../src/jobs/jobs.js';
import { complete, Scripted } from '../engine/scripted.js';
import { filled, forkInventory, forkRequest } from '../planner/fork-facts.js';
import { request, vm } from '../planner/planner-facts.js';

const LIMITS = { recoveryMsMax: 30, stalledMsFirst: 3_600_000 };
const filling = { ...complete, state: 'filling', pagesPresent: 20 };
const never = () => new Promise(() => undefined);
const failing = (code: 'DISCONNECTED' | 'CONFLICT') => () => {
  throw new MigrationError(code, 'as told');
};

interface Case {
  readonly what: string;
  readonly state: JobState;
  readonly isCommitted: boolean;
  readonly kind: 'migrate' | 'fork';
  readonly on: Scripted['on'];
  readonly limits?: object;
  readonly isCancelled?: true;
}

const CASES: readonly Case[] = [
  {
    what: 'a queued move',
    state: 'queued',
    isCommitted: false,
    kind: 'migrate',
    on: {},
    limits: { runningJobsMax: 0 },
  },
  {
    what: 'a move before its commit',
    state: 'running',
    isCommitted: false,
    kind: 'migrate',
    on: { 'B.prepare': never },
  },
  {
    ...{ what: 'a move that fetches', state: 'running', isCommitted: true, kind: 'migrate' },
    on: { 'B.progress': () => filling },
    limits: { recoveryMsMax: 3_600_000 },
  },
  {
    ...{ what: 'a move whose link is cut', state: 'recovering', isCommitted: true, kind: 'migrate' },
    on: { 'B.progress': () => ({ ...filling, state: 'disconnected' }), 'B.reconnect': failing('DISCONNECTED') },
    limits: { recoveryMsMax: 3_600_000 },
  },
  {
    ...{ what: 'a move that needs recovery', state: 'needsRecovery', isCommitted: true, kind: 'migrate' },
    on: { 'B.progress': () => ({ ...filling, state: 'disconnected' }), 'B.reconnect': failing('DISCONNECTED') },
  },
  { what: 'a move that is done', state: 'done', isCommitted: true, kind: 'migrate', on: {} },
  {
    what: 'a move that failed',
    state: 'failed',
    isCommitted: false,
    kind: 'migrate',
    on: { 'B.prepare': failing('CONFLICT') },
  },
  {
    ...{ what: 'a move that was cancelled', state: 'cancelled', isCommitted: false, kind: 'migrate' },
    ...{ on: { 'B.prepare': never }, isCancelled: true },
  },
  {
    ...{ what: 'a lost move', state: 'lost', isCommitted: true, kind: 'migrate' },
    on: { 'B.progress': () => ({ ...complete, state: 'gone' }) },
  },
  {
    ...{ what: 'a move that was stopped by force', state: 'lost', isCommitted: true, kind: 'migrate' },
    on: {
      'B.progress': () => ({
        ...{ ...complete, state: 'gone' },
        error: { code: 'QEMU_GONE', message: 'stopped', details: { reason: 'stopped' } },
      }),
    },
  },
  {
    what: 'a fork before its commit',
    state: 'running',
    isCommitted: false,
    kind: 'fork',
    on: { 'A.armParent': never },
  },
  {
    ...{ what: 'a fork that fills', state: 'running', isCommitted: true, kind: 'fork' },
    on: { 'A.forkProgress': () => ({ ...filled, state: 'filling', pagesDone: 5 }) },
    limits: { recoveryMsMax: 3_600_000 },
  },
  {
    ...{ what: 'a fork that needs recovery', state: 'needsRecovery', isCommitted: true, kind: 'fork' },
    on: { 'A.forkProgress': () => ({ ...filled, state: 'filling', pagesDone: 5 }) },
  },
  {
    ...{ what: 'a fork whose image is lost', state: 'lost', isCommitted: true, kind: 'fork' },
    on: { 'A.forkProgress': () => ({ ...filled, state: 'failed', error: { code: 'NO_SPACE', message: 'full' } }) },
  },
];

async function reached({ state, isCommitted, kind, on, limits, isCancelled }: Case) {
  const world = new Scripted();
  Object.assign(world.on, on);
  const { jobs } = await world.daemon({ ...LIMITS, ...limits });
  const { id } = await (kind === 'fork' ? jobs.submitFork(forkRequest) : jobs.submit(request));
  if (isCancelled === true) await jobs.cancel(id);
  await expect.poll(() => jobs.get(id)).toMatchObject({ state, isCommitted });
  return { world, jobs, id };
}

/** Every remedy that somebody can meet now: of the job itself, and of requests for its VM. */
async function remediesNow(world: Scripted, jobs: JobManager, id: string): Promise<string[]> {
  const job = jobs.get(id);
  world.on['A.vmInventory'] = () => ({ ...vm, job: jobs.jobOf('vm1')?.id ?? null });
  world.on['A.forkInventory'] = () => ({ ...forkInventory, vm: { ...vm, job: jobs.jobOf('vm1')?.id ?? null } });
  const plans = [await jobs.dryRun(request), await jobs.dryRunFork(forkRequest)];
  const refusals: Refusal[] = plans.flatMap((plan) => [...plan.refusals]);
  const chain: string[] = [];
  const isWell = job.state !== 'needsRecovery' && (job.error === null || job.error === undefined);
  for (let error: unknown = isWell ? undefined : jobError(job); error instanceof MigrationError; error = error.cause)
    chain.push(error.remedy ?? '');
  return [...refusals.map(({ remedy }) => remedy), ...chain];
}

const ACTS: readonly [RegExp, (jobs: JobManager, of: string) => unknown][] = [
  [/vmctl job (\S+) --follow/g, (jobs, id) => jobs.get(id)],
  [/(?:vmigrate|vfork) --recover (\S+)/g, (jobs, id) => jobs.recover(id)],
  [/vmctl stop (?:--force )?(\S+)/g, (jobs, name) => stopOnSource(jobs, name)],
  // Last, because it changes most.
  [/vmctl cancel (\S+)/g, (jobs, id) => jobs.cancel(id)],
];

async function stopOnSource(jobs: JobManager, name: string): Promise<void> {
  const job = jobs.jobOf(name);
  const state: VmState = job?.isCommitted === true ? 'departed' : 'running';
  const registry = { owner: async () => null };
  const moves = new VmMoves({
    ...{ host: 'A', registry, noticeOf: () => null, arrivalOf: () => null },
    jobOf: (other) => jobs.jobOf(other),
    giveUp: (id) => jobs.giveUp(id),
  });
  await moves.beforeStop({ name, state }, false);
}

describe('what a remedy names is possible', () => {
  test.each(CASES)('$what', async (scenario) => {
    const { world, jobs, id } = await reached(scenario);
    const remedies = (await remediesNow(world, jobs, id)).join('\n');
    const named = remedies.match(/(?:vmctl|vmigrate|vfork) [a-z-]+/g) ?? [];
    let known = 0;
    for (const [pattern, act] of ACTS) {
      for (const [, of = ''] of remedies.matchAll(pattern)) {
        known++;
        // "vmctl stop --image" ends clones, which no move holds.
        if (of.startsWith('--')) continue;
        const failure = await Promise.resolve()
          .then(() => act(jobs, of.replace(/[";,)]+$/, '')))
          .then(() => null, toMigrationError);
        expect(failure?.message ?? null, `${remedies}\n${pattern} ${of}`).toBeNull();
      }
    }
    const others = named.filter((command) => /^vmctl (?:images?|ps|show|resume|run|jobs|hosts)$/.test(command));
    expect(known + others.length, remedies).toBe(named.length);
    await jobs.close();
  });

  test('in every state that a job can have', () => {
    expect(new Set(CASES.map(({ state }) => state))).toEqual(new Set(JOB_STATES));
  });

  test('also while a VM still arrives: nobody is told to cancel, or to end the source that serves it', async () => {
    const world = new Scripted();
    world.on['A.vmInventory'] = () => ({ ...vm, job: 'job-9', arrivingFrom: 'B' });
    const inventory = await world.agent('B').inventory.inventory();
    world.on['B.inventory'] = () => ({ ...inventory, vmNames: ['vm1'] });
    const { jobs } = await world.daemon();
    const { refusals } = await jobs.dryRun(request);
    expect(refusals.map(({ code }) => code)).toEqual(['VM_IN_JOB', 'NAME_TAKEN']);
    const remedies = refusals.map(({ remedy }) => remedy).join('\n');
    expect(remedies).not.toMatch(/cancel|vmctl stop/);
    expect(remedies.match(/vmctl job job-9 --follow/g)).toHaveLength(2);
  });
});
