import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { type MarkPlaces, memoryDirectoryInUse, tieMemoryDirectory } from '../../../../src/agent/memory/mark.js';
import { seal } from '../../../../src/durable/sealed.js';

const BOOT = 'boot-1';
let base: string;
let stateDir: string;
let ramDir: string;

beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), 'vmg-mark-'));
  [stateDir, ramDir] = [join(base, 'state'), join(base, 'ram')];
  await mkdir(stateDir);
  await mkdir(ramDir);
});
afterEach(async () => {
  await rm(base, { recursive: true, force: true });
});

const STATE_ID = '1'.repeat(32);

const tie = (changes: Partial<MarkPlaces> = {}) =>
  tieMemoryDirectory({ stateDir, stateId: STATE_ID, ramDir, bootId: BOOT, ...changes });

/** A VM whose record cannot be read counts as one that has memory. */
async function addVm(name: string): Promise<void> {
  await mkdir(join(stateDir, 'vms', name), { recursive: true });
  await writeFile(join(stateDir, 'vms', name, 'record.json'), 'damaged');
}

test('the directories are tied once, and found tied again', async () => {
  expect(await tie()).toBe(STATE_ID);
  const mark = await readFile(join(ramDir, '.owner'), 'utf8');
  expect(JSON.parse(mark)).toMatchObject({ id: STATE_ID });
  expect(await tie()).toBe(STATE_ID);
  expect(await readFile(join(ramDir, '.owner'), 'utf8')).toBe(mark);
  expect(await memoryDirectoryInUse({ stateDir, bootId: BOOT })).toBe(ramDir);
  expect(await memoryDirectoryInUse({ stateDir, bootId: 'boot-2' })).toBeNull();
});

test('a daemon with another state directory is refused, and nothing is changed', async () => {
  await tie();
  const mark = await readFile(join(ramDir, '.owner'), 'utf8');
  const other = join(base, 'other');
  await mkdir(other);
  const remedy = expect.stringContaining(`--state ${stateDir}`);
  await expect(tie({ stateDir: other, stateId: '2'.repeat(32) })).rejects.toMatchObject({ code: 'CONFLICT', remedy });
  expect(await readFile(join(ramDir, '.owner'), 'utf8')).toBe(mark);
});

test('an empty directory in place of the memory of VMs is refused during the same boot alone', async () => {
  await tie();
  await addVm('v1');
  const hidden = join(base, 'hidden');
  await mkdir(hidden);
  const message = expect.stringContaining(`the memory of v1 was in ${ramDir}`);
  await expect(tie({ ramDir: hidden })).rejects.toMatchObject({ code: 'CONFLICT', message });
  await rm(join(ramDir, '.owner'));
  await expect(tie()).rejects.toMatchObject({ code: 'CONFLICT', message });
  await tie({ bootId: 'boot-2' });
});

test('a memory directory of build 0.1.0 is accepted if all that lies there is known', async () => {
  await addVm('v1');
  await mkdir(join(ramDir, 'v1'));
  await mkdir(join(ramDir, '.images', 'i1'), { recursive: true });
  await expect(tie()).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('.images/i1') });
  await mkdir(join(stateDir, 'images'));
  await writeFile(join(stateDir, 'images', 'i1.json'), '{}');
  await tie();
});

test('a mark with an id of its own, as earlier builds make, is accepted, and kept as long as the memory', async () => {
  const id = '3'.repeat(32);
  await tie({ stateId: id });
  await addVm('v1');
  await mkdir(join(ramDir, 'v1'));
  expect(await tie()).toBe(id);
  await rm(ramDir, { recursive: true });
  await mkdir(ramDir);
  expect(await tie({ bootId: 'boot-2' })).toBe(STATE_ID);
});

test.each([
  ['from another boot', JSON.stringify({ version: 1, id: STATE_ID, bootId: 'boot-0', ramDir: '/x', isMade: true })],
  ['from before the memory', null],
])('a state directory that came back from a copy has its memory again if it knows all of it: %s', async (_, side) => {
  await tie();
  await mkdir(join(ramDir, '.images', 'i1'), { recursive: true });
  const path = join(stateDir, 'memory-directory.json');
  await (side === null ? rm(path) : writeFile(path, side));
  // An image that the state does not know would be removed as a stray.
  await expect(tie()).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('.images/i1') });
  await mkdir(join(stateDir, 'images'));
  await writeFile(join(stateDir, 'images', 'i1.json'), '{}');
  expect(await tie()).toBe(STATE_ID);
});

test('a start that a crash cut short between the two sides is taken up', async () => {
  await tie();
  const path = join(stateDir, 'memory-directory.json');
  const made = JSON.parse(await readFile(path, 'utf8')) as object;
  await writeFile(path, seal({ ...made, isMade: false }));
  await tie();
  await addVm('v1');
  await mkdir(join(ramDir, 'v1'));
  await writeFile(path, seal({ ...made, isMade: false }));
  await rm(join(ramDir, '.owner'));
  await tie();
  expect(JSON.parse(await readFile(path, 'utf8'))).toMatchObject({ isMade: true });
});

test.each([['state'], ['ram']])('a damaged side is an error: %s', async (side) => {
  await tie();
  const path = side === 'state' ? join(stateDir, 'memory-directory.json') : join(ramDir, '.owner');
  await writeFile(path, '{"version":1');
  await expect(tie()).rejects.toMatchObject({ code: 'CORRUPT', remedy: expect.stringContaining(path) });
});
