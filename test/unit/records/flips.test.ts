/**
 * Every kind of record with every single bit changed: none of them is accepted. The records are those of build 0.1.0,
 * as this build has upgraded them.
 */
import { cp, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { TOKEN_RECORD } from '../../../src/access/tokens.js';
import { tieMemoryDirectory } from '../../../src/agent/memory/mark.js';
import { MARKER_RECORD } from '../../../src/agent/storage/markers.js';
import { readRecord } from '../../../src/agent/vm/record.js';
import { decodeOwnerChange } from '../../../src/cluster/file.js';
import { decodeFrames, encodeFrame } from '../../../src/durable/frames.js';
import { RecordFiles } from '../../../src/durable/record-files.js';
import {
  FORMAT_FILE,
  LOGS,
  openState,
  RECORD_KINDS,
  type RecordKindName,
  readFormat,
  recordPaths,
} from '../../../src/durable/state-format.js';
import { decodeJournalEntry } from '../../../src/schemas/journal.js';
import { keepKnownHosts } from '../../../src/state/known-hosts.js';
import { readRecordFile } from '../../../src/state/records.js';
import { filesUnder } from '../../tidy/tree.js';

const STATE_ID = '5'.repeat(32);
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

const LOG_DECODERS: Readonly<Record<(typeof LOGS)[number], (json: unknown) => unknown>> = {
  'owners.log': decodeOwnerChange,
  'jobs.log': decodeJournalEntry,
};

/** One record of each kind: the kept state directory it is in, or how it is made, and its path. */
const SAMPLES: Readonly<Record<Exclude<RecordKindName, (typeof LOGS)[number]>, readonly [kept: string, name: string]>> =
  {
    sessions: ['killed/A', 'sessions/29bba82225cffb320b40beb025334d3f.source.json'],
    forks: ['filling/A', 'forks/70a137ce2fd57e2e.json'],
    images: ['forked/A', 'images/240d278d455acd9b.json'],
    'storage-checks': ['killed/A', `storage-checks/${'c'.repeat(32)}.json`],
    tokens: ['killed/A', 'tokens/0123456789ab.json'],
    vms: ['killed/A', 'vms/half/record.json'],
    'pool.json': ['forked/A', 'pool.json'],
    'hosts.json': ['killed/A', 'hosts.json'],
    'memory-directory.json': ['killed/A', 'memory-directory.json'],
    format: ['killed/A', 'format'],
  };

/** Makes the records that no daemon of build 0.1.0 has kept, with the code that writes them. */
async function makeOthers(): Promise<void> {
  await keepKnownHosts(state, { name: 'A', peers: { B: 'https://192.0.2.2:7400' }, tls: '/etc/vmigrate/tls' });
  const proof = 'c'.repeat(32);
  await (await RecordFiles.open(state, 'storage-checks', MARKER_RECORD)).save({
    version: 1,
    proof,
    paths: ['/a/d.raw'],
  });
  await (await RecordFiles.open(state, 'tokens', TOKEN_RECORD)).save({
    ...{ version: 1, id: '0123456789ab', name: 'ci', role: 'operator', createdBy: 'local/0' },
    ...{ createdAt: '2030-01-01T00:00:00.000Z', expiresAt: '2031-01-01T00:00:00.000Z', hash: 'a'.repeat(64) },
  });
  const ramDir = join(dirname(state), 'ram');
  await mkdir(ramDir);
  await tieMemoryDirectory({ stateDir: state, stateId: STATE_ID, ramDir, bootId: 'this boot' });
}

/** Daemons write their records by these two alone, or by `RecordFiles`, whose folders have a type. */
test('no file writes a record of a kind that is not in the list', async () => {
  const writers = filesUnder('src').filter(({ text }) => /\bwriteDurably\b|FileLogStore\.open/.test(text));
  expect(writers.map(({ path }) => path).sort()).toEqual([
    'src/agent/fork/pool.ts',
    'src/agent/memory/mark.ts',
    'src/agent/vm/record.ts',
    'src/cluster/file.ts',
    'src/cluster/mirror.ts',
    'src/durable/durable-file.ts',
    'src/durable/record-files.ts',
    'src/durable/state-format.ts',
    'src/jobs/journal.ts',
    'src/state/known-hosts.ts',
    'src/state/repair.ts',
    'src/tls/authority.ts',
  ]);
});

describe('a record with any bit changed is CORRUPT', () => {
  test.each(RECORD_KINDS.filter((kind) => !Object.hasOwn(LOG_DECODERS, kind)))(
    '%s',
    { timeout: FLIPS_MS },
    async (kind) => {
      const [kept, name] = SAMPLES[kind as keyof typeof SAMPLES];
      await upgraded(kept);
      await makeOthers();
      const path = join(state, name);
      const bytes = await readFile(path);
      await readRecordFile(state, name);
      // What is checked offline is what the daemon finds when it looks for records.
      expect([...(await recordPaths(state)), join(state, FORMAT_FILE)]).toContain(path);
      await flips(bytes, 37, async (flipped) => {
        await writeFile(path, flipped);
        await expect(readRecordFile(state, name)).rejects.toMatchObject({ code: 'CORRUPT' });
      });
    },
  );

  test.each(LOGS)('%s', { timeout: FLIPS_MS }, async (log) => {
    await upgraded('killed/A');
    const decode = LOG_DECODERS[log];
    const bytes = await readFile(join(state, log));
    const { records, wholeBytes } = decodeFrames(bytes, decode, log);
    expect(wholeBytes).toBe(bytes.length);
    expect(records.length).toBeGreaterThan(5);
    await flips(bytes, 499, async (flipped) => {
      expect(() => decodeFrames(flipped, decode, log)).toThrow(expect.objectContaining({ code: 'CORRUPT' }));
    });
  });

  test('the mark of the memory directory', { timeout: FLIPS_MS }, async () => {
    await upgraded('killed/A');
    await makeOthers();
    const path = join(dirname(state), 'ram', '.owner');
    const bytes = await readFile(path);
    const places = { stateDir: state, stateId: STATE_ID, ramDir: dirname(path), bootId: 'this boot' };
    await tieMemoryDirectory(places);
    await flips(bytes, 37, async (flipped) => {
      await writeFile(path, flipped);
      await expect(tieMemoryDirectory(places)).rejects.toMatchObject({ code: 'CORRUPT' });
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
