import { appendFile, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { ForkPlan } from '../../../src/domain/fork.js';
import type { MigrationPlan } from '../../../src/domain/migration.js';
import { encodeFrame } from '../../../src/durable/frames.js';
import { FileLogStore } from '../../../src/durable/log-store.js';
import { RecordLog } from '../../../src/durable/record-log.js';
import type { JournalEntry } from '../../../src/engine/ports/journal.js';
import { isCommittedByJournal, readHistories } from '../../../src/jobs/history.js';
import { FileJournal } from '../../../src/jobs/journal.js';
import { planFork } from '../../../src/planner/fork/plan.js';
import { planMigration } from '../../../src/planner/migration/plan.js';
import { decodeJournalEntry } from '../../../src/schemas/journal.js';
import { MemoryStore } from '../durable/memory-store.js';
import { forkInventory, forkRequest } from '../planner/fork-facts.js';
import { goodFacts, request, spec } from '../planner/planner-facts.js';

let path: string;
let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmigrate-journal-'));
  path = join(directory, 'jobs.log');
});
afterEach(async () => {
  await rm(directory, { recursive: true, force: true });
});

const at = '2026-01-01T00:00:00.000Z';
const jobEntry = (job: string): JournalEntry => ({
  type: 'job',
  job,
  session: '01'.repeat(16),
  token: '23'.repeat(32),
  plan: planMigration(request, goodFacts()).plan as MigrationPlan,
  spec,
  epoch: 3,
  accel: 'tcg',
  createdAt: at,
});

async function written(entries: readonly JournalEntry[]): Promise<readonly JournalEntry[]> {
  const { journal } = await FileJournal.open(path);
  for (const entry of entries) await journal.append(entry);
  await journal.close();
  return reopened();
}

async function reopened(): Promise<readonly JournalEntry[]> {
  const { journal, entries } = await FileJournal.open(path);
  await journal.close();
  return entries;
}

