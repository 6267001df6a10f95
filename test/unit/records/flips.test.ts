/**
 * Every kind of record with every single bit changed: none of them is accepted. The records are those of build 0.1.0,
 * as this build has upgraded them.
 */
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { readWanted } from '../../../src/agent/fork/pool.js';
import { FORK_RECORD } from '../../../src/agent/fork/record.js';
import { IMAGE_RECORD } from '../../../src/agent/image/record.js';
import { SESSION_RECORD } from '../../../src/agent/migration/session-store.js';
import { readRecord } from '../../../src/agent/vm/record.js';
import { decodeOwnerChange } from '../../../src/cluster/file.js';
import { decodeFrames, encodeFrame } from '../../../src/durable/frames.js';
import { decodeRecord } from '../../../src/durable/record-files.js';
import { openState, readFormat } from '../../../src/durable/state-format.js';
import { decodeJournalEntry } from '../../../src/schemas/journal.js';

const KEPT = fileURLToPath(new URL('../../fixtures/records-0.1.0', import.meta.url));

let state: string;
beforeEach(async () => {
  const directory = await mkdtemp(join(tmpdir(), 'vmg-flips-'));
  state = join(directory, 'state');
});
afterEach(() => rm(dirname(state), { recursive: true, force: true }));

async function upgraded(kept: string): Promise<void> {
  await cp(join(KEPT, kept), state, { recursive: true });
  await openState(state);
}

/** Calls `use` with each single-bit change of the bytes. Bytes of the large middle of a file are taken by `step`. */
async function flips(bytes: Buffer, step: number, use: (flipped: Buffer, at: number) => Promise<void>): Promise<void> {
  for (let bit = 0; bit < bytes.length * 8; bit += bit > 1600 && bit < bytes.length * 8 - 1600 ? step : 1) {
    const flipped = Buffer.from(bytes);
    flipped[bit >> 3] = (flipped[bit >> 3] ?? 0) ^ (1 << (bit & 7));
    await use(flipped, bit >> 3);
  }
}

/** Thousands of records are written and read. */
const FLIPS_MS = 60_000;

describe('a record with any bit changed is CORRUPT', () => {
  const textKinds = [
    ['session', 'killed/A', 'sessions', SESSION_RECORD],
    ['fork', 'forked/A', 'forks', FORK_RECORD],
    ['image', 'forked/A', 'images', IMAGE_RECORD],
  ] as const;
  test.each(textKinds)('%s', { timeout: FLIPS_MS }, async (_, kept, folder, kind) => {
    await upgraded(kept === 'forked/A' && folder === 'forks' ? 'filling/A' : kept);
    const names = (await readdir(join(state, folder))).filter((name) => name.endsWith('.json'));
    expect(names).not.toEqual([]);
    for (const name of names.slice(0, 2)) {
      const path = join(state, folder, name);
      const bytes = await readFile(path);
      expect(() => decodeRecord(kind as never, bytes.toString(), path)).not.toThrow();
      await flips(bytes, 1, async (flipped) => {
        expect(() => decodeRecord(kind as never, flipped.toString(), path)).toThrow(
          expect.objectContaining({ code: 'CORRUPT' }),
        );
      });
    }
  });

  const fileKinds: readonly (readonly [string, string, string, (path: string) => Promise<unknown>])[] = [
    ['VM', 'killed/A', 'vms/half/record.json', (path) => readRecord(dirname(path))],
    ['waiting sets', 'forked/A', 'pool.json', readWanted],
    ['mark of the directory', 'killed/A', 'format', (path) => readFormat(dirname(path))],
  ];
  test.each(fileKinds)('%s', { timeout: FLIPS_MS }, async (_, kept, name, read) => {
    await upgraded(kept);
    const path = join(state, name);
    const bytes = await readFile(path);
    await read(path);
    await flips(bytes, 37, async (flipped) => {
      await writeFile(path, flipped);
      await expect(read(path)).rejects.toMatchObject({ code: 'CORRUPT' });
    });
  });

  test.each<[string, (json: unknown) => unknown]>([
    ['owners.log', decodeOwnerChange],
    ['jobs.log', decodeJournalEntry],
  ])('%s', { timeout: FLIPS_MS }, async (log, decode) => {
    await upgraded('killed/A');
    const bytes = await readFile(join(state, log));
    const { records, wholeBytes } = decodeFrames(bytes, decode, log);
    expect(wholeBytes).toBe(bytes.length);
    expect(records.length).toBeGreaterThan(5);
    await flips(bytes, 499, async (flipped) => {
      expect(() => decodeFrames(flipped, decode, log)).toThrow(expect.objectContaining({ code: 'CORRUPT' }));
    });
  });
});

