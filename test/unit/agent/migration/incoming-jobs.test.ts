/** What the target says of a move, from its own session alone: the coordinator is never asked here. */
import { afterEach, describe, expect, test, vi } from 'vitest';
import { Arrival, type ArrivalReading, type ArrivalView, percentOf } from '../../../../src/agent/migration/arrival.js';
import { goneError } from '../../../../src/agent/migration/gone.js';
import { IncomingJobs } from '../../../../src/agent/migration/incoming-jobs.js';
import type { MigrationJobView } from '../../../../src/domain/job.js';
import type { MigrationMode } from '../../../../src/domain/migration.js';
import type { PrepareRequest } from '../../../../src/engine/ports/session.js';
import { JobsOfBothEnds } from '../../../../src/jobs/both-ends.js';
import { jobView } from '../../../support/api-fakes.js';
import { rest, Scripted } from '../../engine/scripted.js';
import { request as order, spec } from '../../planner/planner-facts.js';

const request: PrepareRequest = {
  ...{ session: 's'.repeat(32), job: 'job-7', spec, source: 'A', epoch: 3, mode: 'postcopy', accel: 'tcg' },
  ...{ token: 't', bandwidthBytesPerS: 0 },
};
const prepared: ArrivalReading = {
  ...{ state: 'prepared', hasRun: false, pagesTotal: 1_000, pagesPresent: 0, bytesDone: 0, faultCount: 0, error: null },
};
const filling: ArrivalReading = { ...prepared, state: 'filling', hasRun: true, pagesPresent: 410, bytesDone: 400 };

/** A session whose reading, and a clock, that a test sets. */
class FakeSession {
  nowMs = 1_000;
  reading = prepared;
  hurries = 0;
  readonly clock = {
    nowMs: () => this.nowMs,
    isoNow: () => new Date(1_700_000_000_000 + this.nowMs).toISOString(),
    sleep: async () => undefined,
  };
  readonly #arrival: Arrival;

  constructor(mode: MigrationMode) {
    this.#arrival = new Arrival({ ...request, mode }, this.clock);
  }

  arrival = (): ArrivalView => this.#arrival.view(this.reading);
  refresh = async (): Promise<void> => undefined;
  hurry = (): void => void this.hurries++;
}

function started(recoveryMsMax = 120_000, mode: MigrationMode = 'postcopy') {
  const session = new FakeSession(mode);
  const silent = () => undefined;
  const log = { debug: silent, info: silent, warn: silent, error: silent };
  const jobs = new IncomingJobs({ host: 'B', clock: session.clock, log }, recoveryMsMax);
  jobs.begin(session);
  return { session, jobs, job: () => jobs.find('job-7') as MigrationJobView };
}

afterEach(() => void vi.useRealTimers());

