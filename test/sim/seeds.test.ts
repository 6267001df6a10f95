import { expect, test } from 'vitest';
import type { MigrationMode } from '../../src/domain/migration.js';
import { Chance } from './chance.js';
import { expectSound } from './explain.js';
import type { Scenario } from './simulate.js';
import type { Fault, FaultKind } from './world.js';

const SEEDS_PER_TEST = 500;
const TEST_COUNT = 5;
/** More events than any migration has, so that faults also strike after its end. */
const EVENTS = 250;
const FAULTS_MAX = 5;

const KINDS: readonly FaultKind[] = [
  'killSourceDaemon',
  'killSourceDaemon',
  'loseOwners',
  'restoreOwners',
  'killTargetDaemon',
  'killTargetDaemon',
  'killSourceQemu',
  'killTargetQemu',
  'killTargetQemu',
  'endGuest',
  'cutNetwork',
  'cutNetwork',
  'fillSourceDisk',
  'fillTargetDisk',
  'cancel',
  'loseAnswer',
  'loseAnswer',
  'repeatCall',
  'delayCall',
];

const MODES: readonly MigrationMode[] = ['postcopy', 'postcopy', 'hybrid', 'hybrid', 'precopy', 'native-precopy'];

/** Several faults. The later ones strike what the earlier ones have caused. */
function scenarioOf(seed: number): Scenario {
  const chance = new Chance(seed);
  const faults = Array.from({ length: 1 + chance.below(FAULTS_MAX) }, (): Fault => {
    // Short and long durations are equally frequent: 1 ms to 30 s.
    const ms = Math.round(30_000 ** chance.next());
    return { at: chance.below(EVENTS), kind: chance.pick(KINDS), ms };
  });
  return { seed, faults, mode: chance.pick(MODES) };
}

const replayed = process.env.VMIGRATE_SIM_SEED;

if (replayed === undefined) {
  test.each(Array.from({ length: TEST_COUNT }, (_, index) => index * SEEDS_PER_TEST))(
    'seeds from %i',
    async (first) => {
      const ends = new Map<string, number>();
      for (let seed = first; seed < first + SEEDS_PER_TEST; seed++) {
        const { state } = await expectSound(scenarioOf(seed));
        ends.set(state ?? 'refused', (ends.get(state ?? 'refused') ?? 0) + 1);
      }
      // The faults reach every final state of a job. Otherwise the simulation has become too weak.
      for (const state of ['cancelled', 'done', 'failed', 'lost', 'refused']) {
        expect(ends.get(state) ?? 0, `jobs that ended ${state}`).toBeGreaterThan(SEEDS_PER_TEST / 100);
      }
    },
  );
} else {
  test(`seed ${replayed}`, async () => {
    const scenario = scenarioOf(Number(replayed));
    const { trace, state } = await expectSound(scenario);
    console.log([JSON.stringify(scenario), ...trace, `job ${state}`].join('\n'));
  });
}