describe('the journal', () => {
  test('writes no entry that the next start would refuse', async () => {
    const { journal } = await FileJournal.open(path);
    await journal.append(jobEntry('j1'));
    const unknown = { type: 'begin', job: 'j1', step: 'noSuchStep' } as unknown as JournalEntry;
    await expect(journal.append(unknown)).rejects.toMatchObject({ code: 'INTERNAL' });
    await journal.append({ type: 'begin', job: 'j1', step: 'reserve' });
    await journal.close();
    expect((await reopened()).map(({ type }) => type)).toEqual(['job', 'begin']);
  });

  test('gives back what was appended, in order', async () => {
    const entries: JournalEntry[] = [
      jobEntry('j1'),
      { type: 'begin', job: 'j1', step: 'reserve', at },
      { type: 'end', job: 'j1', step: 'reserve', ms: 1.5 },
      { type: 'begin', job: 'j1', step: 'stopSource', at, group: ['transferState', 'commit', 'resumeTarget'] },
      { type: 'end', job: 'j1', step: 'transferState', ms: 8, result: { deviceStateBytes: 300_000 } },
      { type: 'undo', job: 'j1', step: 'stopSource' },
      { type: 'leftover', job: 'j1', step: 'prepareTarget' },
      { type: 'state', job: 'j1', state: 'failed', at, error: { code: 'STEP_FAILED', message: 'x' } },
    ];
    expect(await written(entries)).toEqual(entries);
  });

  test('is for no one else to read: it holds tokens', async () => {
    await written([jobEntry('j1')]);
    expect((await stat(path)).mode & 0o777).toBe(0o600);
  });

  test('appends that come together keep their order and are all durable', async () => {
    const { journal } = await FileJournal.open(path);
    await journal.append(jobEntry('j1'));
    const steps = ['reserve', 'prepareTarget', 'exposeSource', 'connectTarget'] as const;
    await Promise.all(steps.map((step) => journal.append({ type: 'begin', job: 'j1', step })));
    await journal.close();
    expect((await reopened()).slice(1).map((entry) => ('step' in entry ? entry.step : ''))).toEqual(steps);
  });

  test('a last line cut short is dropped, and the next append is whole', async () => {
    await written([jobEntry('j1')]);
    await appendFile(path, encodeFrame('{"type":"begin","job":"j1","step":"commit"}').subarray(0, 60));
    const end: JournalEntry = { type: 'begin', job: 'j1', step: 'reserve' };
    expect(await written([end])).toEqual([jobEntry('j1'), end]);
  });

  test('a key of a newer version is kept, also by a rewrite', async () => {
    const newer = { ...jobEntry('j1'), why: 'x' };
    const { log } = await RecordLog.open<unknown>(await FileLogStore.open(path), (json) => json);
    await log.append(newer);
    await log.close();
    expect(await reopened()).toEqual([newer]);
  });

  test('a damaged line in the middle is CORRUPT', async () => {
    await written([jobEntry('j1'), { type: 'begin', job: 'j1', step: 'reserve' }]);
    const text = await readFile(path, 'utf8');
    await writeFile(path, text.replace('"epoch":3', '"epoch":4'));
    await expect(FileJournal.open(path)).rejects.toMatchObject({
      code: 'CORRUPT',
      message: expect.stringContaining('jobs.log:1:') as string,
    });
  });

  test.each([
    ['an unknown step', { type: 'begin', job: 'j1', step: 'explode' }],
    ['an unknown type', { type: 'note', job: 'j1' }],
    ['a job without a plan', { ...jobEntry('j1'), plan: undefined }],
  ])('%s is CORRUPT', async (_, entry) => {
    const { log } = await RecordLog.open<unknown>(await FileLogStore.open(path), (json) => json);
    await log.append(entry);
    await log.close();
    await expect(FileJournal.open(path)).rejects.toMatchObject({ code: 'CORRUPT' });
  });

  test('keeps of finished jobs the first and last line, of the others all, and does not grow without end', async () => {
    const store = new MemoryStore();
    const { journal } = await FileJournal.on(store);
    await journal.append(jobEntry('open'));
    await journal.append({ type: 'begin', job: 'open', step: 'reserve' });
    for (let count = 0; count < 400; count++) {
      const job = `j${count}`;
      await journal.append(jobEntry(job));
      for (let repeat = 0; repeat < 8; repeat++) await journal.append({ type: 'begin', job, step: 'reserve' });
      await journal.append({ type: 'state', job, state: 'done', at });
    }
    expect(store.bytes.toString().split('\n').length).toBeLessThan(2_300);
    const { entries } = await FileJournal.on(store);
    expect(entries.filter(({ job }) => job === 'open')).toHaveLength(2);
    expect(entries.filter(({ job }) => job === 'j399').map(({ type }) => type)).toEqual(['job', 'state']);
    expect(entries.filter(({ job }) => job === 'j0')).toEqual([]);
  });

  test('a finished job with something left over keeps that line until it is cleared', async () => {
    const entries: JournalEntry[] = [
      jobEntry('j1'),
      { type: 'leftover', job: 'j1', step: 'prepareTarget' },
      { type: 'state', job: 'j1', state: 'failed', at },
    ];
    const kept = await written(entries);
    expect(readHistories(kept).get('j1')?.leftovers).toEqual(new Set(['prepareTarget']));
    const cleared = await written([{ type: 'cleared', job: 'j1', step: 'prepareTarget' }]);
    expect(cleared).toEqual([entries[0], entries[2]]);
    expect(readHistories(cleared).get('j1')?.state).toBe('failed');
  });
});

describe('a history', () => {
  test('counts what was announced together as begun, and knows when the VM was stopped', () => {
    const history = readHistories([
      jobEntry('j1'),
      { type: 'begin', job: 'j1', step: 'stopSource', at, group: ['transferState', 'commit', 'resumeTarget'] },
      { type: 'end', job: 'j1', step: 'stopSource', ms: 1 },
    ]).get('j1');
    expect([...(history?.begun ?? [])]).toEqual(['stopSource', 'transferState', 'commit', 'resumeTarget']);
    expect(history?.findings).toMatchObject({ stoppedAt: at });
    expect(history && isCommittedByJournal(history)).toBe(false);
  });

  test('is committed when the commit or anything after it has ended', () => {
    for (const step of ['commit', 'resumeTarget', 'drain'] as const) {
      const history = readHistories([jobEntry('j1'), { type: 'end', job: 'j1', step, ms: 1 }]).get('j1');
      expect(history && isCommittedByJournal(history)).toBe(true);
    }
  });
});