describe('an incoming job', () => {
  test('runs from its preparation, and is committed when the VM has run here', () => {
    const { session, job } = started();
    const whose = { id: 'job-7', vm: 'vm1', source: 'A', target: 'B', coordinator: 'A', kind: 'migrate' };
    expect(job()).toMatchObject({ ...whose, state: 'running', step: 'prepareTarget', isCommitted: false });
    session.reading = filling;
    expect(job()).toMatchObject({ state: 'running', step: 'drain', isCommitted: true, progress: { pagesDone: 410 } });
    session.reading = { ...filling, state: 'complete', pagesPresent: 1_000 };
    expect(job()).toMatchObject({ state: 'running', step: 'releaseSource' });
  });

  test('fetches memory while the VM still runs on its source, if that is its mode', () => {
    const { session, job } = started(120_000, 'hybrid');
    expect(job()).toMatchObject({ step: 'prepareTarget' });
    session.reading = { ...prepared, state: 'connected', pagesPresent: 300, bytesDone: 300 };
    expect(job()).toMatchObject({ state: 'running', step: 'push', isCommitted: false, error: null });
  });

  test('says that nothing comes, for how long that may be, and that pages come again', () => {
    const { session, job } = started(30_000);
    session.reading = { ...filling, bytesDone: 0 };
    job();
    session.nowMs += 1_000;
    session.reading = filling;
    expect(job().progress?.bytesPerS).toBeGreaterThan(0);
    session.reading = { ...filling, state: 'disconnected' };
    const still = { bytesPerS: 0, secondsLeft: null, pagesDone: 410 };
    const remedy = expect.stringContaining('goes on by itself') as string;
    expect(job()).toMatchObject({ state: 'recovering', progress: still, error: { code: 'DISCONNECTED', remedy } });
    session.nowMs += 31_000;
    expect(job()).toMatchObject({ state: 'needsRecovery', error: { code: 'NEEDS_RECOVERY', remedy } });
    session.reading = { ...filling, pagesPresent: 411 };
    expect(job()).toMatchObject({ state: 'running', error: null });
    // A connection that carries nothing is no better than none.
    session.nowMs += 11_000;
    expect(job()).toMatchObject({ state: 'recovering' });
  });

  test.each([
    ['a kill', 'killed', 'lost'],
    ['a stop by force', 'stopped', 'lost'],
    ["the guest's own end", 'guest-shutdown', 'done'],
    ['a panic', 'panicked', 'done'],
    ['the reboot of a clone', 'guest-reset', 'done'],
  ])('ends as what it is after %s', (_, reason, state) => {
    const { session, job } = started();
    const exit = { at: '', reason, code: null, signal: null, exitCode: null };
    session.reading = { ...filling, state: 'gone', error: goneError('vm1', 'B', exit) };
    expect(job()).toMatchObject({ state, step: null });
    session.reading = filling;
    expect(job()).toMatchObject({ state });
  });

  test('ends when the coordinator ends its session, as done or as undone', () => {
    const first = started();
    first.session.reading = { ...filling, state: 'complete', pagesPresent: 1_000 };
    first.jobs.end(first.session, null);
    expect(first.job()).toMatchObject({ state: 'done', step: null, error: null });
    const second = started();
    second.jobs.end(second.session, goneError('vm1', 'B', null));
    expect(second.job()).toMatchObject({ state: 'failed', error: { code: 'QEMU_GONE' } });
  });

  test('is told to those who follow it while they do nothing', () => {
    vi.useFakeTimers();
    const { session, jobs } = started();
    const seen: string[] = [];
    const end = jobs.subscribe('job-7', ({ state, step }) => seen.push(`${state} ${step}`));
    session.reading = filling;
    vi.advanceTimersByTime(600);
    session.reading = { ...filling, state: 'disconnected' };
    vi.advanceTimersByTime(600);
    vi.advanceTimersByTime(600);
    end();
    expect(seen).toEqual(['running drain', 'recovering drain']);
    jobs.end(session, null);
    vi.advanceTimersByTime(600);
    expect(vi.getTimerCount()).toBe(0);
  });

  test('is listed among few others that have ended', () => {
    const { session, jobs } = started();
    for (let number = 0; number < 300; number++) {
      const other = new FakeSession('postcopy');
      other.arrival = () => ({ ...session.arrival(), request: { ...request, job: `job-x${number}` } });
      jobs.begin(other);
      jobs.end(other, null);
    }
    const ids = jobs.list().map(({ id }) => id);
    expect(ids).toContain('job-7');
    expect(ids).toContain('job-x299');
    expect(ids.length).toBeLessThanOrEqual(100);
  });
});

test('per cent is never 100 before the last page', () => {
  expect(percentOf({ ...filling, pagesTotal: 1_000_000, pagesPresent: 999_999 })).toBe(99);
  expect(percentOf({ ...filling, pagesPresent: 1_000 })).toBe(100);
  expect(percentOf({ ...filling, state: null })).toBeNull();
});

describe('the jobs of both ends', () => {
  async function both() {
    const { jobs: own } = await new Scripted().daemon();
    const ownJob = await rest(own, (await own.submit(order)).id);
    const { session, jobs: incoming } = started();
    return { ownJob, session, jobs: new JobsOfBothEnds(own, incoming) };
  }

  test('are listed and found together', async () => {
    const { jobs, ownJob } = await both();
    expect(
      jobs
        .list()
        .map(({ id }) => id)
        .sort(),
    ).toEqual([ownJob.id, 'job-7'].sort());
    expect(jobs.get('job-7')).toMatchObject({ coordinator: 'A' });
    expect(jobs.get(ownJob.id)).toEqual(ownJob);
    expect(() => jobs.get('job-none')).toThrow(expect.objectContaining({ code: 'NOT_FOUND' }) as Error);
    expect(() => jobs.subscribe('job-none', () => undefined)).toThrow(/no job/);
  });

  test('a foreign one is cancelled where it belongs, and hurried here', async () => {
    const { jobs, session, ownJob } = await both();
    await expect(jobs.cancel('job-7')).rejects.toMatchObject({
      code: 'CONFLICT',
      remedy: 'run "vmctl cancel job-7" on A',
    });
    session.reading = { ...filling, state: 'disconnected' };
    await expect(jobs.cancel('job-7')).rejects.toMatchObject({
      message: expect.stringMatching(/only be finished/) as string,
    });
    expect(await jobs.recover('job-7')).toMatchObject({ id: 'job-7' });
    expect(session.hurries).toBe(1);
    const seen: string[] = [];
    const end = jobs.subscribe('*', ({ id }) => seen.push(id));
    session.reading = filling;
    jobs.get('job-7');
    expect(seen).toEqual(['job-7']);
    end();
    await expect(jobs.recover(ownJob.id)).rejects.toMatchObject({ code: 'CONFLICT' });
  });
});

test('a job of another host has the shape of every job', () => {
  const { job } = started();
  expect(Object.keys(job()).sort()).toEqual([...Object.keys(jobView('x')), 'coordinator'].sort());
});