test('a torn append is no damage, wherever a crash has cut it', () => {
  const whole = encodeFrame('{"count":1}');
  const last = encodeFrame('{"count":2,"text":"ä"}');
  for (let cut = 0; cut < last.length; cut++) {
    for (const zeros of [0, 1, 50]) {
      const bytes = Buffer.concat([whole, last.subarray(0, cut), Buffer.alloc(zeros)]);
      expect(decodeFrames(bytes, (json) => json, 'log')).toEqual({ records: [{ count: 1 }], wholeBytes: whole.length });
    }
  }
});

describe('a directory of build 0.1.0', () => {
  test('is accepted once: afterwards a record without a checksum is damage', async () => {
    await upgraded('killed/A');
    const path = join(state, 'vms/web/record.json');
    await cp(join(KEPT, 'killed/A/vms/web/record.json'), path);
    await openState(state);
    await expect(readRecord(dirname(path))).rejects.toMatchObject({
      code: 'CORRUPT',
      message: expect.stringContaining('has no checksum') as string,
      remedy: expect.stringContaining('vmctl state check') as string,
    });
  });

  test('is upgraded again after a crash in the middle', async () => {
    await upgraded('killed/A');
    const before = await readRecord(join(state, 'vms/web'));
    await rm(join(state, 'format'));
    await cp(join(KEPT, 'killed/A/vms/store/record.json'), join(state, 'vms/store/record.json'));
    await openState(state);
    expect(await readRecord(join(state, 'vms/web'))).toEqual(before);
    expect(await readRecord(join(state, 'vms/store'))).toMatchObject({ state: 'paused' });
  });

  test('with a damaged log stays as it is', async () => {
    await cp(join(KEPT, 'killed/A'), state, { recursive: true });
    const path = join(state, 'owners.log');
    const text = await readFile(path, 'utf8');
    await writeFile(path, text.replace('"epoch":2', '"epoch":3'));
    await expect(openState(state)).rejects.toMatchObject({ code: 'CORRUPT' });
    expect(await readFormat(state)).toBeNull();
  });
});

test('a record of a newer version is refused as such, not as damaged', async () => {
  await upgraded('killed/A');
  const { seal, unseal } = await import('../../../src/durable/sealed.js');
  const path = join(state, 'vms/web/record.json');
  const record = unseal(await readFile(path, 'utf8'), path) as object;
  await writeFile(path, seal({ ...record, version: 2 }));
  await expect(readRecord(dirname(path))).rejects.toMatchObject({ code: 'UNSUPPORTED' });
  // A key that a newer build has added without a new version is kept.
  await writeFile(path, seal({ ...record, later: { of: 'a newer build' } }));
  const { writeRecord } = await import('../../../src/agent/vm/record.js');
  const read = await readRecord(dirname(path));
  if (read === null) throw new Error('no record');
  await writeRecord(dirname(path), read);
  expect(JSON.parse(await readFile(path, 'utf8'))).toMatchObject({ later: { of: 'a newer build' } });
});

test('what interrupted writes have left is removed at the start', async () => {
  await upgraded('killed/A');
  const left = ['sessions/x.target.json.new', 'vms/web/record.json.new', 'pool.json.new', 'format.new'];
  for (const name of left) await writeFile(join(state, name), 'a token');
  await openState(state);
  for (const name of left) await expect(readFile(join(state, name))).rejects.toMatchObject({ code: 'ENOENT' });
});
