/** How a host learns that the pages of an image which it reads are those of the image's host; with fakes of native. */
import { afterEach, expect, test, vi } from 'vitest';
import { DigestServer } from '../../../../src/agent/fork/pages/digest-server.js';
import { failedImage } from '../../../../src/agent/fork/pages/failed-image.js';
import { type CheckOutcome, PageCheck } from '../../../../src/agent/fork/pages/page-check.js';
import { keepDamaged } from '../../../../src/agent/fork/unfillable.js';
import { MigrationError } from '../../../../src/domain/errors.js';

const IMAGE = '3'.repeat(16);
const PAGE_BYTES = 4096;
/** Pages in one answer. */
const PIECE = 16_384;
const quiet = () => undefined;
const log = { debug: quiet, info: quiet, warn: quiet, error: quiet };

/** Digests in memory: each page's is its number, four bytes long. */
function handleFake(pageCount: number) {
  const calls: string[] = [];
  let known = 0;
  return {
    calls,
    known: () => known,
    make: async (_: number, count: number) => {
      calls.push(`make ${count}`);
      known += count;
      if (known > pageCount) throw new Error('past the end');
    },
    read: (_: number, first: number, count: number) => Buffer.from(`${first}+${count}`),
    accept: (_: number, first: number, digests: Uint8Array) => {
      if (first !== known) throw new Error(`not next: ${first}`);
      known += Number(Buffer.from(digests).toString());
    },
    close: () => void calls.push('close'),
  };
}

function serverOf(pageCount: number, record: object = {}) {
  const handle = handleFake(pageCount);
  const memory = { pageBytes: PAGE_BYTES, regions: [{ id: 'ram0', lengthBytes: pageCount * PAGE_BYTES }] };
  const image = { id: IMAGE, state: 'complete', spec: { memory }, ...record };
  const images = { get: () => image, withDigests: async () => [] };
  const open = vi.fn(() => handle);
  const server = new DigestServer({ images, host: 'A', native: { openImageDigests: open } } as never);
  const ask = async (first: number) => {
    const digests = await server.digests(IMAGE, 0, first);
    return digests?.toString() ?? null;
  };
  return { server, handle, ask, image, open };
}

test('the host that has taken an image computes digests when they are asked for, and once', async () => {
  const { ask, handle, server, open } = serverOf(PIECE + 100);
  expect(await Promise.all([ask(0), ask(0)])).toEqual([`0+${PIECE}`, `0+${PIECE}`]);
  expect(await ask(PIECE)).toBe(`${PIECE}+100`);
  expect(handle.calls).toEqual([`make ${PIECE}`, 'make 100']);
  expect(open).toHaveBeenCalledTimes(1);
  await server.close(IMAGE);
  expect(handle.calls).toContain('close');
});

test('a reader that asks for a late page first is answered when those before are computed, by pieces', async () => {
  const { ask } = serverOf(PIECE + 100);
  expect(await ask(PIECE + 7)).toBe('');
  expect(await ask(PIECE + 7)).toBe(`${PIECE + 7}+93`);
});

test.each([
  ['that is being filled has none yet', { state: 'filling' }, ''],
  ['that was read from elsewhere, and not checked yet, has none yet', { state: 'filling', isChecked: false }, ''],
  ['that was read from elsewhere and could not be checked never has any', { isChecked: false }, null],
])('an image %s', async (_, record, answer) => {
  const { ask, handle } = serverOf(10, record);
  expect(await ask(0)).toBe(answer);
  expect(handle.calls).toEqual([]);
});

test('an image that was read from elsewhere passes on the digests that came with it', async () => {
  const { ask, handle } = serverOf(10, { state: 'filling', isChecked: false });
  handle.accept(0, 0, Buffer.from('6'));
  expect(await ask(2)).toBe('2+4');
  expect(await ask(6)).toBe('');
});

test.each([
  ['a region that there is not', 1, 0],
  ['a page past the end', 0, 10],
])('%s is refused', async (_, region, page) => {
  const { server } = serverOf(10);
  await expect(server.digests(IMAGE, region, page)).rejects.toMatchObject({ code: 'USAGE' });
});

test('a damaged image answers that it has failed, and never with digests', async () => {
  const { server } = serverOf(10, { state: 'failed', isChecked: false });
  await expect(server.digests(IMAGE, 0, 0)).rejects.toMatchObject({ details: { imageState: 'failed' } });
});

const checks: PageCheck[] = [];
afterEach(async () => {
  vi.useRealTimers();
  await Promise.all(checks.splice(0).map((check) => check.close()));
});

interface Script {
  /** The answers of the image's host, in their order; the last one is repeated. A number: so many digests. */
  readonly answers: readonly (number | '' | null | Error | Promise<never>)[];
  readonly pageCount?: number;
  readonly isComplete?: boolean;
  readonly bad?: number;
  readonly known?: number;
}

