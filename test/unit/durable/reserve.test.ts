import { mkdtemp, readdir, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { isDiskFull, RESERVE_BYTES, Reserve, withReserve } from '../../../src/durable/reserve.js';

let directory: string;
let reserve: Reserve;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-reserve-'));
  reserve = Reserve.of(directory);
});
afterEach(async () => {
  reserve.close();
  await rm(directory, { recursive: true });
});

const full = Object.assign(new Error('no space left on device'), { code: 'ENOSPC' });

test('the reserve has its size, whatever was there, and is given up once', async () => {
  await writeFile(join(directory, 'reserve'), 'half a one');
  expect(await reserve.restore()).toBe(true);
  const { size, blocks } = await stat(join(directory, 'reserve'));
  expect(size).toBe(RESERVE_BYTES);
  expect(blocks * 512).toBeGreaterThanOrEqual(RESERVE_BYTES);
  expect(await reserve.giveUp()).toBe(true);
  expect(await reserve.giveUp()).toBe(false);
  expect(await readdir(directory)).toEqual([]);
  await expect(reserve.checkRoom()).resolves.toBeUndefined();
  expect(await readdir(directory)).toEqual(['reserve']);
});

test('a write that finds the disk full is repeated with the room of the reserve, once', async () => {
  await reserve.restore();
  const path = join(directory, 'vms', 'web', 'record.json');
  let tries = 0;
  const write = (failures: number) => async () => {
    tries++;
    if (tries <= failures) throw full;
    return 'written';
  };
  expect(await withReserve(path, write(1))).toBe('written');
  expect(tries).toBe(2);
  tries = 0;
  await expect(withReserve(path, write(1))).rejects.toBe(full);
  expect(tries).toBe(1);
});

test('other failures, and files that are elsewhere, leave the reserve alone', async () => {
  await reserve.restore();
  const refused = Object.assign(new Error('permission denied'), { code: 'EACCES' });
  await expect(withReserve(join(directory, 'x'), () => Promise.reject(refused))).rejects.toBe(refused);
  await expect(withReserve(`${directory}-other/x`, () => Promise.reject(full))).rejects.toBe(full);
  expect(await readdir(directory)).toEqual(['reserve']);
  expect([full, refused, { code: 'ENOSPC' }].map(isDiskFull)).toEqual([true, false, false]);
});
