import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { nextPrecopyMove, type Pass, type PushTrace, switchMs } from '../../../src/planner/migration/downtime.js';

const MIB = 2 ** 20;
const GIB = 2 ** 30;

type Round = readonly [fetchedMib: number, ms: number, dirtyMib: number];

const trace = (...rounds: readonly Round[]): PushTrace => ({
  passes: rounds.map(([mib, ms]) => ({ bytes: mib * MIB, ms })),
  dirtyBytes: rounds.map(([, , mib]) => mib * MIB),
});
const bound = { downtimeMsMax: 200, memoryBytes: GIB };
const kind = (given: PushTrace): string => nextPrecopyMove(given, bound).kind;

describe('a pre-copy', () => {
  test.each([
    ['begins with a pass over all memory', trace(), 'push'],
    ['stops a VM that has written nothing', trace([1000, 1000, 0]), 'switch'],
    ['stops it when the rest fits', trace([1000, 1000, 100]), 'switch'],
    ['fetches again when it does not', trace([1000, 1000, 200]), 'push'],
    ['counts what is written until the stop', trace([1000, 1000, 165]), 'push'],
    ['goes on while rounds get shorter', trace([1000, 1000, 600], [600, 600, 400], [400, 400, 300]), 'push'],
    [
      'bears with rounds that get longer by chance',
      trace([1000, 1000, 300], [300, 300, 400], [400, 400, 500], [500, 500, 350]),
      'push',
    ],
    [
      'gives up when no round has got better for long',
      trace(...Array.from({ length: 5 }, (): Round => [1000, 1000, 600])),
      'giveUp',
    ],
    ['takes a VM without memory in use for one that needs no time', trace([0, 0, 0]), 'switch'],
  ])('%s', (_, given, expected) => {
    expect(kind(given)).toBe(expected);
  });

  test('says what its best round would have needed', () => {
    const move = nextPrecopyMove(
      trace([1000, 1000, 600], [600, 600, 500], ...Array.from({ length: 4 }, (): Round => [1000, 1000, 700])),
      bound,
    );
    expect(move).toMatchObject({ kind: 'giveUp', best: { fetchedBytesPerS: 1000 * MIB } });
    const { best } = move as Extract<typeof move, { kind: 'giveUp' }>;
    // 500 MiB, and what is written in 20 ms, at 1000 MiB/s.
    expect(best.neededMs).toBe(switchMs(GIB) + 500 + Math.ceil((500 / 600) * 20));
    expect(
      nextPrecopyMove(trace([1000, 1000, 600], [600, 600, 500]), { ...bound, downtimeMsMax: best.neededMs }),
    ).toEqual({ kind: 'switch', fetchedBytesPerS: 1000 * MIB });
  });

  test('comes to an end whatever the VM writes, and stops it only if the rest fits', () => {
    const round = fc.record({ bytes: fc.nat(2 ** 40), ms: fc.nat(10 ** 6), dirty: fc.nat(2 ** 40) });
    const rounds = fc.array(round, { minLength: 30, maxLength: 30 });
    fc.assert(
      fc.property(rounds, fc.integer({ min: 31, max: 600_000 }), (given, downtimeMsMax) => {
        const passes: Pass[] = [];
        const dirtyBytes: number[] = [];
        for (const { bytes, ms, dirty } of given) {
          passes.push({ bytes, ms });
          dirtyBytes.push(dirty);
          const move = nextPrecopyMove({ passes, dirtyBytes }, { downtimeMsMax, memoryBytes: GIB });
          if (move.kind === 'push') continue;
          const isFitting = switchMs(GIB) + (dirty * 1000) / (move.kind === 'switch' ? move.fetchedBytesPerS : 1);
          if (move.kind === 'switch') expect(isFitting).toBeLessThanOrEqual(downtimeMsMax);
          else expect(move.best.neededMs).toBeGreaterThan(downtimeMsMax);
          return;
        }
        expect.unreachable('it never ends');
      }),
    );
  });

  test('converges on a guest that writes at a tenth of the rate of the link', () => {
    const passes: Pass[] = [];
    const dirtyBytes: number[] = [];
    for (let bytes = 4096 * MIB; ; bytes = dirtyBytes.at(-1)!) {
      const ms = bytes / (100 * MIB) / 0.001;
      passes.push({ bytes, ms });
      dirtyBytes.push(Math.min(GIB, (10 * MIB * ms) / 1000));
      const { kind: next } = nextPrecopyMove({ passes, dirtyBytes }, { downtimeMsMax: 100, memoryBytes: 4 * GIB });
      expect(next).not.toBe('giveUp');
      if (next === 'switch') break;
    }
    expect(passes).toHaveLength(3);
  });
});
