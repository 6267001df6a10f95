/** The step in which memory is fetched while the VM still runs on the source. */
import { describe, expect, test } from 'vitest';
import { type ErrorJson, MigrationError } from '../../../src/domain/errors.js';
import type { MigrationOrder } from '../../../src/domain/migration.js';
import { request } from '../planner/planner-facts.js';
import { complete, held, restMigration, Scripted } from './scripted.js';

const hybrid = { ...request, mode: 'hybrid' } as const;
const UNDONE = ['A.unexpose', 'B.discard', 'A.unreserve'];
const PAGES_MIB = 256;

/** Each round of the VM finds so many MiB written; the last one is that of the stop. */
function scripted(...dirtyMib: number[]): Scripted {
  const world = new Scripted();
  const left = [...dirtyMib];
  let round = 0;
  let dirtyPages = 100 * PAGES_MIB;
  let pushBytes = 0;
  const next = () => {
    dirtyPages = (left.shift() ?? 0) * PAGES_MIB;
    return { round: ++round, dirtyPages };
  };
  world.on['A.noteDirty'] = next;
  world.on['A.stop'] = () => ({ stoppedAtUs: 2_000, stoppedForMs: 0, dirty: next() });
  world.on['B.takeBack'] = () => ({ pages: dirtyPages });
  // All that is missing comes before the target is asked.
  world.on['B.progress'] = () => {
    pushBytes += dirtyPages * complete.pageBytes;
    dirtyPages = 0;
    return { ...complete, counters: { ...complete.counters, pushBytes } };
  };
  return world;
}

async function move(world: Scripted, limits = {}, asked: MigrationOrder = hybrid) {
  const { jobs } = await world.daemon(limits);
  return restMigration(jobs, (await jobs.submit(asked)).id);
}

const taken = (world: Scripted): unknown[][] => {
  const seen: unknown[][] = [];
  const takeBack = world.on['B.takeBack'] as ((...args: unknown[]) => unknown) | undefined;
  world.on['B.takeBack'] = (...args: unknown[]) => {
    seen.push(['takeBack', args[1]]);
    return takeBack?.(...args) ?? { pages: 0 };
  };
  world.on['B.awaitLoaded'] = (...args: unknown[]) => void seen.push(['awaitLoaded', args[1]]);
  return seen;
};

describe('forward', () => {
  test('each round is taken back before anything else is fetched, and the last one with the stop', async () => {
    const world = scripted(40, 10, 1, 1);
    const seen = taken(world);
    const exposed: unknown[] = [];
    world.on['A.expose'] = (asked: { isTracked?: boolean }) => {
      exposed.push(asked.isTracked);
      return { transport: 'tcp', host: '10.0.0.1', port: 1, keys: [] };
    };
    const view = await move(world);
    expect(view.error).toBeNull();
    expect(world.acts).toEqual([
      ...['A.reserve', 'B.prepare', 'A.expose', 'B.connect'],
      ...['B.fetchAhead', 'A.noteDirty', 'B.takeBack'],
      ...['B.fetchAhead', 'A.noteDirty', 'B.takeBack'],
      ...['B.fetchAhead', 'A.noteDirty', 'B.takeBack'],
      ...['A.stop', 'A.transferState', 'B.awaitLoaded', 'B.resume', 'A.release', 'B.finish'],
    ]);
    expect(seen).toEqual([
      ['takeBack', 1],
      ['takeBack', 2],
      ['takeBack', 3],
      ['awaitLoaded', 4],
    ]);
    expect(exposed).toEqual([true]);
    expect(view.report).toMatchObject({ mode: 'hybrid', rounds: 4, bytes: { push: 151 * 2 ** 20 } });
    expect(view.report?.phases.map(({ name }) => name)).toContain('push');
  });

  test('fetches on until every page is here', async () => {
    const world = scripted(10, 1, 0);
    const answers = [
      { isDone: false, isHeld: false },
      { isDone: false, isHeld: true },
      { isDone: true, isHeld: true },
    ];
    world.on['B.fetchAhead'] = () => answers.shift();
    expect(await move(world)).toMatchObject({ state: 'done' });
    expect(world.acts.slice(4, -6)).toEqual([
      // Nothing is taken back while pages are in flight.
      ...['B.fetchAhead', 'B.fetchAhead', 'A.noteDirty', 'B.takeBack'],
      ...['B.fetchAhead', 'A.noteDirty', 'B.takeBack'],
    ]);
  });

  test('gives a round the time that it takes, and that of a call on top', async () => {
    const world = scripted(0, 0);
    world.on['B.fetchAhead'] = async () => {
      await new Promise((resolve) => setTimeout(resolve, 60));
      return { isDone: true, isHeld: true };
    };
    expect(await move(world, { callMsMax: 30 })).toMatchObject({ state: 'done' });
  });

  test('a post-copy names no round', async () => {
    const world = new Scripted();
    const seen = taken(world);
    const { jobs } = await world.daemon();
    expect(await restMigration(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'done' });
    expect(seen).toEqual([['awaitLoaded', undefined]]);
  });
});

