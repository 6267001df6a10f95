/**
 * Records that daemons of build 0.1.0 have written, opened by the stores of this build. Each record is accepted once,
 * gets a checksum, and keeps its meaning and all its members when it is written again.
 */
import { cp, mkdir, mkdtemp, open, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Pool } from '../../../src/agent/fork/pool.js';
import { openForkStore } from '../../../src/agent/fork/record.js';
import type { ImageRecord } from '../../../src/agent/image/record.js';
import { ImageStore } from '../../../src/agent/image/store.js';
import { SessionStore } from '../../../src/agent/migration/session-store.js';
import { MemoryRoom } from '../../../src/agent/vm/memory-room.js';
import { imageFiles } from '../../../src/agent/vm/ram-files.js';
import { RamPlace } from '../../../src/agent/vm/ram-place.js';
import { readRecord, writeRecord } from '../../../src/agent/vm/record.js';
import { FileRegistry } from '../../../src/cluster/file.js';
import { FileLogStore } from '../../../src/durable/log-store.js';
import { RecordLog } from '../../../src/durable/record-log.js';
import { openState } from '../../../src/durable/state-format.js';
import type { OwnerRecord } from '../../../src/engine/ports/registry.js';
import { readHistories } from '../../../src/jobs/history.js';
import { newJob } from '../../../src/jobs/job.js';
import { FileJournal } from '../../../src/jobs/journal.js';
import { decodeJournalEntry } from '../../../src/schemas/journal.js';
import { imagesKept, jobsKept, ownersKept, vmsKept } from './kept.js';

const KEPT = fileURLToPath(new URL('../../fixtures/records-0.1.0', import.meta.url));
/** The kept state directories, by moment and host. */
const STATES = ['filling/A', 'forked/A', 'killed/A', 'killed/B', 'uncommitted/A', 'undone/A'];

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-records-'));
});
afterEach(() => rm(directory, { recursive: true, force: true }));

/** Returns a writable copy, as the first daemon of this build finds it. */
async function copyOf(state: string): Promise<string> {
  const copy = join(directory, 'state');
  await cp(join(KEPT, state), copy, { recursive: true });
  await openState(copy);
  return copy;
}

/** Returns the records of a log, of either build. */
async function recordsOf(path: string): Promise<unknown[]> {
  const lines = (await readFile(path, 'utf8')).split('\n').filter((line) => line !== '');
  return lines.map((line) => JSON.parse(line.slice(line.indexOf('{'))) as unknown);
}

async function namesIn(path: string): Promise<string[]> {
  return (await readdir(path).catch((): string[] => [])).sort();
}

/** Returns the JSON of a file without its checksum. */
async function jsonOf(path: string): Promise<unknown> {
  const json = JSON.parse(await readFile(path, 'utf8')) as { seal?: string };
  if (Array.isArray(json)) return json;
  const { seal: _, ...rest } = json;
  return rest;
}

/** Returns the JSON of all files in a folder of records. */
async function jsonIn(folder: string): Promise<Record<string, unknown>> {
  const names = await namesIn(folder);
  return Object.fromEntries(await Promise.all(names.map(async (name) => [name, await jsonOf(join(folder, name))])));
}

const byName = <T>(records: readonly T[], nameOf: (record: T) => string): T[] =>
  [...records].sort((a, b) => (nameOf(a) < nameOf(b) ? -1 : 1));

test('nothing is kept that no test opens', async () => {
  const states = await Promise.all(
    (await namesIn(KEPT))
      .filter((name) => !name.includes('.'))
      .map(async (moment) => (await namesIn(join(KEPT, moment))).map((host) => `${moment}/${host}`)),
  );
  expect(states.flat()).toEqual(STATES);
});

