import { appendFile, mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { FileRegistry } from '../../../src/cluster/file.js';
import { FileLogStore } from '../../../src/durable/log-store.js';
import { RecordLog } from '../../../src/durable/record-log.js';
import type { OwnerRecord } from '../../../src/engine/ports/registry.js';
import { MemoryStore } from '../durable/memory-store.js';

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmigrate-registry-'));
});
afterEach(async () => {
  await rm(directory, { recursive: true, force: true });
});

const record = (vm: string, owner: string, epoch: number): OwnerRecord => ({ vm, owner, epoch, session: null });
const session = 'ab'.repeat(16);

async function reopened<T>(use: (registry: FileRegistry) => Promise<T>): Promise<T> {
  const registry = await FileRegistry.open(directory);
  try {
    return await use(registry);
  } finally {
    await registry.close();
  }
}

/** The records of all VMs that these tests put into a registry. */
async function ownersIn(registry: FileRegistry): Promise<OwnerRecord[]> {
  const records: OwnerRecord[] = [];
  for (const vm of ['vm1', 'vm2', 'vm3', 'vm4', 'busy']) {
    const owner = await registry.owner(vm);
    if (owner !== null) records.push(owner);
  }
  return records;
}

describe('compare-and-swap', () => {
  test('what was put is there after a restart', async () => {
    await reopened(async (registry) => {
      await registry.swapOwner('vm1', null, record('vm1', 'A', 1));
      await registry.swapOwner('vm2', null, record('vm2', 'A', 1));
      await registry.swapOwner('vm1', 1, { vm: 'vm1', owner: 'B', epoch: 2, session });
      await registry.removeOwner('vm2', 1);
    });
    await reopened(async (registry) => {
      expect(await ownersIn(registry)).toEqual([{ vm: 'vm1', owner: 'B', epoch: 2, session }]);
      expect(await registry.owner('vm2')).toBeNull();
    });
  });

  test('one of two that expect the same epoch wins', async () => {
    await reopened(async (registry) => {
      await registry.swapOwner('vm1', null, record('vm1', 'A', 1));
      const swaps = ['B', 'C', 'D'].map((owner) => registry.swapOwner('vm1', 1, record('vm1', owner, 2)));
      const results = await Promise.allSettled(swaps);
      expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'rejected']);
      expect(await registry.owner('vm1')).toEqual(record('vm1', 'B', 2));
    });
  });

  test.each([
    ['an epoch that is not the present one', 2, record('vm1', 'B', 3)],
    ['none, where there is one', null, record('vm1', 'B', 3)],
    ['an epoch that would not grow', 1, record('vm1', 'B', 1)],
  ])('refuses %s', async (_, expected, next) => {
    await reopened(async (registry) => {
      await registry.swapOwner('vm1', null, record('vm1', 'A', 1));
      await expect(registry.swapOwner('vm1', expected, next)).rejects.toMatchObject({ code: 'OWNER_CHANGED' });
      await expect(registry.removeOwner('vm1', 7)).rejects.toMatchObject({ code: 'OWNER_CHANGED' });
      expect(await registry.owner('vm1')).toEqual(record('vm1', 'A', 1));
    });
  });

  test('the epoch of a VM whose record has been removed is known, also after a restart and a rewrite', async () => {
    const store = new MemoryStore();
    const first = await FileRegistry.on(store);
    await first.swapOwner('vm1', null, record('vm1', 'A', 1));
    await first.swapOwner('vm1', 1, record('vm1', 'A', 7));
    expect(await first.lastEpoch('vm1')).toBe(7);
    await first.removeOwner('vm1', 7);
    expect(await first.lastEpoch('vm1')).toBe(7);
    expect(await first.lastEpoch('vm2')).toBe(0);
    const second = await FileRegistry.on(store);
    expect(await second.owner('vm1')).toBeNull();
    expect(await second.lastEpoch('vm1')).toBe(7);
    for (let epoch = 1; epoch <= 1_200; epoch++) {
      await second.swapOwner('busy', epoch === 1 ? null : epoch - 1, record('busy', 'A', epoch));
    }
    expect((await ownersIn(second)).map(({ vm }) => vm)).toEqual(['busy']);
    expect(store.bytes.toString().split('\n').length).toBeLessThan(1_100);
    const third = await FileRegistry.on(store);
    expect(await third.lastEpoch('vm1')).toBe(7);
    await third.swapOwner('vm1', null, record('vm1', 'A', 8));
    expect(await third.lastEpoch('vm1')).toBe(8);
  });

  test('VMs that have gone do not make it grow without end either', async () => {
    const store = new MemoryStore();
    const registry = await FileRegistry.on(store);
    for (let index = 0; index < 5_000; index++) {
      await registry.swapOwner(`vm${index}`, null, record(`vm${index}`, 'A', 1));
      await registry.removeOwner(`vm${index}`, 1);
    }
    expect(store.bytes.toString().split('\n').length).toBeLessThan(5_500);
    const again = await FileRegistry.on(store);
    expect(await again.lastEpoch('vm4999')).toBe(1);
    expect(await again.lastEpoch('vm0')).toBe(0);
  });

  test('thousands of changes do not make the file grow without end', async () => {
    const store = new MemoryStore();
    const registry = await FileRegistry.on(store);
    for (let epoch = 1; epoch <= 3_000; epoch++) {
      await registry.swapOwner('vm1', epoch === 1 ? null : epoch - 1, record('vm1', 'A', epoch));
    }
    expect(store.bytes.toString().split('\n').length).toBeLessThan(1_100);
    expect((await (await FileRegistry.on(store)).owner('vm1'))?.epoch).toBe(3_000);
  });

  test('a file written anew on disk takes what is put afterwards', async () => {
    const { log } = await RecordLog.open<unknown>(await FileLogStore.open(join(directory, 'log')), (json) => json);
    for (let count = 0; count < 5; count++) await log.append({ count });
    expect(await log.rewrite(() => [{ count: 4 }])).toBe(true);
    await log.append({ count: 5 });
    await log.close();
    const again = await RecordLog.open<unknown>(await FileLogStore.open(join(directory, 'log')), (json) => json);
    expect(again.records).toEqual([{ count: 4 }, { count: 5 }]);
    await again.log.close();
  });
});

