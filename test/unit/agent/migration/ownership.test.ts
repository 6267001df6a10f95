/** What a target checks before it prepares a VM, and when it takes the VM over. */
import { describe, expect, test } from 'vitest';
import { refuseOtherEpoch, refuseOtherStart, takeOwnership } from '../../../../src/agent/migration/ownership.js';
import { FileRegistry } from '../../../../src/cluster/file.js';
import type { OwnerRecord } from '../../../../src/engine/ports/registry.js';
import { MemoryStore } from '../../durable/memory-store.js';
import { vm as inventory } from '../../planner/planner-facts.js';

const [FIRST, SECOND] = ['1'.repeat(32), '2'.repeat(32)];
const session = 'ab'.repeat(16);
const { spec } = inventory;
const record = (owner: string, epoch: number, incarnation?: string): OwnerRecord => ({
  ...{ vm: spec.name, owner, epoch, session: null },
  ...(incarnation === undefined ? {} : { incarnation }),
});
const ask = (present: OwnerRecord | null, epoch: number, incarnation?: string) => () =>
  refuseOtherStart(present, { spec, source: 'A', epoch, ...(incarnation === undefined ? {} : { incarnation }) }, 'B');

describe('a VM that comes', () => {
  test.each<[string, OwnerRecord | null]>([
    ['that this host does not know', null],
    ['of which it knows an earlier epoch', record('B', 6, SECOND)],
    ['that has left here in this epoch', record('A', 7, FIRST)],
    ['of which it knows the epoch from a build without incarnations', record('A', 7)],
  ])('is taken %s', (_, present) => {
    ask(present, 7, FIRST)();
    ask(present, 7)();
  });

  test.each<[string, OwnerRecord]>([
    ['its source runs from a backup: this host is the owner since', record('B', 8, FIRST)],
    ['two starts have had one epoch', record('B', 7, SECOND)],
    ['another VM of that name has left for its source', record('A', 7, SECOND)],
  ])('is refused if %s', (_, present) => {
    expect(ask(present, 7, FIRST)).toThrow(
      expect.objectContaining({
        code: 'OWNER_CHANGED',
        message: expect.stringMatching(/^B knows (another start|a later state) of /) as string,
        remedy: expect.stringContaining('run it again on A') as string,
      }),
    );
  });
});

test('the commit is refused if the record is that of another start in the expected epoch', async () => {
  const registry = await FileRegistry.on(new MemoryStore());
  await registry.swapOwner(spec.name, null, record('A', 7, FIRST));
  const commit = (incarnation: string) => registry.swapOwner(spec.name, 7, { ...record('B', 8, incarnation), session });
  await expect(commit(SECOND)).rejects.toMatchObject({ code: 'OWNER_CHANGED' });
  expect(await registry.owner(spec.name)).toEqual(record('A', 7, FIRST));
  await commit(FIRST);
  expect(await registry.owner(spec.name)).toEqual({ ...record('B', 8, FIRST), session });
});

test('a target keeps the incarnation, and an older record of another start does not hinder it', async () => {
  const registry = await FileRegistry.on(new MemoryStore());
  await registry.swapOwner(spec.name, null, record('B', 3, SECOND));
  const next = { ...record('B', 8, FIRST), session };
  await takeOwnership(registry, next, 3);
  await takeOwnership(registry, next, 3);
  expect(await registry.owner(spec.name)).toEqual(next);
});

test('the next epoch is one more than that of the announcement, whatever the source says later', () => {
  expect(() => refuseOtherEpoch({ spec, epoch: 7 }, 8)).not.toThrow();
  for (const epoch of [7, 9, 2 ** 48])
    expect(() => refuseOtherEpoch({ spec, epoch: 7 }, epoch)).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
});
