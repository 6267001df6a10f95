import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { FANOUT_CHOICES, FANOUTS } from '../../../../src/domain/fanout.js';
import { chooseFanout, type FanoutFacts, needsProbe } from '../../../../src/planner/fanout/choose.js';

const GIB = 2 ** 30;
const names = (count: number): string[] => Array.from({ length: count }, (_, index) => `h${index + 1}`);

const facts: FanoutFacts = {
  ...{ wish: 'auto', root: 'A', joiningHosts: names(8), imageBytes: 4 * GIB, linkBytesPerS: 1.25e9 },
  ...{ fetch: 'all', pageBytes: 4096, transport: 'tcp', probe: { deafHosts: [], largestBytes: 1500 } },
};

function chosen(change: Partial<FanoutFacts>): { kind: string; reason: string } {
  const decision = chooseFanout({ ...facts, ...change });
  if (decision.kind === null) throw new Error(decision.refusals.map(({ reason }) => reason).join('; '));
  return { kind: decision.kind, reason: decision.reason };
}

const HUGE = 2 * 1024 * 1024;

describe('auto', () => {
  test.each<[string, Partial<FanoutFacts>, string, RegExp]>([
    [
      'many hosts that hear the group',
      {},
      'multicast',
      /all 8 hosts hear the group: multicast 4\.\d s, unicast 27 s, tree 7/,
    ],
    ['one host', { joiningHosts: ['b'] }, 'unicast', /only one host/],
    ['--fetch demand', { fetch: 'demand' }, 'unicast', /only what its clones touch/],
    ['one machine', { transport: 'shm' }, 'unicast', /on one machine/],
    ['huge pages', { pageBytes: HUGE }, 'tree', /huge pages cannot be multicast: tree .* unicast 27 s/],
    [
      'some hosts that do not hear it',
      { probe: { deafHosts: ['h2', 'h5'], largestBytes: 1500 } },
      'tree',
      /2 of 8 hosts hear no multicast of A: h2, h5: tree/,
    ],
    ['small datagrams only', { probe: { deafHosts: [], largestBytes: 200 } }, 'tree', /datagrams of 200 bytes/],
    ['a group that nobody has probed', { probe: null }, 'tree', /^tree \d/],
    [
      'a small image',
      { imageBytes: 20 * 2 ** 20 },
      'unicast',
      /all 8 hosts hear the group, but .* longer: unicast 0\.1 s/,
    ],
    ['links of unknown speed', { linkBytesPerS: null }, 'multicast', /10 Gbit\/s, which nobody has measured/],
    ['two hosts', { joiningHosts: names(2), probe: null }, 'unicast', /unicast .* tree/],
  ])('with %s', (_, change, kind, reason) => {
    const found = chosen(change);
    expect(found.kind).toBe(kind);
    expect(found.reason).toMatch(reason);
  });

  test('says no seconds where no speed is known, or a kind is not possible', () => {
    expect(chooseFanout({ ...facts, linkBytesPerS: null }).seconds).toEqual({
      unicast: null,
      multicast: null,
      tree: null,
    });
    const { seconds } = chooseFanout({ ...facts, pageBytes: HUGE });
    expect(seconds.multicast).toBeNull();
    expect(seconds.unicast).toBeCloseTo(27.5, 0);
  });

  test('probes the group only if the answer matters', () => {
    expect(needsProbe({ ...facts, probe: null })).toBe(true);
    expect(needsProbe({ ...facts, wish: 'multicast', probe: null })).toBe(true);
    for (const change of [
      { wish: 'tree' },
      { fetch: 'demand' },
      { pageBytes: HUGE },
      { joiningHosts: ['b'] },
    ] as const) {
      expect(needsProbe({ ...facts, ...change, probe: null })).toBe(false);
    }
  });
});

describe('a wish', () => {
  test.each<[string, Partial<FanoutFacts>, string, RegExp, Partial<FanoutFacts>]>([
    [
      'multicast that some do not hear',
      { wish: 'multicast', joiningHosts: names(20), probe: { deafHosts: names(7), largestBytes: 1500 } },
      'MULTICAST_NOT_ROUTED',
      /7 of 20 hosts hear no multicast of A: h1, h2, h3, h4, h5 and 2 more/,
      { wish: 'tree' },
    ],
    [
      'multicast of small datagrams',
      { wish: 'multicast', probe: { deafHosts: [], largestBytes: 0 } },
      'MULTICAST_NOT_ROUTED',
      /datagrams of 0 bytes/,
      { wish: 'tree' },
    ],
    [
      'multicast of huge pages',
      { wish: 'multicast', pageBytes: HUGE },
      'FANOUT_UNAVAILABLE',
      /2097152/,
      { wish: 'tree' },
    ],
    [
      'multicast on demand',
      { wish: 'multicast', fetch: 'demand' },
      'FANOUT_UNAVAILABLE',
      /--fetch demand/,
      { fetch: 'all' },
    ],
    ['a tree on demand', { wish: 'tree', fetch: 'demand' }, 'FANOUT_UNAVAILABLE', /--fetch demand/, { wish: 'auto' }],
    [
      'a tree on one machine',
      { wish: 'tree', transport: 'shm' },
      'FANOUT_UNAVAILABLE',
      /one machine/,
      { wish: 'auto' },
    ],
  ])('for %s is refused, and its remedy works', (_, change, code, reason, remedy) => {
    const decision = chooseFanout({ ...facts, ...change });
    if (decision.kind !== null) throw new Error(`it chose ${decision.kind}`);
    expect(decision.refusals).toMatchObject([{ code, reason: expect.stringMatching(reason) }]);
    const flag = remedy.wish === undefined ? `--fetch ${remedy.fetch}` : `--fanout ${remedy.wish}`;
    expect(decision.refusals[0]?.remedy).toContain(flag);
    expect(chooseFanout({ ...facts, ...change, ...remedy }).kind).not.toBeNull();
  });

  test('that can be met is met, and nothing else is ever chosen for it', () => {
    const anyFacts = fc.record({
      wish: fc.constantFrom(...FANOUT_CHOICES),
      root: fc.constant('A'),
      joiningHosts: fc.nat(300).map(names),
      imageBytes: fc.double({ min: 0, max: 1e13, noNaN: true }),
      linkBytesPerS: fc.option(fc.double({ min: 1e3, max: 1e11, noNaN: true })),
      fetch: fc.constantFrom('all' as const, 'demand' as const),
      pageBytes: fc.constantFrom(4096, HUGE),
      transport: fc.constantFrom('tcp' as const, 'shm' as const, 'rdma' as const),
      probe: fc.option(fc.record({ deafHosts: fc.nat(3).map(names), largestBytes: fc.nat(9000) })),
    });
    fc.assert(
      fc.property(anyFacts, (asked) => {
        const decision = chooseFanout(asked);
        if (decision.kind === null) {
          expect(asked.wish).not.toBe('auto');
          expect(decision.refusals).toHaveLength(1);
        } else {
          expect(asked.wish === 'auto' || asked.wish === decision.kind).toBe(true);
          expect(decision.reason).not.toMatch(/null|undefined|NaN/);
        }
        for (const kind of FANOUTS) expect(decision.seconds[kind]).not.toBeNaN();
      }),
    );
  });
});