describe('damage', () => {
  const path = () => join(directory, 'owners.log');
  beforeEach(async () => {
    await reopened(async (registry) => {
      for (const vm of ['vm1', 'vm2', 'vm3']) await registry.swapOwner(vm, null, record(vm, 'A', 1));
    });
  });

  test('a last line cut short is as if it had not been written', async () => {
    const whole = await readFile(path());
    for (let cut = 1; cut < 60; cut += 14) {
      await writeFile(path(), whole);
      await truncate(path(), whole.length - cut);
      await reopened(async (registry) => {
        expect((await ownersIn(registry)).map(({ vm }) => vm)).toEqual(['vm1', 'vm2']);
        // The next line begins at the end of the last whole line.
        await registry.swapOwner('vm4', null, record('vm4', 'A', 1));
      });
      await reopened(async (registry) => {
        expect((await ownersIn(registry)).map(({ vm }) => vm)).toEqual(['vm1', 'vm2', 'vm4']);
      });
    }
  });

  test('zeros after the last line, as a crash of the machine can leave them, are no line', async () => {
    await appendFile(path(), Buffer.alloc(100));
    await reopened(async (registry) => expect(await ownersIn(registry)).toHaveLength(3));
  });

  test('any byte changed, also the last newline, is CORRUPT, and file and line are named', async () => {
    const whole = await readFile(path());
    const newlines = [...whole.entries()].filter(([, byte]) => byte === 0x0a).map(([at]) => at);
    for (let at = 0; at < whole.length; at++) {
      const damaged = Buffer.from(whole);
      damaged[at] = damaged[at]! ^ 0x04;
      await writeFile(path(), damaged);
      const line = newlines.findIndex((newline) => at <= newline) + 1;
      await expect(FileRegistry.open(directory)).rejects.toMatchObject({
        code: 'CORRUPT',
        message: expect.stringContaining(`owners.log:${line}:`) as string,
      });
    }
  });

  test.each([
    ['epoch zero', { type: 'swap', record: record('vm9', 'A', 0) }],
    ['a session that is none', { type: 'swap', record: { ...record('vm9', 'A', 1), session: 'x' } }],
    ['no owner', { type: 'swap', record: { vm: 'vm9', epoch: 1, session: null } }],
    ['another type', { type: 'drop', vm: 'vm9' }],
    ['no object', 7],
  ])('a line with a good checksum and %s is CORRUPT', async (_, line) => {
    const { log } = await RecordLog.open<unknown>(await FileLogStore.open(path()), (json) => json);
    await log.append(line);
    await log.close();
    await expect(FileRegistry.open(directory)).rejects.toMatchObject({ code: 'CORRUPT' });
  });
});

describe('a full disk', () => {
  test('whatever part of a line was written is taken back, and the owner is who it was', async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(fc.option(fc.nat({ max: 120 })), { minLength: 1, maxLength: 12 }), async (rooms) => {
        const store = new MemoryStore();
        const registry = await FileRegistry.on(store);
        let epoch = 0;
        for (const room of rooms) {
          store.room = room;
          const swap = registry.swapOwner('vm1', epoch === 0 ? null : epoch, record('vm1', 'A', epoch + 1));
          if (room === null) await swap.then(() => epoch++);
          else await expect(swap).rejects.toMatchObject({ code: 'NO_SPACE' });
          expect((await registry.owner('vm1'))?.epoch ?? 0).toBe(epoch);
          const after = await FileRegistry.on(store);
          expect((await after.owner('vm1'))?.epoch ?? 0).toBe(epoch);
        }
      }),
      { numRuns: 50 },
    );
  });

  test('what cannot be taken back makes the registry say that it does not know', async () => {
    const store = new MemoryStore();
    const registry = await FileRegistry.on(store);
    await registry.swapOwner('vm1', null, record('vm1', 'A', 1));
    store.room = 1_000;
    store.canTruncate = false;
    await expect(registry.swapOwner('vm1', 1, record('vm1', 'B', 2))).rejects.toMatchObject({ code: 'CORRUPT' });
    await expect(registry.owner('vm1')).rejects.toMatchObject({ code: 'CORRUPT' });
    await expect(registry.swapOwner('vm2', null, record('vm2', 'A', 1))).rejects.toMatchObject({ code: 'CORRUPT' });
    // Reading the file again decides: in this case the whole line had been written.
    expect((await (await FileRegistry.on(store)).owner('vm1'))?.owner).toBe('B');
  });
});
