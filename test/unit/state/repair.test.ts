/** `vmctl state check` and `repair`, run as the program on state directories of an earlier daemon. */
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { readRecord } from '../../../src/agent/vm/record.js';
import { FileRegistry } from '../../../src/cluster/file.js';
import { openStateDirectory } from '../../../src/durable/state-directory.js';
import { loadNativeBinding } from '../../../src/native/binding.js';
import { readState } from '../../../src/state/records.js';
import { type RepairReport, repairState } from '../../../src/state/repair.js';

const KEPT = fileURLToPath(new URL('../../fixtures/records-0.1.0/killed/A', import.meta.url));

let directory: string;
let state: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-state-'));
  state = join(directory, 'state');
  await cp(KEPT, state, { recursive: true });
  await (await openStateDirectory(state, (descriptor) => loadNativeBinding().lockFile(descriptor))).giveBack();
});
afterEach(() => rm(directory, { recursive: true, force: true }));

async function damaged(): Promise<string[]> {
  const { findings } = await readState(state);
  return findings.filter(({ state: how }) => how === 'damaged').map(({ record }) => record);
}

const repair = (owners: Record<string, string> = {}, accepted: readonly string[] = []): Promise<RepairReport> =>
  repairState(state, { owners: new Map(Object.entries(owners)), accepted, at: '2026-01-01T00:00:00.000Z' });

async function flip(name: string, at: (bytes: Buffer) => number): Promise<void> {
  const path = join(state, name);
  const bytes = await readFile(path);
  const index = at(bytes);
  bytes[index] = bytes[index]! ^ 0x04;
  await writeFile(path, bytes);
}

async function ownersNow(): Promise<Record<string, string>> {
  const registry = await FileRegistry.open(state);
  const owners: Record<string, string> = {};
  for (const vm of ['web', 'store', 'db', 'legacy', 'ended', 'late', 'half']) {
    const owner = await registry.owner(vm);
    if (owner !== null) owners[vm] = `${owner.owner} ${owner.epoch}`;
  }
  await registry.close();
  return owners;
}

const aside = async (folder = ''): Promise<string[]> =>
  (await readdir(join(state, folder))).filter((name) => name.includes('.damaged-'));

test('an intact directory has nothing to repair', async () => {
  expect(await damaged()).toEqual([]);
  expect(await repair()).toEqual({ done: [], left: [] });
  expect(await aside()).toEqual([]);
});

describe('a damaged line of owners.log', () => {
  test('keeps the daemon from starting, and leaves the VMs without an owner that it may be about', async () => {
    const whole = await ownersNow();
    await flip('owners.log', (bytes) => bytes.length - 1);
    await expect(FileRegistry.open(state)).rejects.toMatchObject({ code: 'CORRUPT' });
    expect(await damaged()).toHaveLength(1);
    const { left } = await repair();
    const owners = await ownersNow();
    for (const [vm, owner] of Object.entries(owners)) expect(owner).toBe(whole[vm]);
    expect(left.join('\n')).toContain('vmctl state repair --owner');
    expect(await aside()).toEqual(['owners.log.damaged-2026-01-01T00-00-00-000Z']);
    expect(await damaged()).toEqual([]);
  });

  test('is replaced by what the user says, and by nothing else', async () => {
    await flip('owners.log', (bytes) => bytes.length - 1);
    const { left } = await repair();
    const doubtful = left.map((line) => line.split(':')[0] ?? '');
    expect(doubtful).toContain('web');
    expect((await ownersNow()).web).toBeUndefined();
    await repair({ web: 'A' });
    expect((await ownersNow()).web).toBe('A 1');
  });

  test('does not put in doubt a VM with a later line', async () => {
    const registry = await FileRegistry.open(state);
    await registry.announceMove('web', 1, 'ab'.repeat(16));
    await registry.close();
    await flip('owners.log', () => 40);
    const { left } = await repair();
    expect(left.some((line) => line.startsWith('web:'))).toBe(false);
    expect((await ownersNow()).web).toBe('A 1');
  });
});

test('a torn append is no damage, and costs no record', async () => {
  const path = join(state, 'owners.log');
  const bytes = await readFile(path);
  await writeFile(path, bytes.subarray(0, bytes.length - 5));
  const { findings } = await readState(state);
  expect(findings.filter(({ state: how }) => how !== 'intact').map(({ state: how }) => how)).toEqual(['torn']);
});

test('an owner record that is missing for a VM is not guessed', async () => {
  await writeFile(join(state, 'owners.log'), '');
  const { left } = await repair();
  expect(left.map((line) => line.split(':')[0])).toEqual(expect.arrayContaining(['web', 'store', 'late']));
  expect(await ownersNow()).toEqual({});
});

describe('a damaged VM record', () => {
  const record = 'vms/web/record.json';

  test('is left for a person, who may accept it', async () => {
    await flip(record, (bytes) => bytes.indexOf('"epoch": 1') + '"epoch": '.length);
    expect(await damaged()).toEqual([record]);
    const { done, left } = await repair();
    expect(done).toEqual([]);
    expect(left).toEqual([expect.stringContaining(`--accept ${record}`)]);
    expect((await repair({}, [record])).done).toEqual([`${record}: accepted as it is`]);
    expect(await readRecord(join(state, 'vms/web'))).toMatchObject({ epoch: 5 });
    expect(await aside('vms/web')).toHaveLength(1);
  });

  test('that is no record any more is not accepted', async () => {
    await writeFile(join(state, record), 'nonsense');
    await expect(repair({}, [record])).rejects.toMatchObject({ code: 'USAGE' });
    await expect(repair({}, ['../../etc/passwd'])).rejects.toMatchObject({ code: 'USAGE' });
  });
});

test('a damaged session record and a damaged mark are set aside', async () => {
  const [session = ''] = (await readdir(join(state, 'sessions'))).filter((name) => name.endsWith('.json'));
  await flip(`sessions/${session}`, () => 20);
  await flip('format', () => 20);
  expect((await damaged()).sort()).toEqual(['format', `sessions/${session}`]);
  await repair();
  expect(await damaged()).toEqual([]);
  expect(await aside('sessions')).toHaveLength(1);
  // The mark is made anew: records without a checksum stay refused.
  const { id } = await openStateDirectory(state, (descriptor) => loadNativeBinding().lockFile(descriptor)).then(
    async (open) => {
      await open.giveBack();
      return open;
    },
  );
  expect(id).toMatch(/^[0-9a-f]{32}$/);
});
