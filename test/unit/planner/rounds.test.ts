import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { nextRound } from '../../../src/planner/migration/rounds.js';

const MIB = 2 ** 20;

/** A guest that writes over and over to its working set, and a link. The guest writes while a round is fetched. */
interface Model {
  readonly memoryBytes: number;
  readonly workingSetBytes: number;
  readonly dirtyBytesPerS: number;
  readonly linkBytesPerS: number;
}

/** Returns what each pass has fetched, and what was left at the end. */
function run({ memoryBytes, workingSetBytes, dirtyBytesPerS, linkBytesPerS }: Model) {
  const passes = [memoryBytes];
  const dirtyBytes: number[] = [];
  for (;;) {
    const seconds = passes.at(-1)! / linkBytesPerS;
    const leftBytes = Math.min(workingSetBytes, dirtyBytesPerS * seconds);
    dirtyBytes.push(leftBytes);
    const trace = { passes: passes.map((bytes) => ({ bytes, ms: (1000 * bytes) / linkBytesPerS })), dirtyBytes };
    if (nextRound(trace) === 'switch') return { passes, leftBytes };
    passes.push(leftBytes);
  }
}

const trace = (firstPassMib: number, ...dirtyMib: number[]) => ({
  passes: [{ bytes: firstPassMib * MIB, ms: firstPassMib }],
  dirtyBytes: dirtyMib.map((mib) => mib * MIB),
});

describe('a further round', () => {
  test.each([
    ['an idle guest', trace(1000, 0), 'switch'],
    ['little is left', trace(1000, 1), 'switch'],
    ['less than the first pass', trace(1000, 699), 'push'],
    ['hardly less than the first pass', trace(1000, 701), 'switch'],
    ['it shrinks', trace(1000, 600, 300), 'push'],
    ['it shrinks no more', trace(1000, 600, 500), 'switch'],
    ['it grows', trace(1000, 100, 200), 'switch'],
    ['the eighth', trace(1e6, 5e5, 3e5, 2e5, 1e5, 6e4, 4e4, 2e4), 'push'],
    ['the ninth', trace(1e6, 5e5, 3e5, 2e5, 1e5, 6e4, 4e4, 2e4, 1e4), 'switch'],
    ['nothing was fetched at all', trace(0, 100), 'switch'],
  ])('%s', (_, given, decision) => {
    expect(nextRound(given)).toBe(decision);
  });

  const model = fc.record({
    memoryBytes: fc.integer({ min: 1, max: 2 ** 40 }),
    workingSetBytes: fc.integer({ min: 0, max: 2 ** 40 }),
    dirtyBytesPerS: fc.integer({ min: 0, max: 2 ** 36 }),
    linkBytesPerS: fc.integer({ min: 1, max: 2 ** 36 }),
  });

  test('always comes to an end, and before it each pass is shorter than the one before', () => {
    fc.assert(
      fc.property(model, (given) => {
        const { passes } = run(given);
        expect(passes.length).toBeLessThanOrEqual(8);
        for (const [index, bytes] of passes.slice(1).entries()) expect(bytes).toBeLessThan(0.7 * passes[index]!);
      }),
    );
  });

  test('is none if the guest writes faster than the link carries', () => {
    fc.assert(
      fc.property(model, (given) => {
        const busy = { ...given, dirtyBytesPerS: given.linkBytesPerS, workingSetBytes: given.memoryBytes };
        expect(run(busy).passes).toEqual([given.memoryBytes]);
      }),
    );
  });

  test('a guest that writes at a tenth of the rate of the link is nearly all there before it stops', () => {
    const link = 100 * MIB;
    const { passes, leftBytes } = run({
      ...{ memoryBytes: 4096 * MIB, workingSetBytes: 1024 * MIB },
      ...{ dirtyBytesPerS: link / 10, linkBytesPerS: link },
    });
    expect(passes.map((bytes) => Math.round(bytes / MIB))).toEqual([4096, 410, 41, 4]);
    expect(leftBytes).toBeLessThanOrEqual(MIB);
  });
});
