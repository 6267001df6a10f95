/**
 * Forks whose image gets to three hosts by a tree or by a multicast, with the agent's own classes for seats and near
 * holders. Relays, root and group fail in the course of it: that costs time, and changes nothing.
 */
import { beforeAll, describe, expect, test } from 'vitest';
import type { HostWish } from '../../../src/domain/fork.js';
import { Chance } from '../chance.js';
import { expectSoundFork, type ForkResult, type ForkScenario, simulateFork } from '../fork-simulate.js';
import type { ForkFault } from '../fork-world.js';
import type { FanoutSabotage } from './fanout-state.js';

type Shape = Omit<ForkScenario, 'seed' | 'faults'>;
type Fault = Omit<ForkFault, 'at'>;

const wishes: readonly HostWish[] = ['B', 'C', 'D'].map((host) => ({ host, cloneCount: 1 }));
/** B is the relay of C and D. */
const topology = {
  name: 'topology.conf',
  text: 'SwitchName=s1 Nodes=A\nSwitchName=s2 Nodes=B,C,D\nSwitchName=top Switches=s1,s2\n',
};
const TREE: Shape = { wishes, topology, fanout: 'tree' };
const MULTICAST: Shape = { wishes, fanout: 'multicast' };
const SHAPES: Readonly<Record<string, Shape>> = {
  tree: TREE,
  multicast: MULTICAST,
  'tree, partial': { ...TREE, isPartial: true },
  'multicast, parent stops': { ...MULTICAST, parentMode: 'stop' },
  'multicast of an image': { ...MULTICAST, isOfImage: true },
};

const COMMON: readonly Fault[] = [
  { kind: 'killDaemon', ms: 300, host: 'A' },
  { kind: 'killDaemon', ms: 300, host: 'B' },
  { kind: 'killDaemon', ms: 6_000, host: 'B' },
  { kind: 'killHost', ms: 6_000, host: 'B' },
  { kind: 'cutNetwork', ms: 1_500, host: 'B' },
  { kind: 'refuseHeld', ms: 20_000, host: 'B' },
  { kind: 'delayHeld', ms: 20_000, host: 'B' },
  { kind: 'hangHeld', ms: 20_000, host: 'B' },
  { kind: 'loseAnswer', ms: 0 },
  { kind: 'delayCall', ms: 80_000 },
];
const OF_GROUP: readonly Fault[] = [
  { kind: 'silenceGroup', ms: 20_000 },
  { kind: 'refuseSeats', ms: 20_000, host: 'A' },
];

/** 1: at every event, which takes minutes. */
const STRIDE = Number(process.env.VMIGRATE_SIM_STRIDE ?? 89);

describe.each(Object.entries(SHAPES))('one fault at events of a fork: %s', (name, shape) => {
  const seed = Object.keys(SHAPES).indexOf(name);
  const faults = shape.fanout === 'tree' ? COMMON : [...COMMON, ...OF_GROUP];

  let calm: ForkResult;
  beforeAll(async () => {
    calm = await expectSoundFork({ ...shape, seed, faults: [] });
  });

  test('without a fault the pages come by it', () => {
    const { state, failureCount, report } = calm;
    expect({ state, failureCount, kind: report?.fanout?.kind }).toEqual({
      ...{ state: 'done', failureCount: 0, kind: shape.fanout },
    });
    expect(report?.bytes[shape.fanout === 'tree' ? 'relayed' : 'multicast']).toBeGreaterThan(0);
  });

  test.each(faults.map((fault, index) => ({ ...fault, index })))('$kind $host $ms', async ({ index, ...fault }) => {
    for (let at = (index * 5 + seed) % STRIDE; at < calm.eventCount; at += STRIDE)
      await expectSoundFork({ ...shape, seed, faults: [{ ...fault, at }] });
  });
});

const SEED_COUNT = Number(process.env.VMIGRATE_SIM_SEEDS ?? 80);
/** About as many as a fork has. */
const EVENTS = 500;
const FAULTS_MAX = 5;

