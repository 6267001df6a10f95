/** The copy of the owner records in the memory directory, which no backup of the state directory brings back. */
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { FileRegistry } from '../../../src/cluster/file.js';
import { OwnerMirror } from '../../../src/cluster/mirror.js';
import type { MigrationError } from '../../../src/domain/errors.js';
import { OWNERS_MIRROR } from '../../../src/durable/state-format.js';
import type { OwnerRecord } from '../../../src/engine/ports/registry.js';
import { MemoryStore } from '../durable/memory-store.js';

const session = 'ab'.repeat(16);
const [FIRST, SECOND] = ['1'.repeat(32), '2'.repeat(32)];
const record = (owner: string, epoch: number, more: Partial<OwnerRecord> = {}): OwnerRecord => ({
  ...{ vm: 'web', owner, epoch, session: null, incarnation: FIRST },
  ...more,
});

let ramDir: string;
let store: MemoryStore;
let warnings: MigrationError[];
beforeEach(async () => {
  ramDir = await mkdtemp(join(tmpdir(), 'vmg-mirror-'));
  store = new MemoryStore();
  warnings = [];
});
afterEach(() => rm(ramDir, { recursive: true, force: true }));

async function life<T>(use: (registry: FileRegistry) => Promise<T>): Promise<T> {
  const mirror = await OwnerMirror.open(ramDir, (error) => warnings.push(error));
  const registry = await FileRegistry.on(store, mirror);
  try {
    return await use(registry);
  } finally {
    await registry.close();
  }
}

/** What the log is after `use`, with `restored` in its place when the next life begins. */
async function lifeThenBackup(use: (registry: FileRegistry) => Promise<void>, backup: Buffer): Promise<void> {
  await life(use);
  store.bytes = Buffer.from(backup);
}

describe('a copy of owners.log from before', () => {
  test('the commit is put right', async () => {
    await life((registry) => registry.swapOwner('web', null, record('A', 1)));
    const backup = store.bytes;
    await lifeThenBackup((registry) => registry.swapOwner('web', 1, record('B', 2, { session })), backup);
    await life(async (registry) => {
      expect(registry.restored).toEqual(['web']);
      expect(await registry.owner('web')).toEqual(record('B', 2, { session }));
    });
    // It is in the log from then on.
    await rm(join(ramDir, OWNERS_MIRROR));
    await life(async (registry) => {
      expect(registry.restored).toEqual([]);
      expect(await registry.owner('web')).toMatchObject({ owner: 'B', epoch: 2 });
    });
  });

  test('the announcement of a move is put right', async () => {
    await life((registry) => registry.swapOwner('web', null, record('A', 1)));
    const backup = store.bytes;
    await lifeThenBackup((registry) => registry.announceMove('web', 1, session), backup);
    await life(async (registry) => expect(await registry.owner('web')).toMatchObject({ leaving: session }));
  });

  test('the removal does not bring the VM back', async () => {
    await life((registry) => registry.swapOwner('web', null, record('A', 1)));
    const backup = store.bytes;
    await lifeThenBackup((registry) => registry.removeOwner('web', 1), backup);
    await life(async (registry) => {
      expect(await registry.owner('web')).toBeNull();
      expect(await registry.lastEpoch('web')).toBe(1);
    });
  });

  test('another start in the same epoch is told apart by its incarnation', async () => {
    await life((registry) => registry.swapOwner('web', null, record('A', 1)));
    const backup = store.bytes;
    store = new MemoryStore();
    await rm(join(ramDir, OWNERS_MIRROR));
    await lifeThenBackup(
      (registry) => registry.swapOwner('web', null, record('A', 1, { incarnation: SECOND })),
      backup,
    );
    await life(async (registry) => expect(await registry.owner('web')).toMatchObject({ incarnation: SECOND }));
  });
});

test('a lost log is written again', async () => {
  await lifeThenBackup(async (registry) => {
    await registry.swapOwner('web', null, record('A', 1));
    await registry.swapOwner('db', null, record('A', 4, { vm: 'db' }));
    await registry.removeOwner('db', 4);
  }, Buffer.alloc(0));
  await life(async (registry) => {
    expect(await registry.owner('web')).toEqual(record('A', 1));
    expect(await registry.lastEpoch('db')).toBe(4);
  });
});

