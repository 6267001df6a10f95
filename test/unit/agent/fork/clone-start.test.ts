/** The two calls that turn waiting processes into running clones, with processes that a test scripts. */
import { availableParallelism } from 'node:os';
import { setImmediate } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { CloneStarts } from '../../../../src/agent/fork/clones/start.js';
import { MigrationError, toMigrationError } from '../../../../src/domain/errors.js';

const gone = () => Promise.reject(new MigrationError('QEMU_GONE', 'it has ended'));

/** A clone that counts how often it is resumed. `load` and `run` replace what its process does. */
function clone(
  index: number,
  change: {
    load?: () => Promise<void>;
    run?: () => Promise<void>;
    reattached?: () => Promise<void>;
    state?: string;
  } = {},
) {
  const counts = { loads: 0, runs: 0, reattached: 0 };
  /** For how long its QEMU was told to keep what it frees. */
  const held: number[] = [];
  const vm = {
    memory: { holdTrim: (holdMs: number) => void held.push(holdMs) },
    ...{
      spec: { name: `web-${index}` },
      state: change.state ?? 'incoming',
      guestEnd: null,
      pid: 2 ** 30,
      hasRun: false,
    },
    process: {
      loadFile: () => ({
        loaded: () => (counts.loads++, change.load?.() ?? Promise.resolve()),
        run: () => (counts.runs++, change.run?.() ?? Promise.resolve()),
        end: () => undefined,
      }),
      loadState: async () => 'loaded',
      runLoaded: () => (counts.reattached++, change.reattached?.() ?? Promise.resolve()),
      explain: async (error: unknown) => toMigrationError(error),
    },
  };
  return { identity: { index, name: `web-${index}` }, vm, counts, held };
}

const NO_CHANGE: { readonly processorCount?: number } = {};

function startsOf({ isClosing = false, readyAtMs = new Map<number, number>(), processors = NO_CHANGE } = {}) {
  const ended: string[] = [];
  const starts = new CloneStarts({
    vms: { endClone: async ({ spec }) => void ended.push(spec.name) },
    inject: { hit: () => Promise.resolve() },
    ...{ ...processors, isClosing: () => isClosing, readyAtMs },
  });
  return { starts, ended };
}

const all = (clones: readonly object[]) => clones as never;

test('a load runs nothing, and the go runs each clone once', async () => {
  const { starts } = startsOf();
  const clones = [clone(0), clone(1)];
  const { loaded, failures } = await starts.load(all(clones), { isPartialAllowed: false });
  expect(loaded).toEqual(clones);
  expect(failures).toEqual([]);
  expect(clones.map(({ counts }) => counts)).toEqual([0, 1].map(() => ({ loads: 1, runs: 0, reattached: 0 })));
  expect(starts.readyAtMs.size).toBe(0);
  for (let n = 0; n < 2; n++) expect(await starts.run(all(clones))).toEqual([]);
  expect(clones.map(({ counts }) => counts)).toEqual([0, 1].map(() => ({ loads: 1, runs: 1, reattached: 0 })));
  expect([...starts.readyAtMs.keys()]).toEqual([0, 1]);
});

test.each([true, false])('a clone that cannot load is left out (partial: %s)', async (isPartialAllowed) => {
  const { starts } = startsOf();
  const clones = [clone(0), clone(1, { load: gone }), clone(2)];
  const { loaded, failures } = await starts.load(all(clones), { isPartialAllowed });
  expect(failures[0]).toMatchObject({ index: 1, name: 'web-1', error: { code: 'QEMU_GONE' } });
  expect(loaded).toEqual([clones[0], clones[2]]);
  expect(clones.map(({ counts }) => counts.runs)).toEqual([0, 0, 0]);
});

test('a clone that cannot be resumed is ended and named, and the others run', async () => {
  const { starts, ended } = startsOf();
  const refuses = () => Promise.reject(new MigrationError('QEMU_FAILED', 'its disk is locked'));
  const clones = [clone(0), clone(1, { run: refuses }), clone(2, { run: gone, reattached: gone }), clone(3)];
  await starts.load(all(clones), { isPartialAllowed: false });
  const failures = await starts.run(all(clones));
  expect(failures).toMatchObject([
    { index: 1, name: 'web-1', error: { code: 'QEMU_FAILED' } },
    { index: 2, name: 'web-2', error: { code: 'QEMU_GONE' } },
  ]);
  expect(ended).toEqual(['web-1', 'web-2']);
  expect([...starts.readyAtMs.keys()]).toEqual([0, 3]);
});

