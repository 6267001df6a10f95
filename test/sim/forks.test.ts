import { describe, expect, test } from 'vitest';
import type { ForkStepName, ParentMode } from '../../src/domain/fork.js';
import { Chance } from './chance.js';
import type { ForkSabotage } from './fork-sabotage.js';
import { expectSoundFork, simulateFork } from './fork-simulate.js';
import { CLONES, type ForkFault, type ForkFaultKind, type GuestChoice } from './fork-world.js';

const KINDS: readonly [kind: ForkFaultKind, ms: number][] = [
  ['killDaemon', 300],
  ['killDaemon', 20_000],
  ['killParent', 0],
  ['killClone', 0],
  ['endGuest', 0],
  ['fillDisk', 2_000],
  ['cancel', 0],
  ['failCall', 0],
  ['loseAnswer', 0],
  ['delayCall', 50],
  ['delayCall', 80_000],
];

/** For each step the parent mode of a fork that has it. A step that no simulation covers does not compile. */
const SIMULATED_WITH: Readonly<Record<ForkStepName, ParentMode>> = {
  reserveParent: 'continue',
  prepareClones: 'continue',
  armParent: 'continue',
  connectHosts: 'continue',
  forkPoint: 'continue',
  loadClones: 'continue',
  commitFork: 'continue',
  runClones: 'continue',
  fillImage: 'continue',
  releaseParent: 'stop',
};

describe('one fault at every event of a fork', () => {
  for (const parentMode of new Set(Object.values(SIMULATED_WITH))) {
    for (const [kind, ms] of KINDS) {
      test(`parent ${parentMode}: ${kind} ${ms}`, async () => {
        const { eventCount, state } = await expectSoundFork({ seed: 1, faults: [], parentMode });
        expect(state).toBe('done');
        for (let at = 0; at < eventCount; at++)
          await expectSoundFork({ seed: 1, faults: [{ at, kind, ms }], parentMode });
      });
    }
  }
});

describe('a guest that ends at every event of a fork', () => {
  const guests: readonly GuestChoice[] = ['parent', ...Array.from({ length: CLONES }, (_, index) => index)];
  test.each(guests)('%s: the others go on, and nobody is called lost', async (guest) => {
    const { eventCount } = await expectSoundFork({ seed: 1, faults: [] });
    const ends = new Set<string | null>();
    for (let at = 0; at < eventCount; at++) {
      const end = { at, kind: 'endGuest', ms: 0, guest } as const;
      const { state } = await expectSoundFork({ seed: 1, faults: [end] });
      ends.add(state);
      // The daemon dies while QEMU still waits to be ended, and the next one finds a guest that has ended.
      await expectSoundFork({ seed: 1, faults: [end, { at: at + 1, kind: 'killDaemon', ms: 300 }] });
    }
    // Before the fork point there is nothing to fork once the parent has ended; the end of a clone is its own matter.
    expect(ends).toEqual(new Set(guest === 'parent' ? ['done', 'failed', null] : ['done']));
  });
});

describe('a daemon that dies', () => {
  /** The first daemon has at most so many events left after the first fault. */
  const LATER = 60;

  test.each([
    ['killDaemon', 300],
    ['fillDisk', 500],
  ] as const)('after %s %i, at every few events', async (kind, ms) => {
    const { eventCount } = await expectSoundFork({ seed: 1, faults: [] });
    for (let at = 0; at < eventCount; at++) {
      for (let next = at + 1 + (at % 3); next < at + LATER; next += 3) {
        await expectSoundFork({
          seed: 1,
          faults: [
            { at, kind, ms },
            { at: next, kind: 'killDaemon', ms: 100 },
          ],
        });
      }
    }
  });
});

const SEEDS_PER_TEST = 500;
const TEST_COUNT = 4;
/** More events than any fork has, so that faults also strike after its end. */
const EVENTS = 120;
const FAULTS_MAX = 5;

function scenarioOf(seed: number) {
  const chance = new Chance(seed);
  const faults = Array.from({ length: 1 + chance.below(FAULTS_MAX) }, (): ForkFault => {
    // Short and long durations are equally frequent: 1 ms to 30 s.
    const ms = Math.round(30_000 ** chance.next());
    return { at: chance.below(EVENTS), kind: chance.pick(KINDS)[0], ms };
  });
  return { seed, faults, parentMode: chance.below(4) === 0 ? ('stop' as const) : ('continue' as const) };
}

test.each(Array.from({ length: TEST_COUNT }, (_, index) => index * SEEDS_PER_TEST))(
  'forks of seeds from %i',
  async (first) => {
    const ends = new Map<string, number>();
    for (let seed = first; seed < first + SEEDS_PER_TEST; seed++) {
      const { state } = await expectSoundFork(scenarioOf(seed));
      ends.set(state ?? 'refused', (ends.get(state ?? 'refused') ?? 0) + 1);
    }
    // The faults reach every final state of a fork. Otherwise the simulation has become too weak.
    for (const state of ['cancelled', 'done', 'failed', 'refused']) {
      expect(ends.get(state) ?? 0, `jobs that ended ${state}`).toBeGreaterThan(SEEDS_PER_TEST / 100);
    }
  },
);

/** Returns the first violation that a fault at any event causes, or that of the run without faults. */
async function firstViolation(sabotage: ForkSabotage, kind: ForkFaultKind | null): Promise<string | null> {
  const calm = await simulateFork({ seed: 7, faults: [], sabotage });
  if (kind === null) return calm.violation;
  expect(calm.violation).toBeNull();
  for (let at = 0; at < calm.eventCount; at++) {
    const { violation } = await simulateFork({ seed: 7, faults: [{ at, kind, ms: 500 }], sabotage });
    if (violation !== null) return violation;
  }
  return null;
}

describe('the oracle sees', () => {
  test('an undo that leaves everything as it is', async () => {
    expect(await firstViolation('discardNothing', 'loseAnswer')).toMatch(/left over|stood still|protected/);
  });

  test('a commit that nobody has written down', async () => {
    expect(await firstViolation('forgetCommit', null)).toMatch(/runs before its fork is committed/);
  });

  test('a clone that runs before the commit', async () => {
    expect(await firstViolation('runBeforeCommit', null)).toMatch(/runs before its fork is committed/);
  });

  test('an undo that takes back a clone that has run', async () => {
    expect(await firstViolation('takeBack', 'killDaemon')).toMatch(/takes clone-\d, which has run/);
  });

  test('a clone that never runs after the commit', async () => {
    expect(await firstViolation('neverRun', null)).toMatch(/never ran/);
  });

  test('a parent let go before its last page is copied', async () => {
    expect(await firstViolation('completeTooSoon', null)).toMatch(/written after the fork point|pages are missing/);
  });

  test('a parent that stays reserved', async () => {
    expect(await firstViolation('keepReserved', null)).toMatch(/still reserved/);
  });

  test('a daemon that forgets its journal', async () => {
    expect(await firstViolation('loseJournal', 'killDaemon')).not.toBeNull();
  });
});
