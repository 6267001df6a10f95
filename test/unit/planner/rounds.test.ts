import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { nextRound, nextRoundMs, type Round } from '../../../src/planner/migration/rounds.js';

const MIB = 2 ** 20;
const IDLE_MS = 5;

const USED_MIB = 1000;

const round = (fetchedMib: number, takenBackMib: number, isAll = false): Round => ({
  ...{ fetchedBytes: fetchedMib * MIB, takenBackBytes: takenBackMib * MIB, isAll, idleMs: IDLE_MS },
  ...{ writtenBytes: takenBackMib * MIB, writtenAgainBytes: takenBackMib * MIB },
});

/** A round that has fetched 100 MiB of new pages. */
const sample = (writtenMib: number, againMib: number): Round => ({
  ...round(100, 0),
  ...{ writtenBytes: writtenMib * MIB, writtenAgainBytes: againMib * MIB },
});

/** A guest that writes to random places of its working set, and a link. Both keep their rate. */
interface Model {
  readonly memoryBytes: number;
  readonly workingSetBytes: number;
  readonly dirtyBytesPerS: number;
  readonly linkBytesPerS: number;
}

/**
 * Returns how much was fetched, how often, and what was missing at the switchover. The working set is spread evenly.
 * What was taken back is fetched when everything else has come once.
 */
function run({ memoryBytes, workingSetBytes, dirtyBytesPerS, linkBytesPerS }: Model) {
  const hotBytes = Math.min(workingSetBytes, memoryBytes);
  const rounds: Round[] = [];
  let [neverBytes, againBytes] = [memoryBytes, 0];
  for (;;) {
    const leftBefore = neverBytes + againBytes;
    const seconds = Math.min(nextRoundMs(rounds) / 1000, leftBefore / linkBytesPerS);
    const fetchedBytes = Math.min(leftBefore, seconds * linkBytesPerS);
    const firstBytes = Math.min(neverBytes, fetchedBytes);
    neverBytes -= firstBytes;
    againBytes = Math.max(0, againBytes - (fetchedBytes - firstBytes));
    const hotHereBytes = Math.max(0, (hotBytes * (memoryBytes - neverBytes)) / memoryBytes - againBytes);
    const isAll = neverBytes + againBytes < 1;
    const takenBackBytes = hotHereBytes * (1 - Math.exp((-dirtyBytesPerS * seconds) / hotBytes));
    againBytes += takenBackBytes;
    const writtenBytes = hotBytes * (1 - Math.exp((-dirtyBytesPerS * seconds) / hotBytes));
    const writtenAgainBytes = (writtenBytes * (rounds.at(-1)?.writtenBytes ?? 0)) / hotBytes;
    rounds.push({ fetchedBytes, takenBackBytes, writtenBytes, writtenAgainBytes, isAll, idleMs: IDLE_MS });
    if (nextRound(rounds, memoryBytes) === 'push') continue;
    const sum = rounds.reduce((bytes, one) => bytes + one.fetchedBytes, 0);
    return { rounds, leftBytes: neverBytes + againBytes, fetchedBytes: sum };
  }
}

describe('a further round', () => {
  test.each([
    ['the first', [], 'push'],
    ['an idle guest', [round(1000, 0, true)], 'switch'],
    ['little is left', [round(1000, 1, true)], 'switch'],
    ['little was written, and much is missing', [round(100, 1)], 'push'],
    ['nothing has come yet, and nothing was written', [round(0, 0)], 'push'],
    ['half of what has come is wrong', [round(100, 50)], 'push'],
    ['more than half is', [round(100, 51)], 'switch'],
    ['one round without luck', [round(100, 10), round(100, 85)], 'push'],
    ['two of them', [round(100, 60), round(100, 60)], 'switch'],
    ['all is here, and some of it wrong', [round(100, 20), round(100, 30, true)], 'push'],
    ['it shrinks by less than half', [round(100, 40, true), round(40, 33, true)], 'switch'],
    ['everything is wrong and nothing comes', [round(100, 90, true), round(0, 50)], 'switch'],
    ['one sample of a guest that may be hot', [sample(40, 0)], 'push'],
    ['40 MiB, of 400 MiB', [sample(40, 0), sample(40, 4)], 'switch'],
    ['40 MiB, of 200 MiB', [sample(40, 0), sample(40, 8)], 'push'],
    ['30 MiB, of 400 MiB', [sample(30, 0), sample(30, 2.25)], 'push'],
    ['never the same', [sample(40, 0), sample(40, 0)], 'switch'],
  ] as const)('%s', (_, given, decision) => {
    expect(nextRound(given, USED_MIB * MIB)).toBe(decision);
  });

  test('is longer where it takes long to find out what was written', () => {
    expect(nextRoundMs([])).toBe(50);
    expect(nextRoundMs([{ ...round(1, 0), idleMs: 5 }])).toBe(50);
    expect(nextRoundMs([{ ...round(1, 0), idleMs: 60 }])).toBe(600);
    expect(nextRoundMs([{ ...round(1, 0), idleMs: 2_000 }])).toBe(5_000);
  });

  const model = fc.record({
    memoryBytes: fc.integer({ min: 1, max: 2 ** 36 }),
    workingSetBytes: fc.integer({ min: 1, max: 2 ** 36 }),
    dirtyBytesPerS: fc.integer({ min: 0, max: 2 ** 36 }),
    linkBytesPerS: fc.integer({ min: 2 ** 24, max: 2 ** 36 }),
  });

  test('comes to an end, and at least half of what was fetched is of use', () => {
    fc.assert(
      fc.property(model, (given) => {
        const { rounds, leftBytes, fetchedBytes } = run(given);
        const isOfUse = given.memoryBytes - leftBytes;
        const lastTwo = rounds.slice(-2).reduce((sum, one) => sum + one.fetchedBytes, 0);
        expect(isOfUse).toBeGreaterThanOrEqual(0.5 * (fetchedBytes - lastTwo) - 1);
      }),
    );
  });

  test('is hardly made for a guest that writes much faster than the link carries', () => {
    const { fetchedBytes, leftBytes } = run({
      ...{ memoryBytes: 4096 * MIB, workingSetBytes: 4096 * MIB },
      ...{ dirtyBytesPerS: 1000 * MIB, linkBytesPerS: 100 * MIB },
    });
    expect(fetchedBytes).toBeLessThan(0.01 * 4096 * MIB);
    expect(leftBytes).toBeGreaterThan(0.99 * 4096 * MIB);
  });

  test('brings the memory that a guest with a small working set does not write to', () => {
    const { leftBytes, fetchedBytes } = run({
      ...{ memoryBytes: 65_536 * MIB, workingSetBytes: 512 * MIB },
      ...{ dirtyBytesPerS: 1000 * MIB, linkBytesPerS: 1000 * MIB },
    });
    expect(leftBytes).toBeLessThanOrEqual(512 * MIB);
    expect(fetchedBytes).toBeLessThan(1.1 * 65_536 * MIB);
  });

  test('leaves next to nothing of a guest that writes at a tenth of the rate of the link', () => {
    const { leftBytes, fetchedBytes } = run({
      ...{ memoryBytes: 4096 * MIB, workingSetBytes: 1024 * MIB },
      ...{ dirtyBytesPerS: 10 * MIB, linkBytesPerS: 100 * MIB },
    });
    expect(leftBytes).toBeLessThanOrEqual(MIB);
    expect(fetchedBytes).toBeLessThan(1.2 * 4096 * MIB);
  });
});
