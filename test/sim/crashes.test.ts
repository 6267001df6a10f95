import { describe, expect, test } from 'vitest';
import { expectSound } from './explain.js';
import type { FaultKind } from './world.js';

const KINDS: readonly [kind: FaultKind, ms: number][] = [
  ['killSourceDaemon', 300],
  ['killTargetDaemon', 300],
  ['killTargetDaemon', 20_000],
  ['killSourceQemu', 0],
  ['killTargetQemu', 0],
  ['cutNetwork', 1_000],
  ['cutNetwork', 30_000],
  ['fillSourceDisk', 2_000],
  ['fillTargetDisk', 2_000],
  ['cancel', 0],
  ['loseAnswer', 0],
  ['repeatCall', 50],
  ['delayCall', 20_000],
];

describe('one fault at every event of a migration', () => {
  for (const mode of ['postcopy', 'native-precopy'] as const) {
    for (const [kind, ms] of KINDS) {
      test(`${mode}: ${kind} ${ms}`, async () => {
        const { eventCount, state } = await expectSound({ seed: 1, faults: [], mode });
        expect(state).toBe('done');
        for (let at = 0; at < eventCount; at++) await expectSound({ seed: 1, faults: [{ at, kind, ms }], mode });
      });
    }
  }
});