function checkOf({ answers, pageCount = 10, isComplete = true, bad, known }: Script) {
  const digests = handleFake(pageCount);
  if (known !== undefined) digests.accept(0, 0, Buffer.from(String(known)));
  const checked: [number, number][] = [];
  let asked = 0;
  const onOver = vi.fn<(outcome: CheckOutcome) => void>();
  const check = new PageCheck({
    ...{ log, image: IMAGE, digests, onOver, isComplete: () => isComplete },
    memory: { pageBytes: PAGE_BYTES, regions: [{ id: 'ram0', lengthBytes: pageCount * PAGE_BYTES }] },
    ask: async () => {
      const answer = answers[Math.min(asked++, answers.length - 1)] ?? null;
      if (answer instanceof Error) throw answer;
      return typeof answer === 'number' ? Buffer.from(String(answer)).toString('base64') : answer;
    },
    check: async (_, first, count) => {
      checked.push([first, count]);
      return bad !== undefined && bad >= first && bad < first + count ? bad : null;
    },
  });
  checks.push(check);
  return { check, checked, onOver, asked: () => asked };
}

/** Lets the timers of the check run, for at most `ms`. */
async function run(check: PageCheck, ms = 5_000): Promise<void> {
  check.start();
  await vi.advanceTimersByTimeAsync(ms);
}

test.each([
  [
    'every page is checked as its digests come',
    { answers: ['', 4, '', 6] },
    { kind: 'checked' },
    [
      [0, 4],
      [4, 6],
    ],
  ],
  [
    'digests that an earlier daemon was told are checked again',
    { answers: [4], known: 6 },
    { kind: 'checked' },
    [
      [0, 6],
      [6, 4],
    ],
  ],
  ['a host that has no digests is not waited for', { answers: [4, null] }, { kind: 'unknown', error: null }, [[0, 4]]],
  [
    'a page that differs is named',
    { answers: [4, 6], bad: 7 },
    { kind: 'damaged', page: 'page 7 of region ram0' },
    [
      [0, 4],
      [4, 6],
    ],
  ],
  [
    'a host that answers again goes on',
    { answers: [4, new Error('away'), 6] },
    { kind: 'checked' },
    [
      [0, 4],
      [4, 6],
    ],
  ],
] as const)('%s', async (_, script: Script, outcome, checked) => {
  vi.useFakeTimers();
  const made = checkOf(script);
  await run(made.check);
  expect(made.onOver.mock.calls).toEqual([[outcome]]);
  expect(made.check.outcome).toEqual(outcome);
  expect(made.checked).toEqual(checked);
});

test('only an image that is all here gives its host up, and not soon', async () => {
  vi.useFakeTimers();
  const away = [new MigrationError('UNREACHABLE', 'away')];
  const complete = checkOf({ answers: away });
  const filling = checkOf({ answers: away, isComplete: false });
  await Promise.all([run(complete.check, 25_000), run(filling.check, 0)]);
  expect(complete.check.outcome).toBeNull();
  expect(complete.check.trouble).toMatchObject({ code: 'UNREACHABLE' });
  await vi.advanceTimersByTimeAsync(10_000);
  expect(complete.check.outcome).toMatchObject({ kind: 'unknown', error: { code: 'UNREACHABLE' } });
  await vi.advanceTimersByTimeAsync(600_000);
  expect(filling.check.outcome).toBeNull();
});

test.each([
  ['the image has failed on its host', failedImage(IMAGE, 'B')],
  ['the files here have changed', new MigrationError('REGION_CHANGED', 'cut')],
])('no image is called sound if %s', async (_, error) => {
  vi.useFakeTimers();
  const { check } = checkOf({ answers: [4, error] });
  await run(check);
  expect(check.outcome).toEqual({ kind: 'failed', error });
});

test('a check that is closed does not wait for a host that does not answer', async () => {
  vi.useFakeTimers();
  const { check } = checkOf({ answers: [new Promise<never>(() => undefined)] });
  await run(check, 1_000);
  await check.close();
  expect(check.outcome).toBeNull();
});

test('an image that is all here is checked at once', async () => {
  vi.useFakeTimers();
  const { check, asked } = checkOf({ answers: [''] });
  await run(check, 3_000);
  const before = asked();
  check.hurry();
  await vi.advanceTimersByTimeAsync(300);
  expect(asked()).toBe(before + 1);
});

test('a check that is closed asks no more and has no outcome', async () => {
  vi.useFakeTimers();
  const { check, onOver, asked } = checkOf({ answers: [''] });
  await run(check, 1_000);
  await check.close();
  const before = asked();
  await vi.advanceTimersByTimeAsync(10_000);
  expect(asked()).toBe(before);
  expect(onOver).not.toHaveBeenCalled();
});

test('clones that have run stand still for good, others end, also if nothing can be recorded', async () => {
  const calls: string[] = [];
  const vms = {
    markDamaged: async (vm: { name: string }, why: string) => void calls.push(`stop ${vm.name}: ${why}`),
    endClone: async (vm: { name: string }) => void calls.push(`end ${vm.name}`),
  };
  const failing = { save: () => Promise.reject(new MigrationError('NO_SPACE', 'full')) };
  const context = { vms, log, images: { update: vi.fn() }, forkStore: failing } as never;
  const clones = [
    { name: 'ran', hasRun: true },
    { name: 'waits', hasRun: false },
  ] as never;
  const failed = { record: { image: IMAGE } as never, clones, filling: null, parent: null };
  await expect(keepDamaged(context, failed, 'page 7')).rejects.toMatchObject({ code: 'NO_SPACE' });
  expect(calls.sort()).toEqual(['end waits', 'stop ran: page 7']);
});