describe.each(STATES)('%s', (state) => {
  test('owners', async () => {
    const copy = await copyOf(state);
    const registry = await FileRegistry.open(copy);
    const text = await readFile(join(copy, 'owners.log'), 'utf8');
    const names = new Set([...text.matchAll(/"vm":"([^"]+)"/g)].map(([, vm = '']) => vm));
    const owners: Record<string, string> = {};
    for (const vm of names) {
      const record = await registry.owner(vm);
      if (record !== null) owners[vm] = `${record.owner} ${record.epoch}`;
    }
    await registry.close();
    expect(owners).toEqual(ownersKept[state]);
    const kept = await recordsOf(join(KEPT, state, 'owners.log'));
    expect(await recordsOf(join(copy, 'owners.log'))).toEqual(kept);
    expect(await writtenAgain(kept)).toEqual(kept);
  });

  test('jobs', async () => {
    const copy = await copyOf(state);
    const { journal, entries } = await FileJournal.open(join(copy, 'jobs.log'));
    await journal.close();
    const histories = [...readHistories(entries).values()];
    const views = histories.map((history) => newJob(history, null).view);
    expect(JSON.parse(JSON.stringify(views))).toEqual(await jsonOf(join(copy, 'jobs-as-read.json')));
    expect(
      Object.fromEntries(
        histories.map(({ record, begun, ended, leftovers }, index) => [
          record.job,
          [views[index]?.kind, views[index]?.vm, views[index]?.state, begun.size, ended.size, ...leftovers],
        ]),
      ),
    ).toEqual(jobsKept[state]);
  });

  test('the journal, line by line', async () => {
    const copy = await copyOf(state);
    const { log, records } = await RecordLog.open(await FileLogStore.open(join(copy, 'jobs.log')), decodeJournalEntry);
    await log.close();
    const again = await RecordLog.open(await FileLogStore.open(join(directory, 'again.log')), decodeJournalEntry);
    for (const record of records) await again.log.append(record);
    await again.log.close();
    expect(await recordsOf(join(directory, 'again.log'))).toEqual(await recordsOf(join(KEPT, state, 'jobs.log')));
  });

  test('VMs', async () => {
    const copy = await copyOf(state);
    const found: Record<string, unknown[]> = {};
    for (const vm of await namesIn(join(copy, 'vms'))) {
      const folder = join(copy, 'vms', vm);
      const before = await jsonOf(join(KEPT, state, 'vms', vm, 'record.json'));
      const record = await readRecord(folder);
      if (record === null) throw new Error(`${vm} has no record`);
      found[vm] = [record.state, record.epoch, record.spec.memory.sizeBytes, record.regions.length, record.image];
      expect(record.spec.name).toBe(vm);
      expect(record.regions.every(({ lengthBytes }) => lengthBytes > 0n)).toBe(true);
      await rm(join(folder, 'record.json'));
      await writeRecord(folder, record);
      expect(await jsonOf(join(folder, 'record.json'))).toEqual(before);
    }
    expect(found).toEqual(vmsKept[state]);
  });

  test('sessions', async () => {
    const copy = await copyOf(state);
    const folder = join(copy, 'sessions');
    const before = await jsonIn(join(KEPT, state, 'sessions'));
    const store = await SessionStore.open(copy);
    const { records, corrupt } = await store.load();
    expect(corrupt).toEqual([]);
    expect(byName(records, ({ session, role }) => `${session}.${role}.json`)).toEqual(Object.values(before));
    await rm(folder, { recursive: true });
    for (const record of records) await (await SessionStore.open(copy)).save(record);
    expect(await jsonIn(folder)).toEqual(before);
  });

  test('forks', async () => {
    const copy = await copyOf(state);
    const folder = join(copy, 'forks');
    const before = await jsonIn(join(KEPT, state, 'forks'));
    const { records, corrupt } = await (await openForkStore(copy)).load();
    expect(corrupt).toEqual([]);
    expect(byName(records, ({ request }) => `${request.fork}.json`)).toEqual(Object.values(before));
    await rm(folder, { recursive: true });
    const store = await openForkStore(copy);
    for (const record of records) await store.save(record);
    expect(await jsonIn(folder)).toEqual(before);
  });

  test('images', async () => {
    const copy = await copyOf(state);
    const folder = join(copy, 'images');
    const before = await jsonIn(join(KEPT, state, 'images'));
    const { store, errors } = await openImages(copy);
    expect(errors).toEqual([]);
    expect(Object.fromEntries(store.all().map((image) => [image.id, [image.state, image.spec.name]]))).toEqual(
      imagesKept[state] ?? {},
    );
    await rm(folder, { recursive: true, force: true });
    await mkdir(folder);
    for (const { id } of store.all()) await store.update(id, {});
    expect(await jsonIn(folder)).toEqual(before);
  });
});

test('the waiting sets that were wanted are wanted still', async () => {
  const copy = await copyOf('forked/A');
  const before = await readFile(join(copy, 'pool.json'), 'utf8');
  const errors: unknown[] = [];
  const context = {
    vms: { on: () => undefined, off: () => undefined, all: () => [], has: () => false },
    log: { info: () => undefined, warn: () => undefined, error: (...words: unknown[]) => errors.push(words) },
  };
  const pool = new Pool(context as never, {
    stateDir: copy,
    config: { processesMax: 8, memoryAvailableBytesMin: 0, memoryStallPercentMax: 100 },
    randomId: () => '0'.repeat(16),
    readMemory: async () => ({ availableBytes: 2 ** 40, stallPercent: 0 }),
  });
  await pool.start();
  expect(errors).toEqual([]);
  // The drain is for another VM, so the wanted sets of this VM are written again.
  await rm(join(copy, 'pool.json'));
  await pool.drain('another');
  await pool.close();
  expect(await readFile(join(copy, 'pool.json'), 'utf8')).toBe(before);
  expect(JSON.parse(before)).toMatchObject({
    version: 1,
    wanted: [{ vm: 'shop', cloneCount: 2, memory: 'cow', network: 'fresh' }],
  });
});

/** Makes the same changes again, and returns them as this build has written them. */
async function writtenAgain(changes: readonly unknown[]): Promise<unknown[]> {
  const path = join(directory, 'owners.log');
  const registry = await FileRegistry.on(await FileLogStore.open(path));
  for (const change of changes) {
    const { type, record, vm, epoch } = change as { type: string; record?: OwnerRecord; vm?: string; epoch?: number };
    if (type === 'swap' && record !== undefined)
      await registry.swapOwner(record.vm, (await registry.owner(record.vm))?.epoch ?? null, record);
    else await registry.removeOwner(vm ?? '', epoch ?? 0);
  }
  await registry.close();
  return recordsOf(path);
}

/** Opens the store on empty memory files. Without the files it would consider their images lost. */
async function openImages(stateDir: string): Promise<{ store: ImageStore; errors: unknown[] }> {
  const place = new RamPlace({ host: 'A', ramDir: join(directory, 'ram') });
  for (const image of Object.values(await jsonIn(join(stateDir, 'images')))) {
    const { id, spec } = image as Pick<ImageRecord, 'id' | 'spec'>;
    for (const { path, lengthBytes } of await imageFiles(place, spec.memory, id)) {
      await mkdir(dirname(path), { recursive: true });
      const file = await open(path, 'w');
      await file.truncate(Number(lengthBytes));
      await file.close();
    }
  }
  await mkdir(place.ramDir, { recursive: true });
  const errors: unknown[] = [];
  const note = (...words: unknown[]) => errors.push(words);
  const store = await ImageStore.open({
    ...{ host: 'A', stateDir, budgetBytes: null, log: { info: note, warn: note, error: note } },
    vms: { place, room: new MemoryRoom(place), all: () => [] } as never,
    native: {} as never,
  });
  await place.close();
  return { store, errors };
}
