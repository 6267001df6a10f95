/** The memory of a host is promised once. The memory files are on a real tmpfs, because its free space is the point. */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { CloneMemoryWatch } from '../../../../src/agent/memory/clone-memory.js';
import { allocatedBytes, type MemoryPromise, MemoryRoom } from '../../../../src/agent/vm/memory-room.js';
import { memoryAvailableBytes } from '../../../../src/agent/vm/ram-files.js';
import { RamPlace } from '../../../../src/agent/vm/ram-place.js';
import type { MemoryBacking, VmSpec } from '../../../../src/domain/vm.js';

const MIB = 2 ** 20;
const FILES_MIB = 64;

let ramDir: string;
let place: RamPlace;
beforeEach(async () => {
  ramDir = await mkdtemp(join(tmpdir(), 'vmigrate-room-'));
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${FILES_MIB}m`, 'none', ramDir]);
  place = new RamPlace({ host: 'A', ramDir });
});
afterEach(async () => {
  await place.close();
  execFileSync('umount', [ramDir]);
  await rm(ramDir, { recursive: true });
});

function specOf(name: string, sizeMiB: number, backing: MemoryBacking = 'shared'): VmSpec {
  return { name, memory: { sizeBytes: sizeMiB * MIB, pageBytes: 4096, regions: [], backing } } as unknown as VmSpec;
}

/** A room with the VMs that `admit` has let in. Each has touched `usedBytes` of its memory. */
function roomWith(limits: ConstructorParameters<typeof MemoryRoom>[1] = {}) {
  const room = new MemoryRoom(place, limits);
  const vms = new Map<string, MemoryPromise>();
  room.addHolder(() => vms.values());
  const admit = (spec: VmSpec, usedBytes = 0): Promise<void> =>
    room.admit(spec, async () => {
      // Time in which another admission could look, if it were let in.
      await new Promise((resolve) => setTimeout(resolve, 20));
      const kind = { shared: 'file', private: 'process', image: 'clone' } as const;
      const { backing, pageBytes, sizeBytes } = spec.memory;
      vms.set(spec.name, { kind: kind[backing], pageBytes, promisedBytes: sizeBytes, usedBytes });
    });
  return { room, vms, admit };
}

describe('the file system of the memory files', () => {
  test('has room for one of two VMs that come at the same time, whatever they have touched', async () => {
    const { room, vms, admit } = roomWith();
    const outcomes = await Promise.allSettled([admit(specOf('first', 40)), admit(specOf('second', 40))]);
    expect(outcomes.map(({ status }) => status)).toEqual(['fulfilled', 'rejected']);
    expect(outcomes[1]).toMatchObject({
      reason: { code: 'NO_SPACE', message: expect.stringMatching(/second needs 40 MiB .* 24 MiB are neither used/) },
    });
    expect((await room.free()).fileBytes).toBe(24 * MIB);
    vms.delete('first');
    await admit(specOf('second', 40));
  });

  test('counts the pages that a VM has touched once', async () => {
    const path = join(ramDir, 'ram0.ram');
    await writeFile(path, Buffer.alloc(30 * MIB, 1));
    expect(allocatedBytes([{ path }, { path: `${path}.none` }])).toBe(30 * MIB);
    const { room, admit } = roomWith();
    await expect(admit(specOf('other', 40))).rejects.toMatchObject({ code: 'NO_SPACE' });
    room.addHolder(() => [{ kind: 'file', pageBytes: 4096, promisedBytes: 40 * MIB, usedBytes: 30 * MIB }]);
    expect((await room.free()).fileBytes).toBe(24 * MIB);
  });

  test('is never overestimated while a guest takes pages', async () => {
    const path = join(ramDir, 'ram0.ram');
    writeFileSync(path, Buffer.alloc(10 * MIB, 1));
    const { room } = roomWith();
    room.addHolder(() => {
      writeFileSync(path, Buffer.alloc(20 * MIB, 1));
      return [{ kind: 'file', pageBytes: 4096, promisedBytes: 40 * MIB, usedBytes: allocatedBytes([{ path }]) }];
    });
    expect((await room.free()).fileBytes).toBe(24 * MIB);
  });

  test('is promised to a fork until the fork has its image', async () => {
    const { room, admit } = roomWith();
    await room.hold('fork', 50 * MIB, 4096);
    await room.hold('fork', 50 * MIB, 4096);
    await expect(room.hold('another', 20 * MIB, 4096)).rejects.toMatchObject({ code: 'NO_SPACE' });
    await expect(admit(specOf('vm', 20))).rejects.toMatchObject({ code: 'NO_SPACE' });
    room.release('fork');
    await admit(specOf('vm', 20));
  });
});

test("the host's memory is promised to private guests, too", async () => {
  const { room, admit } = roomWith();
  const wholeMiB = Math.floor((await memoryAvailableBytes()) / MIB);
  await expect(admit(specOf('whole', wholeMiB + 1024, 'private'))).rejects.toMatchObject({ code: 'OUT_OF_MEMORY' });
  await admit(specOf('half', Math.floor(wholeMiB * 0.6), 'private'));
  await expect(admit(specOf('rest', Math.floor(wholeMiB * 0.6), 'private'))).rejects.toMatchObject({
    code: 'OUT_OF_MEMORY',
    remedy: expect.stringContaining('end a VM'),
  });
  expect((await room.free()).hostBytes).toBeLessThan(wholeMiB * 0.5 * MIB);
});

test('a budget bounds what one daemon promises, and an overcommit stretches it', async () => {
  const bounded = roomWith({ budgetBytes: 32 * MIB });
  await bounded.admit(specOf('small', 20));
  await expect(bounded.admit(specOf('more', 20))).rejects.toMatchObject({ code: 'OUT_OF_MEMORY' });
  const stretched = roomWith({ overcommit: 2 });
  await stretched.admit(specOf('one', 60));
  await stretched.admit(specOf('two', 60));
  await expect(stretched.admit(specOf('three', 60))).rejects.toMatchObject({ code: 'NO_SPACE' });
});

test('a failed creation promises nothing, and the next one has its turn', async () => {
  const { room, admit } = roomWith();
  await expect(room.admit(specOf('broken', 60), () => Promise.reject(new Error('broken')))).rejects.toThrow('broken');
  await admit(specOf('whole', 60));
});

test('VMs that have room are created at once, not one after the other', async () => {
  const { room } = roomWith();
  let begun = 0;
  const both = new Promise<void>((resolve) => {
    const create = async () => {
      begun++;
      if (begun === 2) resolve();
      await both;
    };
    void Promise.all([room.admit(specOf('a', 20), create), room.admit(specOf('b', 20), create)]);
  });
  await both;
  expect(begun).toBe(2);
});

describe('clones', () => {
  const budget = { cloneBudgetBytes: 100 * MIB, cloneOvercommit: 2 };

  test('have a budget of their own, and may be promised more than it', async () => {
    const { room, admit } = roomWith(budget);
    for (const name of ['a', 'b', 'c']) await admit(specOf(name, 60, 'image'));
    await expect(admit(specOf('d', 60, 'image'))).rejects.toMatchObject({
      code: 'OUT_OF_MEMORY',
      remedy: expect.stringContaining('clones.budget'),
    });
    expect(await room.free()).toMatchObject({ cloneBytes: 20 * MIB, fileBytes: FILES_MIB * MIB });
  });

  test.each([
    { what: 'that have written less than the budget', own: [30, 30, 30], available: 1024, ended: [] },
    { what: 'that have written more: the newest ends', own: [40, 40, 40], available: 1024, ended: ['c'] },
    { what: 'that have written far more: the newest end', own: [90, 30, 40], available: 1024, ended: ['c', 'b'] },
    { what: 'of a host that has hardly any memory left', own: [10, 10, 50], available: 30, ended: ['c'] },
  ])('$what', async ({ own, available, ended }) => {
    const { room } = roomWith(budget);
    const left = ['a', 'b', 'c'].map((name, index) => ({ name, ownBytes: (own[index] ?? 0) * MIB }));
    const gone: string[] = [];
    const watch = new CloneMemoryWatch({
      vms: { room, clonesWriting: () => left, endForMemory: async (name) => void gone.push(name) },
      log: { info: () => undefined, warn: () => undefined, error: () => undefined },
      availableBytes: () => Promise.resolve(available * MIB),
    });
    await watch.look();
    expect(gone).toEqual(ended);
  });

  test('end in the order of their age also if one of them cannot be ended', async () => {
    const gone: string[] = [];
    const watch = new CloneMemoryWatch({
      vms: {
        room: roomWith({ cloneBudgetBytes: 10 * MIB }).room,
        clonesWriting: () => ['old', 'middle', 'stuck'].map((name) => ({ name, ownBytes: 6 * MIB })),
        endForMemory: async (name) => {
          if (name === 'stuck') throw new Error('it does not end');
          gone.push(name);
        },
      },
      log: { info: () => undefined, warn: () => undefined, error: () => undefined },
      availableBytes: () => Promise.resolve(1024 * MIB),
    });
    await watch.look();
    expect(gone).toEqual(['middle', 'old']);
  });
});
