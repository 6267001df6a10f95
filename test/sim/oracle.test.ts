/**
 * The oracle can fail: it catches orders of steps that are broken on purpose. Without these tests a simulation that
 * finds nothing would prove nothing.
 */
import { describe, expect, test } from 'vitest';
import type { MigrationMode } from '../../src/domain/migration.js';
import { type Sabotage, simulate } from './simulate.js';
import type { FaultKind } from './world.js';

/** Returns the first violation that a fault at any event causes, or that of the run without faults. */
async function firstViolation(
  sabotage: Sabotage,
  kind: FaultKind | null,
  mode: MigrationMode = 'postcopy',
): Promise<string | null> {
  const calm = await simulate({ seed: 7, faults: [], sabotage, mode });
  if (kind === null) return calm.violation;
  expect(calm.violation).toBeNull();
  for (let at = 0; at < calm.eventCount; at++) {
    const { violation } = await simulate({ seed: 7, faults: [{ at, kind, ms: 500 }], sabotage });
    if (violation !== null) return violation;
  }
  return null;
}

describe('the oracle sees', () => {
  test('resume before commit', async () => {
    expect(await firstViolation('resumeBeforeCommit', 'fillSourceDisk')).toMatch(
      /two copies|ran on after|written after/,
    );
  });

  test('a source that runs on after the commit', async () => {
    expect(await firstViolation('continueAfterCommit', null)).toMatch(/two copies|ran on after/);
  });

  test('a source released before the target has every page', async () => {
    expect(await firstViolation('completeTooSoon', null)).toMatch(/pages are missing/);
  });

  test('an undo that leaves the target as it is', async () => {
    expect(await firstViolation('discardNothing', 'loseAnswer')).toMatch(/left over on the target/);
  });

  test.each(['hybrid', 'precopy'] as const)(
    'a page that was fetched ahead by a %s and is not given up',
    async (mode) => {
      expect(await firstViolation('keepWritten', null, mode)).toMatch(/fetched before it was written/);
    },
  );

  test('a daemon that forgets its journal', async () => {
    expect(await firstViolation('loseJournal', 'killSourceDaemon')).not.toBeNull();
  });
});