describe('forks in the journal', () => {
  const forkEntry = (job: string): JournalEntry => ({
    type: 'fork',
    job,
    fork: '0123456789abcdef',
    plan: planFork(forkRequest, { host: 'A', inventory: forkInventory, waitsFor: null }).plan as ForkPlan,
    createdAt: at,
  });

  test('are given back as they were appended, beside migrations', async () => {
    const entries: JournalEntry[] = [
      jobEntry('j1'),
      forkEntry('f1'),
      { type: 'begin', job: 'f1', step: 'reserveParent', at, group: ['prepareClones', 'armParent', 'commitFork'] },
      { type: 'end', job: 'f1', step: 'forkPoint', ms: 14, result: { parentPauseMs: 12.5 } },
      { type: 'undo', job: 'f1', step: 'prepareClones' },
    ];
    const back = await written(entries);
    expect(back.filter(({ job }) => job === 'f1')).toEqual(entries.slice(1));
    const history = readHistories(back).get('f1');
    expect(history).toMatchObject({ kind: 'fork', findings: { parentPauseMs: 12.5 } });
    expect([...(history?.begun ?? [])]).toContain('commitFork');
    expect(history && isCommittedByJournal(history)).toBe(false);
  });

  test('are committed when the commit or anything after it has ended', () => {
    for (const step of ['commitFork', 'runClones', 'fillImage', 'releaseParent'] as const) {
      const history = readHistories([forkEntry('f1'), { type: 'end', job: 'f1', step, ms: 1 }]).get('f1');
      expect(history && isCommittedByJournal(history)).toBe(true);
    }
    for (const [step, isProof] of [
      ['runClones', false],
      ['fillImage', true],
      ['releaseParent', true],
    ] as const) {
      const history = readHistories([forkEntry('f1'), { type: 'begin', job: 'f1', step, at }]).get('f1');
      expect(history && isCommittedByJournal(history), step).toBe(isProof);
    }
  });

  test('of a finished one the first and the last line are kept', async () => {
    const last: JournalEntry = { type: 'state', job: 'f1', state: 'failed', at, error: { code: 'STEP_FAILED' } };
    const back = await written([forkEntry('f1'), { type: 'begin', job: 'f1', step: 'reserveParent', at }, last]);
    expect(back).toEqual([forkEntry('f1'), last]);
  });

  test.each([
    ['a step of a migration', { type: 'begin', job: 'f1', step: 'stopSource', at }],
    ['a report of a migration', { type: 'state', job: 'f1', state: 'done', report: { job: 'f1', blackoutMs: 1 } }],
  ])('that tell of %s are corrupt', (_, entry) => {
    expect(() => readHistories([forkEntry('f1'), entry as JournalEntry])).toThrow(/the journal/);
  });

  test.each([
    ['an unknown step', { type: 'begin', job: 'f1', step: 'cloneParent', at }],
    ['an id that is none', { ...forkEntry('f1'), fork: '../../etc' }],
    ['too many clones', { ...forkEntry('f1'), plan: planWith({ cloneCount: 1025 }) }],
    ['neither VM nor image', { ...forkEntry('f1'), plan: planWith({ vm: null }) }],
  ])('with %s are refused', (_, entry) => {
    expect(() => decodeJournalEntry(entry)).toThrow();
  });

  function planWith(change: object) {
    const plan = planFork(forkRequest, { host: 'A', inventory: forkInventory, waitsFor: null }).plan as ForkPlan;
    return { ...plan, request: { ...plan.request, ...change } };
  }
});
