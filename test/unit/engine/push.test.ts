/** The step in which memory is fetched while the VM still runs on the source. */
import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
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
  const next = () => ({ round: ++round, dirtyPages: (left.shift() ?? 0) * PAGES_MIB });
  world.on['A.noteDirty'] = next;
  world.on['A.stop'] = () => ({ stoppedAtUs: 2_000, stoppedForMs: 0, dirty: next() });
  world.on['B.progress'] = () => ({
    ...complete,
    counters: { ...complete.counters, pushBytes: 100 * 2 ** 20 },
  });
  return world;
}

async function move(world: Scripted, limits = {}) {
  const { jobs } = await world.daemon(limits);
  return restMigration(jobs, (await jobs.submit(hybrid)).id);
}

const taken = (world: Scripted): unknown[][] => {
  const seen: unknown[][] = [];
  world.on['B.takeBack'] = (...args: unknown[]) => (seen.push(['takeBack', args[1]]), { pages: 0 });
  world.on['B.awaitLoaded'] = (...args: unknown[]) => void seen.push(['awaitLoaded', args[1]]);
  return seen;
};

describe('forward', () => {
  test('each round is taken back before anything else is fetched, and the last one with the stop', async () => {
    const world = scripted(40, 10, 9, 1);
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
    expect(view.report).toMatchObject({ mode: 'hybrid', rounds: 4, bytes: { push: 100 * 2 ** 20 } });
    expect(view.report?.phases.map(({ name }) => name)).toContain('push');
  });

  test('fetches on until every page is here', async () => {
    const world = scripted(0, 0);
    const answers = [false, false, true];
    world.on['B.fetchAhead'] = () => ({ isDone: answers.shift() });
    expect(await move(world)).toMatchObject({ state: 'done' });
    expect(answers).toEqual([]);
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
    world.on['B.fetchAhead'] = () => ({ isDone: false });
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