test('forks with faults of all kinds, by seeds', async () => {
  const ends = new Map<string, number>();
  for (let seed = 0; seed < SEED_COUNT; seed++) {
    const chance = new Chance(seed);
    const faults = Array.from({ length: 1 + chance.below(FAULTS_MAX) }, (): ForkFault => {
      const ms = Math.round(30_000 ** chance.next());
      const { kind } = chance.pick([...COMMON, ...OF_GROUP]);
      return { at: chance.below(EVENTS), kind, ms, host: chance.pick(['A', 'B', 'C', 'D']) };
    });
    const { state } = await expectSoundFork({ ...chance.pick(Object.values(SHAPES)), seed, faults });
    ends.set(state ?? 'refused', (ends.get(state ?? 'refused') ?? 0) + 1);
  }
  for (const end of ['done', 'failed', 'refused']) expect(ends.get(end) ?? 0, end).toBeGreaterThan(0);
});

/** Returns the first violation that the fault causes, at events of which the label matches. */
async function violationOf(
  sabotage: FanoutSabotage,
  shape: Shape,
  fault: Fault | null,
  when = /./,
): Promise<string | null> {
  const calm = await simulateFork({ ...shape, seed: 7, faults: [], sabotage });
  if (fault === null) return calm.violation;
  expect(calm.violation).toBeNull();
  const events = calm.trace.filter((line) => /^\d/.test(line) && when.test(line));
  for (const line of events) {
    const at = Number(line.split(' ')[0]);
    const { violation } = await simulateFork({ ...shape, seed: 7, faults: [{ ...fault, at }], sabotage });
    if (violation !== null) return violation;
  }
  return null;
}

const LEFT_WITHOUT = /did not come to rest|still reads|pages are missing/;

describe('the oracle sees', () => {
  test('a host that waits for a relay which never comes back', async () => {
    const fault = { kind: 'killHost', ms: 6_000, host: 'B' } as const;
    expect(await violationOf('relaysOnly', TREE, fault, /C page/)).toMatch(LEFT_WITHOUT);
  });

  test('a host that waits for a group which has become silent', async () => {
    const fault = { kind: 'silenceGroup', ms: 20_000 } as const;
    expect(await violationOf('trustGroup', MULTICAST, fault, /sends page/)).toMatch(LEFT_WITHOUT);
  });

  test('a host that reads nothing because it gets no seat', async () => {
    const fault = { kind: 'refuseSeats', ms: 20_000, host: 'A' } as const;
    expect(await violationOf('needSeat', MULTICAST, fault, /connectImage/)).toMatch(LEFT_WITHOUT);
  });

  test('a host that reads nothing before its relay answers, which it never does', async () => {
    const fault = { kind: 'hangHeld', ms: 20_000, host: 'B' } as const;
    expect(await violationOf('waitForNear', TREE, fault, /connectImage/)).toMatch(LEFT_WITHOUT);
  });

  test('two seats with the same number', async () => {
    expect(await violationOf('sameSeat', MULTICAST, null)).toMatch(/takes a seat that another one has had/);
  });

  test('a near holder that gives pages which it does not have', async () => {
    expect(await violationOf('giveAbsent', TREE, null)).toMatch(/was not written at the fork point/);
  });

  test('a multicast of an image that is not complete', async () => {
    expect(await violationOf('sendIncomplete', MULTICAST, null)).toMatch(/was not written at the fork point/);
  });

  test('a multicast that does not end', async () => {
    expect(await violationOf('neverEnd', MULTICAST, null)).toMatch(/a multicast is left over/);
  });

  test('pages that are read for a fork which was undone', async () => {
    const fault = { kind: 'cancel', ms: 0 } as const;
    expect(await violationOf('keepReading', TREE, fault, /connectImage/)).toMatch(/still reads|not written/);
  });
});