test('a log that is ahead, because a crash came before the copy, is followed', async () => {
  await life((registry) => registry.swapOwner('web', null, record('A', 1)));
  const ahead = await FileRegistry.on(store);
  await ahead.swapOwner('web', 1, record('B', 2, { session }));
  await ahead.swapOwner('db', null, record('A', 1, { vm: 'db' }));
  const backup = Buffer.from(store.bytes);
  await life(async (registry) => {
    expect(registry.restored).toEqual([]);
    expect(await registry.owner('web')).toMatchObject({ owner: 'B', epoch: 2 });
  });
  // The copy has both now.
  store.bytes = backup.subarray(0, 0);
  await life(async (registry) => {
    expect(await registry.owner('web')).toMatchObject({ owner: 'B', epoch: 2 });
    expect(await registry.owner('db')).toMatchObject({ owner: 'A', epoch: 1 });
  });
});

test('a damaged copy is begun anew, with a warning, and its bytes decide nothing', async () => {
  await life((registry) => registry.swapOwner('web', null, record('A', 1)));
  await writeFile(join(ramDir, OWNERS_MIRROR), 'no log\n'.repeat(9));
  await life(async (registry) => {
    expect(warnings).toEqual([expect.objectContaining({ code: 'CORRUPT' })]);
    expect(await registry.owner('web')).toEqual(record('A', 1));
  });
  store.bytes = Buffer.alloc(0);
  await life(async (registry) => expect(await registry.owner('web')).toEqual(record('A', 1)));
});

test('a copy that cannot be written keeps no change from happening, and warns once', async () => {
  const mirrored = new MemoryStore();
  const mirror = await OwnerMirror.on(
    async () => mirrored,
    (error) => warnings.push(error),
  );
  const registry = await FileRegistry.on(store, mirror);
  mirrored.room = 10;
  await registry.swapOwner('web', null, record('A', 1));
  mirrored.room = 10;
  await registry.swapOwner('web', 1, record('B', 2, { session }));
  expect(warnings).toEqual([expect.objectContaining({ code: 'NO_SPACE' })]);
  expect(await registry.owner('web')).toMatchObject({ owner: 'B' });
});

test('what could not be copied is copied with the next change for which there is room', async () => {
  const mirrored = new MemoryStore();
  const mirrorOf = () =>
    OwnerMirror.on(
      async () => mirrored,
      (error) => warnings.push(error),
    );
  const registry = await FileRegistry.on(store, await mirrorOf());
  await registry.swapOwner('web', null, record('A', 1));
  const backup = Buffer.from(store.bytes);
  mirrored.room = 0;
  await registry.swapOwner('web', 1, record('B', 2, { session }));
  mirrored.room = null;
  await registry.swapOwner('other', null, record('A', 1, { vm: 'other' }));
  store.bytes = backup;
  expect(await (await FileRegistry.on(store, await mirrorOf())).owner('web')).toMatchObject({ owner: 'B', epoch: 2 });
});

test('it does not grow without end', async () => {
  const mirrored = new MemoryStore();
  const mirrorOf = () =>
    OwnerMirror.on(
      async () => mirrored,
      () => undefined,
    );
  const registry = await FileRegistry.on(store, await mirrorOf());
  for (let index = 0; index < 4_500; index++) {
    const vm = `vm${index}`;
    await registry.swapOwner(vm, null, record('A', 1, { vm }));
    await registry.removeOwner(vm, 1);
  }
  const lines = () => mirrored.bytes.toString().split('\n').length;
  expect(lines()).toBeLessThan(6_000);
  await FileRegistry.on(store, await mirrorOf());
  // No more than the registry remembers itself.
  expect(lines()).toBeLessThan(4_200);
});

test('a copy that cannot be opened is done without', async () => {
  await mkdir(join(ramDir, OWNERS_MIRROR));
  await life((registry) => registry.swapOwner('web', null, record('A', 1)));
  expect(warnings).toHaveLength(1);
  await life(async (registry) => expect(await registry.owner('web')).toEqual(record('A', 1)));
});
