/** What a simulated host answers. */
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import type { CloneIdentity } from '../../../src/domain/fork.js';
import type { CommittedFork } from '../../../src/engine/ports/fork.js';
import { CLONES, type Clone, type ForkNote } from '../fork-world.js';

export function identity({ index, name }: Pick<Clone, 'index' | 'name'>): CloneIdentity {
  return { index, cloneCount: CLONES, name, uuid: `uuid ${index}`, vmGenerationId: '', macs: {} };
}

export function committedFork({ image }: ForkNote, all: readonly Clone[]): CommittedFork {
  const ready = all.filter(({ hasRun }) => hasRun).map(({ index }) => ({ index, at: '2000-01-01T00:00:00Z' }));
  const counts = { parentPauseMs: 4, deviceStateBytes: 1000 };
  return { image, isWarm: false, clones: all.map(identity), failures: [], ...counts, ready };
}

export function failure(code: ErrorCode, message: string): MigrationError {
  return new MigrationError(code, message);
}
