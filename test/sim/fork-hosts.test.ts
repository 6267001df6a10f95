/** Forks over several hosts: faults at every event, pairs of faults by seeds, and hosts that are broken on purpose. */
import { describe, expect, test } from 'vitest';
import type { HostWish } from '../../src/domain/fork.js';
import { Chance } from './chance.js';
import type { ForkSabotage } from './fork-sabotage.js';
import { expectSoundFork, type ForkScenario, simulateFork } from './fork-simulate.js';
import type { ForkFault, ForkFaultKind } from './fork-world.js';

const EACH_ONE: readonly HostWish[] = ['A', 'B', 'C'].map((host) => ({ host, cloneCount: 1 }));
const NONE_AT_ROOT: readonly HostWish[] = [
  { host: 'B', cloneCount: 2 },
  { host: 'C', cloneCount: 1 },
];

const SHAPES: Readonly<Record<string, Omit<ForkScenario, 'seed' | 'faults'>>> = {
  'one clone on each': { wishes: EACH_ONE },
  'none at the root': { wishes: NONE_AT_ROOT },
  partial: { wishes: EACH_ONE, isPartial: true },
  'parent stops': { wishes: EACH_ONE, parentMode: 'stop' },
  'of an image': { wishes: EACH_ONE, isOfImage: true },
};

const FAULTS: readonly Omit<ForkFault, 'at'>[] = [
  { kind: 'killDaemon', ms: 300, host: 'A' },
  { kind: 'killDaemon', ms: 6_000, host: 'A' },
  { kind: 'killDaemon', ms: 300, host: 'B' },
  { kind: 'killDaemon', ms: 6_000, host: 'B' },
  { kind: 'killHost', ms: 6_000, host: 'B' },
  { kind: 'killParent', ms: 0 },
  { kind: 'killClone', ms: 0 },
  { kind: 'endGuest', ms: 0 },
  { kind: 'fillDisk', ms: 2_000, host: 'A' },
  { kind: 'fillDisk', ms: 2_000, host: 'B' },
  { kind: 'cutNetwork', ms: 1_000, host: 'B' },
  { kind: 'cutNetwork', ms: 20_000, host: 'A' },
  { kind: 'cancel', ms: 0 },
  { kind: 'failCall', ms: 0 },
  { kind: 'loseAnswer', ms: 0 },
  { kind: 'repeatCall', ms: 300 },
  { kind: 'delayCall', ms: 50 },
  { kind: 'delayCall', ms: 80_000 },
];
/** The shapes that differ from the first one only in a few steps meet these. */
const FEW: readonly ForkFaultKind[] = ['killDaemon', 'killHost', 'cutNetwork', 'loseAnswer'];
/** At so many events: the seeds reach the others. */
const STRIDE_OF_OTHERS = 3;
/** In CI the first shape meets each fault at every third event, too. The faults begin at different ones. */
const STRIDE_OF_FIRST = process.env.CI ? 3 : 1;

describe.each(Object.entries(SHAPES))('one fault at every event of a fork over hosts: %s', (name, shape) => {
  const seed = Object.keys(SHAPES).indexOf(name);
  const isFirst = seed === 0;
  test.each(FAULTS.filter(({ kind }) => isFirst || FEW.includes(kind)))('$kind $host $ms', async (fault) => {
    const { eventCount, state, failureCount } = await expectSoundFork({ ...shape, seed, faults: [] });
    expect({ state, failureCount }).toEqual({ state: 'done', failureCount: 0 });
    const stride = isFirst ? STRIDE_OF_FIRST : STRIDE_OF_OTHERS;
    for (let at = (seed + FAULTS.indexOf(fault)) % stride; at < eventCount; at += stride)
      await expectSoundFork({ ...shape, seed, faults: [{ ...fault, at }] });
  });
});

test.each(['prepareClones', 'connectImage', 'loadClones'])(
  'a host that does not answer %s is left out of a partial fork, and hears of it later',
  async (call) => {
    const shape = { ...SHAPES.partial, seed: 1 };
    const { trace } = await expectSoundFork({ ...shape, faults: [] });
    const at = Number(trace.find((line) => line.endsWith(` call B.${call}`))?.split(' ')[0]);
    const { state, failureCount } = await expectSoundFork({
      ...shape,
      faults: [{ at, kind: 'delayCall', ms: 3_600_000 }],
    });
    expect({ state, failureCount }).toEqual({ state: 'done', failureCount: 1 });
  },
);

const SEEDS_PER_TEST = 250;
const TEST_COUNT = 4;
/** More events than a fork has, so that faults also strike after its end. */
const EVENTS = 330;
const FAULTS_MAX = 5;

