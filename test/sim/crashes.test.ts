import { describe, expect, test } from 'vitest';
import { MIGRATION_STEPS, type MigrationMode, type StepName } from '../../src/domain/migration.js';
import { STEPS_OF_MODE } from '../../src/planner/migration/plan.js';
import { expectSound } from './explain.js';
import type { FaultKind } from './world.js';

const KINDS: readonly [kind: FaultKind, ms: number][] = [
  ['killSourceDaemon', 300],
  ['loseOwners', 300],
  ['restoreOwners', 300],
  ['killTargetDaemon', 300],
  ['killTargetDaemon', 20_000],
  ['killSourceQemu', 0],
  ['killTargetQemu', 0],
  ['endGuest', 0],
  ['cutNetwork', 1_000],
  ['cutNetwork', 30_000],
  ['fillSourceDisk', 2_000],
  ['fillTargetDisk', 2_000],
  ['cancel', 0],
  ['loseAnswer', 0],
  ['repeatCall', 50],
  ['delayCall', 20_000],
];

/** For each step a mode whose walk has it. A step that no simulation covers does not compile. */
const SIMULATED_IN: Readonly<Record<StepName, MigrationMode>> = {
  reserve: 'postcopy',
  prepareTarget: 'postcopy',
  exposeSource: 'postcopy',
  connectTarget: 'postcopy',
  push: 'hybrid',
  stopSource: 'postcopy',
  pushLast: 'precopy',
  transferState: 'postcopy',
  nativeStart: 'native-precopy',
  nativeSwitchover: 'native-precopy',
  commit: 'postcopy',
  resumeTarget: 'postcopy',
  drain: 'postcopy',
  verifyMemory: 'postcopy',
  releaseSource: 'postcopy',
};

test('every step is in the plan of the mode in which it is simulated', () => {
  for (const step of MIGRATION_STEPS) expect(STEPS_OF_MODE[SIMULATED_IN[step]]).toContain(step);
});

describe('one fault at every event of a migration', () => {
  for (const mode of new Set(Object.values(SIMULATED_IN))) {
    for (const [kind, ms] of KINDS) {
      test(`${mode}: ${kind} ${ms}`, async () => {
        const { eventCount, state } = await expectSound({ seed: 1, faults: [], mode });
        expect(state).toBe('done');
        for (let at = 0; at < eventCount; at++) await expectSound({ seed: 1, faults: [{ at, kind, ms }], mode });
      });
    }
  }
});

/** The target is the only witness of the commit, and it is away when the source's daemon starts again. */
describe('owner records that are lost or restored while the hosts cannot reach each other', () => {
  for (const mode of new Set(Object.values(SIMULATED_IN))) {
    for (const kind of ['loseOwners', 'restoreOwners'] as const) {
      test(`${mode}: ${kind}`, async () => {
        const { eventCount } = await expectSound({ seed: 1, faults: [], mode });
        for (let at = 0; at < eventCount; at++) {
          const cut = { at, kind: 'cutNetwork', ms: 60_000 } as const;
          await expectSound({ seed: 1, faults: [cut, { at, kind, ms: 300 }], mode });
        }
      });
    }
  }
});

/** Nobody need answer: the mirror in the memory directory knows better than the copy. */
describe('any copy of the owner records of a host, restored at any later event', () => {
  const hosts = [
    ['A', 'restoreOwners'],
    ['B', 'restoreTargetOwners'],
  ] as const;
  for (const mode of new Set(Object.values(SIMULATED_IN))) {
    for (const [host, kind] of hosts) {
      for (const cutMs of [0, 60_000]) {
        test(`${mode}: ${host}, with the network cut for ${cutMs} ms`, async () => {
          const { eventCount, ownersChangedAt } = await expectSound({ seed: 1, faults: [], mode });
          const copies = ownersChangedAt[host];
          expect(copies.length).toBeGreaterThan(1);
          for (let at = 0; at < eventCount; at++) {
            const cuts = cutMs === 0 ? [] : [{ at, kind: 'cutNetwork', ms: cutMs } as const];
            for (const copiedAt of copies.filter((event) => event < at))
              await expectSound({ seed: 1, faults: [...cuts, { at, kind, ms: 300, copiedAt }], mode });
          }
        });
      }
    }
  }
});

test('a cut that outlasts all patience ends well without help: the job needs recovery and goes on', async () => {
  const { eventCount } = await expectSound({ seed: 3, faults: [] });
  const ends = new Set<string>();
  for (let at = 0; at < eventCount; at++) {
    const faults = [{ at, kind: 'cutNetwork', ms: 400_000 } as const];
    const { state, hasNeededRecovery } = await expectSound({ seed: 3, faults });
    ends.add(`${state}${hasNeededRecovery ? ' after it needed recovery' : ''}`);
  }
  expect(ends).toContain('done after it needed recovery');
  expect([...ends].filter((end) => !/^(done|failed|null)/.test(end))).toEqual([]);
});
