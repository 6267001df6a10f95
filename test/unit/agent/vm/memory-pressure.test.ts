import { readFile } from 'node:fs/promises';
import { expect, test } from 'vitest';
import { memoryState, parseStallPercent, readMemory } from '../../../../src/agent/vm/memory-pressure.js';

const bounds = { memoryAvailableBytesMin: 1000, memoryStallPercentMax: 20 };
const PRESSURE =
  'some avg10=12.34 avg60=5.00 avg300=1.00 total=123456\nfull avg10=99.00 avg60=2.00 avg300=0.50 total=65432\n';

test.each([
  ['nobody waits', 1000, 0, 'ample'],
  ['a kernel that does not say', 1000, null, 'ample'],
  ['some wait', 1000, 10, 'ample'],
  ['more wait', 1000, 10.01, 'tight'],
  ['up to the bound', 1000, 20, 'tight'],
  ['beyond it', 1_000_000, 20.01, 'short'],
  ['little left', 999, 0, 'short'],
  ['little left, and a kernel that does not say', 999, null, 'short'],
])('%s', (_, availableBytes, stallPercent, expected) => {
  expect(memoryState({ availableBytes, stallPercent }, bounds)).toBe(expected);
});

test.each([
  [PRESSURE, 12.34],
  ['some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n', 0],
  ['some avg10=100.00 avg60=0.00 avg300=0.00 total=0\n', 100],
  ['full avg10=99.00 avg60=2.00 avg300=0.50 total=65432\n', null],
  ['some avg10=-1 avg60=0.00\n', null],
  ['', null],
])('%j says %s', (text, expected) => {
  expect(parseStallPercent(text)).toBe(expected);
});

test('this kernel is understood', async () => {
  const hasPressure = await readFile('/proc/pressure/memory').then(
    () => true,
    () => false,
  );
  const { availableBytes, stallPercent } = await readMemory();
  expect(availableBytes).toBeGreaterThan(0);
  expect(stallPercent !== null).toBe(hasPressure);
});