test.each([
  [{ processorCount: 2 }, 8],
  [{ processorCount: 16 }, 16],
  [{}, Math.max(8, availableParallelism())],
])('as many clones load at once as there are processors, and never fewer than 8: %o', async (processors, expected) => {
  const { starts } = startsOf({ processors });
  let loading = 0;
  let most = 0;
  const load = async () => {
    most = Math.max(most, ++loading);
    await setImmediate();
    loading--;
  };
  const clones = Array.from({ length: 3 * expected }, (_, index) => clone(index, { load }));
  await starts.load(all(clones), { isPartialAllowed: false });
  expect(most).toBe(expected);
});

test('a clone keeps what it frees from its load until it runs, or its load is given up', async () => {
  const { starts } = startsOf();
  const atRun: number[] = [];
  const runs: ReturnType<typeof clone> = clone(0, { run: async () => void atRun.push(...runs.held) });
  const fails = clone(1, { load: gone });
  const waits = clone(2);
  await starts.load(all([runs, fails, waits]), { isPartialAllowed: true });
  expect([runs, waits].map(({ held }) => held)).toEqual([[60_000], [60_000]]);
  expect(fails.held).toEqual([60_000, 0]);
  await starts.run(all([runs]));
  expect(atRun).toEqual([60_000]);
  expect(runs.held).toEqual([60_000, 0]);
  starts.end();
  expect(waits.held).toEqual([60_000, 0]);
});

test('a connection that was lost for a moment loses no clone', async () => {
  const { starts, ended } = startsOf();
  const clones = [clone(0, { run: gone })];
  await starts.load(all(clones), { isPartialAllowed: false });
  expect(await starts.run(all(clones))).toEqual([]);
  expect(clones[0]?.counts.reattached).toBe(1);
  expect(ended).toEqual([]);
});

test('the daemon after a crash resumes what waits, and leaves alone what has run, is paused or has ended', async () => {
  const { starts, ended } = startsOf({ readyAtMs: new Map([[0, 1000]]) });
  const clones = [
    clone(0),
    clone(1),
    clone(2, { state: 'paused' }),
    clone(3, { state: 'stopped' }),
    clone(4, { state: 'running' }),
  ];
  const failures = await starts.run(all(clones));
  expect(failures).toMatchObject([{ index: 3, error: { code: 'QEMU_GONE' } }]);
  expect(clones.map(({ counts }) => counts.reattached)).toEqual([0, 1, 0, 0, 0]);
  expect(starts.readyAtMs.get(0)).toBe(1000);
  expect(new Set(starts.readyAtMs.keys())).toEqual(new Set([0, 1, 2, 4]));
  expect(ended).toEqual(['web-3']);
});

test('a daemon that exits ends no clone, whose calls fail', async () => {
  const { starts, ended } = startsOf({ isClosing: true });
  const clones = [clone(0, { reattached: gone })];
  await expect(starts.run(all(clones))).rejects.toMatchObject({ code: 'QEMU_GONE' });
  expect(ended).toEqual([]);
});

test('a look finds the clones that an earlier daemon has resumed without recording it, and resumes none', async () => {
  const { starts } = startsOf();
  const clones = [clone(0), clone(1), clone(2)];
  Object.assign(clones[1]?.vm.process ?? {}, { loadState: async () => 'hasRun' });
  Object.assign(clones[2]?.vm.process ?? {}, { loadState: gone });
  await starts.look(all(clones));
  expect([...starts.readyAtMs.keys()]).toEqual([1]);
  expect(clones.map(({ counts }) => counts.reattached)).toEqual([0, 0, 0]);
});

test('a process that does not answer says nothing of the load; one that waits does', async () => {
  const { starts } = startsOf();
  const clones = [clone(0), clone(1), clone(2)];
  expect(await starts.haveLoaded(all(clones))).toBe(true);
  Object.assign(clones[2]?.vm.process ?? {}, { loadState: gone });
  await expect(starts.haveLoaded(all(clones))).rejects.toMatchObject({ code: 'UNREACHABLE', isRetryable: true });
  Object.assign(clones[0]?.vm.process ?? {}, { loadState: async () => 'waiting' });
  expect(await starts.haveLoaded(all(clones))).toBe(false);
});
