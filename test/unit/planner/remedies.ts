/** Checks that a remedy that names an option of the commands works: with the option, the refusal is gone. */
import { expect } from 'vitest';
import type { ForkRequest } from '../../../src/domain/fork.js';
import type { MigrationRequest } from '../../../src/domain/migration.js';
import type { Refusal } from '../../../src/domain/refusal.js';

/** What each option of a remedy does to the request. */
const OF_MIGRATIONS: readonly [RegExp, (match: RegExpExecArray) => Partial<MigrationRequest>][] = [
  [/--tcp/, () => ({ transport: 'tcp' })],
  [/--postcopy/, () => ({ mode: 'postcopy' })],
  [/--hybrid/, () => ({ mode: 'hybrid' })],
  [/--max-downtime (\d+)/, ([, ms]) => ({ downtimeMsMax: Number(ms) })],
  [/--native/, () => ({ mode: 'native-precopy' })],
  [/--verify-memory/, () => ({ verifyMemory: false })],
  [/--shared-storage assume/, () => ({ sharedStorage: 'assume' })],
];
const OF_FORKS: readonly [RegExp, (match: RegExpExecArray) => Partial<ForkRequest>][] = [
  [/--clones (\d+)/, ([, count]) => ({ cloneCount: Number(count) })],
  [/--partial/, () => ({ isPartialAllowed: true })],
  [/--parent (stop|continue)/, ([, mode]) => ({ parentMode: mode as ForkRequest['parentMode'] })],
  [/--memory private/, () => ({ memory: 'private' })],
];
/**
 * Options that the remedies name and no check can apply: the user chooses the value, another command has them, or the
 * host answers differently because of them.
 */
const FREE = /--clones$|--name|--replace|--network|--dir|--force|--follow/;

function expectOptionsWork<Change>(
  refusal: Refusal,
  options: readonly [RegExp, (match: RegExpExecArray) => Change][],
  again: (change: Change) => readonly Refusal[],
): void {
  const known = options.flatMap(([pattern, change]) => {
    const match = pattern.exec(refusal.remedy);
    return match === null ? [] : [{ option: match[0], change: change(match) }];
  });
  for (const { option, change } of known) expect(again(change), `${refusal.code} → ${option}`).toEqual([]);
  const named = refusal.remedy.match(/--[a-z-]+/g) ?? [];
  const unknown = named.filter(
    (option) => !FREE.test(option) && !known.some((entry) => entry.option.startsWith(option)),
  );
  expect(unknown, refusal.remedy).toEqual([]);
}

export function expectMigrationRemedyWorks(
  refusal: Refusal,
  again: (change: Partial<MigrationRequest>) => readonly Refusal[],
): void {
  expectOptionsWork(refusal, OF_MIGRATIONS, again);
}

export function expectForkRemedyWorks(
  refusal: Refusal,
  again: (change: Partial<ForkRequest>) => readonly Refusal[],
): void {
  expectOptionsWork(refusal, OF_FORKS, again);
}