function scenarioOf(seed: number): ForkScenario {
  const chance = new Chance(seed);
  const faults = Array.from({ length: 1 + chance.below(FAULTS_MAX) }, (): ForkFault => {
    // Short and long durations are equally frequent: 1 ms to 30 s.
    const ms = Math.round(30_000 ** chance.next());
    return { at: chance.below(EVENTS), kind: chance.pick(FAULTS).kind, ms, host: chance.pick(['A', 'B', 'C']) };
  });
  const shape = chance.pick(Object.values(SHAPES));
  return { ...shape, seed, faults };
}

const replayed = process.env.VMIGRATE_SIM_SEED;

if (replayed === undefined) {
  test.each(Array.from({ length: TEST_COUNT }, (_, index) => index * SEEDS_PER_TEST))(
    'forks over hosts of seeds from %i',
    async (first) => {
      const ends = new Map<string, number>();
      for (let seed = first; seed < first + SEEDS_PER_TEST; seed++) {
        const { state, failureCount } = await expectSoundFork(scenarioOf(seed));
        const end = state === 'done' && failureCount > 0 ? 'done without some' : (state ?? 'refused');
        ends.set(end, (ends.get(end) ?? 0) + 1);
      }
      // The faults reach every final state. Otherwise the simulation has become too weak.
      for (const end of ['cancelled', 'done', 'done without some', 'failed', 'refused']) {
        expect(ends.get(end) ?? 0, `jobs that ended ${end}`).toBeGreaterThan(SEEDS_PER_TEST / 100);
      }
    },
  );
} else {
  test(`seed ${replayed}`, async () => {
    const scenario = scenarioOf(Number(replayed));
    const { trace, state } = await expectSoundFork(scenario);
    console.log([JSON.stringify(scenario), ...trace, `job ${state}`].join('\n'));
  });
}

/** Returns the first violation that the fault at any event causes, or that of the run without faults. */
async function firstViolation(
  sabotage: ForkSabotage,
  fault: Omit<ForkFault, 'at'> | null,
  shape = SHAPES['one clone on each'],
): Promise<string | null> {
  const calm = await simulateFork({ ...shape, seed: 7, faults: [], sabotage });
  if (fault === null) return calm.violation;
  expect(calm.violation).toBeNull();
  for (let at = 0; at < calm.eventCount; at++) {
    const { violation } = await simulateFork({ ...shape, seed: 7, faults: [{ ...fault, at }], sabotage });
    if (violation !== null) return violation;
  }
  return null;
}

describe('the oracle sees', () => {
  test('a joined host that starts its clones by itself', async () => {
    const fault = { kind: 'killDaemon', ms: 300, host: 'B' } as const;
    expect(await firstViolation('startByItself', fault)).toMatch(/runs before its fork is committed/);
  });

  test('a joined host whose clones run before its own record says that the fork is committed', async () => {
    expect(await firstViolation('runTooSoon', null)).toMatch(/runs before its host has committed/);
  });

  test('an undo that takes back a clone that has run', async () => {
    const fault = { kind: 'killDaemon', ms: 300, host: 'A' } as const;
    expect(await firstViolation('takeBack', fault)).toMatch(/takes clone-\d, which has run/);
  });

  test('a joined host that discards although the fork is still open', async () => {
    const fault = { kind: 'delayCall', ms: 80_000 } as const;
    expect(await firstViolation('discardWhenOpen', fault)).toMatch(/is committed with \d clones loaded/);
  });

  test('a root that forgets a committed fork before all hosts have committed', async () => {
    const fault = { kind: 'cutNetwork', ms: 20_000, host: 'B' } as const;
    expect(await firstViolation('forgetTooSoon', fault)).toMatch(/clones do not run/);
  });

  test('a root that gives pages before the fork point', async () => {
    expect(await firstViolation('givePagesEarly', null)).toMatch(/was not written at the fork point/);
  });

  test('a commit for which a joined host has not loaded', async () => {
    expect(await firstViolation('commitWithout', null)).toMatch(/is committed with \d clones loaded/);
  });

  test('an undo that leaves the clones of a joined host', async () => {
    expect(await firstViolation('discardNothing', { kind: 'cancel', ms: 0 })).toMatch(
      /left over|stood still|protected/,
    );
  });

  test('a root that tells a host which was left out for ever that the fork is committed', async () => {
    const fault = { kind: 'killDaemon', ms: 6_000, host: 'B' } as const;
    expect(await firstViolation('rememberForEver', fault, SHAPES.partial)).toMatch(/a fork is left over on B/);
  });

  test('a clone of a joined host that never runs', async () => {
    expect(await firstViolation('neverRun', null)).toMatch(/never ran/);
  });

  test('a joined host that is let go before its last page is read', async () => {
    expect(await firstViolation('completeTooSoon', null)).toMatch(/fork point|pages are missing/);
  });

  test('a clone that has failed, and that the report calls ready', async () => {
    const fault = { kind: 'killClone', ms: 0 } as const;
    expect(await firstViolation('hideFailures', fault)).toMatch(/is ready, but has not run/);
  });
});