describe('is undone', () => {
  test.each(['B.fetchAhead', 'B.progress', 'A.noteDirty', 'B.takeBack'])(
    'if %s fails, and is not repeated',
    async (call) => {
      const world = scripted(40);
      world.on[call] = () => Promise.reject(new MigrationError('UNREACHABLE', 'the answer was lost'));
      const view = await move(world);
      expect(view).toMatchObject({ state: 'failed', error: { code: 'STEP_FAILED', cause: { code: 'UNREACHABLE' } } });
      expect(world.acts.slice(world.acts.lastIndexOf(call) + (call === 'B.progress' ? 6 : 1))).toEqual(UNDONE);
      if (call !== 'B.progress') expect(world.calls.filter((made) => made === call)).toHaveLength(1);
      expect(world.calls).not.toContain('A.stop');
    },
  );

  test('if no page arrives for long', async () => {
    const world = scripted();
    world.on['B.fetchAhead'] = () => ({ isDone: false, isHeld: false });
    world.on['B.progress'] = () => ({ ...complete, state: 'disconnected', hasRun: false, pagesPresent: 7 });
    const { error } = await move(world, { pushQuietMsMax: 20 });
    expect(error).toMatchObject({ cause: { code: 'DISCONNECTED', message: 'no page has arrived for 20 ms' } });
    expect(world.acts.slice(-3)).toEqual(UNDONE);
  });

  test.each([
    ['gone', 'QEMU_GONE'],
    ['failed', 'NATIVE_FAILED'],
  ])('if the session on the target is %s', async (state, code) => {
    const world = scripted();
    world.on['B.progress'] = () => ({ ...complete, state, hasRun: false });
    expect((await move(world)).error).toMatchObject({ cause: { code } });
  });

  test('by a cancel at once', async () => {
    const world = scripted();
    const fetching = held(world, 'B.fetchAhead', { isDone: false });
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(hybrid);
    await fetching.came;
    await jobs.cancel(id);
    expect(await restMigration(jobs, id)).toMatchObject({ state: 'cancelled' });
    fetching.release();
    expect(world.acts.slice(-3)).toEqual(UNDONE);
    expect(world.calls).not.toContain('A.noteDirty');
  });

  test('if the stop does not say what was written last', async () => {
    const world = scripted(0);
    world.on['A.stop'] = () => ({ stoppedAtUs: 2_000, stoppedForMs: 0 });
    expect((await move(world)).error).toMatchObject({ cause: { code: 'INTERNAL' } });
    expect(world.acts.slice(-4)).toEqual(['A.continueVm', ...UNDONE]);
  });
});

const causeOf = (error: unknown) => (error as ErrorJson | null)?.cause;

describe('a pre-copy', () => {
  const precopy = { ...request, mode: 'precopy', downtimeMsMax: 500 } as const;
  /** The guest has next to no memory that could be fetched in the downtime. */
  const slow = (world: Scripted): Scripted => {
    world.on['B.fetchAhead'] = async () => {
      await new Promise((resolve) => setTimeout(resolve, 20));
      return { isDone: true };
    };
    let pushBytes = 0;
    world.on['B.progress'] = () => {
      pushBytes += 2 ** 10;
      return { ...complete, counters: { ...complete.counters, pushBytes } };
    };
    return world;
  };

  test('fetches what was written last before the device state is moved', async () => {
    const world = scripted(40, 0, 3);
    const seen = taken(world);
    const view = await move(world, {}, precopy);
    expect(view.error).toBeNull();
    expect(world.acts.slice(4, -2)).toEqual([
      ...['B.fetchAhead', 'A.noteDirty', 'B.takeBack'],
      ...['A.stop', 'B.takeBack', 'B.fetchAhead'],
      ...['A.transferState', 'B.awaitLoaded', 'B.resume'],
    ]);
    expect(seen).toEqual([
      ['takeBack', 1],
      ['takeBack', 2],
      ['awaitLoaded', 2],
    ]);
    expect(view.report).toMatchObject({ mode: 'precopy', rounds: 2 });
    expect(view.report?.phases.map(({ name }) => name)).toContain('pushLast');
  });

  test('leaves the VM where it is if it writes too fast, and says what it would need', async () => {
    const world = slow(scripted(...Array.from({ length: 40 }, () => 30)));
    const view = await move(world, {}, precopy);
    expect(view).toMatchObject({ state: 'failed', error: { code: 'STEP_FAILED' } });
    const cause = causeOf(view.error);
    expect(cause).toMatchObject({ code: 'DOWNTIME_TOO_LONG', details: { downtimeMsMax: 500 } });
    const neededMs = (cause?.details as { neededMs: number } | undefined)?.neededMs ?? 0;
    expect(neededMs).toBeGreaterThan(500);
    expect(cause?.remedy).toContain(`--max-downtime ${neededMs}`);
    expect(world.calls).not.toContain('A.stop');
    expect(world.acts.slice(-3)).toEqual(UNDONE);
  });

  test('lets the VM run on if the last of its memory takes too long', async () => {
    const world = scripted(0, 100);
    let calls = 0;
    world.on['B.fetchAhead'] = async () => {
      if (++calls > 1) await new Promise((resolve) => setTimeout(resolve, 2));
      return { isDone: calls === 1 };
    };
    const view = await move(world, {}, { ...precopy, downtimeMsMax: 60 });
    expect(view.error).toMatchObject({ step: 'pushLast', cause: { code: 'DOWNTIME_TOO_LONG' } });
    expect(causeOf(view.error)?.message).toMatch(/more than 60 ms: 100 MiB were left/);
    expect(world.acts.slice(-4)).toEqual(['A.continueVm', ...UNDONE]);
    expect(world.calls).not.toContain('A.transferState');
  });

  test('is undone by a lost connection while the VM stands still', async () => {
    const world = scripted(0, 0);
    let calls = 0;
    world.on['B.fetchAhead'] = () => {
      if (++calls > 1) throw new MigrationError('UNREACHABLE', 'the target is gone');
      return { isDone: true };
    };
    expect((await move(world, {}, precopy)).error).toMatchObject({ step: 'pushLast', cause: { code: 'UNREACHABLE' } });
    expect(world.acts.slice(-4)).toEqual(['A.continueVm', ...UNDONE]);
  });
});
