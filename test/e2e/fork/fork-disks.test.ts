/**
 * Disks of forked guests: each clone has its own disk, the parent continues in another file, and nobody writes to the
 * shared file.
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { QmpClient } from '../../../src/backends/qemu/qmp/client.js';
import { eventually } from '../../hosts/cluster.js';
import { ForkHost } from '../../hosts/fork-host.js';
import { socketDirectoryIn } from '../../support/qemu-user.js';

const SECTORS = 2048;
const SECTOR_BYTES = 512;
const APPEND = 'console=ttyS0 quiet vmg.workload=idle vmg.mb=16 vmg.disk=vda';

let forks: ForkHost;

beforeAll(async () => {
  forks = await ForkHost.start();
});
afterEach(() => forks.clear());
afterAll(() => forks.end());

function makeDisk(name: string, format = 'qcow2'): string {
  const path = join(forks.directory, `${name}.${format}`);
  rmSync(path, { force: true });
  execFileSync('qemu-img', ['create', '-q', '-f', format, path, '64M']);
  return path;
}

async function boot(name: string, disks: object[]): Promise<void> {
  await forks.boot({ name, extra: { disks, append: APPEND } });
}

/** Returns the latest number on a disk. Each sector has a number of its own. */
function latestNumber(path: string, format = 'qcow2'): number {
  const raw = join(forks.directory, 'read.raw');
  execFileSync('qemu-img', ['convert', '-U', '-f', format, '-O', 'raw', path, raw]);
  const bytes = readFileSync(raw);
  let latest = 0;
  for (let sector = 0; sector < SECTORS; sector++) {
    const text = bytes.toString('latin1', sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES).replaceAll('\0', '');
    if (text === '') continue;
    expect(Number(text) % SECTORS, `sector ${sector} holds ${text.trim()}`).toBe(sector);
    latest = Math.max(latest, Number(text));
  }
  return latest;
}

const hashOf = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');

async function writes(vm: string): Promise<void> {
  const count = async () => [...(await forks.host.serial(vm)).matchAll(/VMG DISK n=/g)].length;
  const before = await count();
  await eventually(`${vm} writes to its disk`, 120_000, async () => ((await count()) >= before + 2 ? true : undefined));
  expect(await forks.host.serial(vm)).not.toMatch(/VMG ERROR/);
}

describe.each(['qcow2', 'raw'] as const)('a %s disk', (format) => {
  test('is read-only for all from the fork point on, and merged when the image goes', async () => {
    const { vms, agent } = forks.host;
    const base = makeDisk('base', format);
    const shared = makeDisk('shared');
    await boot('writer', [
      { path: base, format },
      { path: shared, readOnly: true },
    ]);
    await writes('writer');
    const { clones, image } = await forks.fork(forks.request('writer'));
    const hash = hashOf(base);
    const overlay = vms.get('writer').spec.disks[0]!.path;
    expect(overlay).not.toBe(base);
    for (const name of ['writer', ...clones.map((clone) => clone.name)]) await writes(name);
    expect(hashOf(base)).toBe(hash);
    const atFork = latestNumber(base, format);
    expect(latestNumber(overlay)).toBeGreaterThan(atFork);
    for (const { name } of clones) {
      const disks = vms.get(name).spec.disks;
      expect(disks[1]!.path).toBe(shared);
      expect(latestNumber(disks[0]!.path)).toBeGreaterThan(atFork);
    }
    expect(agent.images.find(image).disks).toEqual([base, shared]);
    for (const { name } of clones) {
      await vms.stop(name, { isForced: true });
      await vms.stop(name, { isForced: true });
      expect(existsSync(vms.directoryOf(name))).toBe(false);
    }
    await agent.images.remove(image);
    expect(vms.get('writer').spec.disks[0]).toMatchObject({ path: base, format });
    expect(existsSync(overlay)).toBe(false);
    await writes('writer');
    await vms.stop('writer', { isForced: false });
    expect(latestNumber(base, format)).toBeGreaterThan(atFork);
  });
});

test('a clone with memory of its own keeps the disk that it lies on from being given back', async () => {
  const { vms, agent } = forks.host;
  const base = makeDisk('kept');
  await boot('keeper', [{ path: base }]);
  const { clones, image } = await forks.fork(forks.request('keeper', { memory: 'private', cloneCount: 1 }));
  const { name } = clones[0]!;
  expect(vms.view(vms.get(name)).image).toBeNull();
  expect((await agent.inventory.vmInventory(name)).fleetingDisks).toEqual(['disk0']);
  await expect(agent.images.remove(image)).rejects.toMatchObject({ code: 'CONFLICT' });
  await writes(name);
  await vms.stop(name, { isForced: true });
  await agent.images.remove(image);
  await writes('keeper');
});

test('a parent that has ended is merged with the image: its disk is as it left it', async () => {
  const { vms, agent } = forks.host;
  const base = makeDisk('ended');
  await boot('ender', [{ path: base }]);
  const { clones, image } = await forks.fork(forks.request('ender', { cloneCount: 1 }));
  const atFork = latestNumber(base);
  await writes('ender');
  await vms.stop('ender', { isForced: false });
  await vms.stop(clones[0]!.name, { isForced: true });
  await agent.images.remove(image);
  expect(latestNumber(base)).toBeGreaterThan(atFork);
  expect(readdirSync(forks.directory).filter((name) => name.startsWith('ended.qcow2.'))).toEqual([]);
});

test('a fork that is given up leaves the parent on its own file', async () => {
  const { vms, agent } = forks.host;
  const base = makeDisk('undone');
  await boot('undone', [{ path: base }]);
  const request = forks.request('undone');
  await agent.forks.prepareClones(request);
  await agent.forks.armParent(request.fork);
  await agent.forks.forkPoint(request.fork);
  await writes('undone');
  await agent.forks.discardFork(request.fork);
  expect(vms.get('undone').spec.disks[0]!.path).toBe(base);
  expect(readdirSync(forks.directory).filter((name) => name.startsWith('undone.qcow2.'))).toEqual([]);
  const before = latestNumber(base);
  await writes('undone');
  await eventually('its writes reach the file', 60_000, () => (latestNumber(base) > before ? true : undefined));

  // The daemon dies while the clones wait, and the guest powers off before the next one undoes the fork.
  const other = forks.request('undone');
  await agent.forks.prepareClones(other);
  const console = connect({ path: vms.serialPaths('undone').socket });
  console.resume().on('error', () => undefined);
  const monitor = await QmpClient.connect(join(socketDirectoryIn(vms.directoryOf('undone')), 'monitor.sock'), {
    timeoutMs: 10_000,
  });
  await forks.host.stop();
  console.write('poweroff\n');
  await eventually('the guest has ended', 60_000, async () =>
    (await monitor.execute('query-status')).status === 'shutdown' ? true : undefined,
  );
  monitor.close();
  console.destroy();
  await forks.host.start();
  expect(forks.traces()).toEqual([]);
  expect(readdirSync(forks.directory).filter((name) => name.startsWith('undone.qcow2.'))).toEqual([]);
  expect(forks.host.vms.list()).toMatchObject([{ name: 'undone', exit: { reason: 'guest-shutdown' } }]);
});

test('scratch disks are gone with their clones; two forks make a chain that is merged in any order', async () => {
  const { vms, agent } = forks.host;
  const base = makeDisk('chain');
  await boot('chained', [{ path: base }]);
  const first = await forks.fork(forks.request('chained', { cloneCount: 1, disks: 'scratch' }));
  const second = await forks.fork(forks.request('chained', { cloneCount: 1, disks: 'scratch' }));
  for (const { name } of [...first.clones, ...second.clones]) {
    await writes(name);
    expect(existsSync(vms.get(name).spec.disks[0]!.path)).toBe(false);
    await vms.stop(name, { isForced: true });
  }
  await agent.images.remove(first.image);
  await writes('chained');
  await agent.images.remove(second.image);
  await writes('chained');
  expect(vms.get('chained').spec.disks[0]!.path).toBe(base);
  expect(readdirSync(forks.directory).filter((name) => name.startsWith('chain.qcow2.'))).toEqual([]);
});

test('the next daemon undoes the second fork of a VM into the file of the first', async () => {
  const base = makeDisk('second');
  await boot('twice', [{ path: base }]);
  const first = await forks.fork(forks.request('twice', { cloneCount: 1 }));
  await forks.host.vms.stop(first.clones[0]!.name, { isForced: true });
  await writes('twice');
  const vm = () => forks.host.vms.get('twice');
  const overlay = vm().spec.disks[0]!.path;
  const hash = hashOf(base);
  const second = forks.request('twice', { cloneCount: 1 });
  const { agent } = forks.host;
  await agent.forks.prepareClones(second);
  await agent.forks.armParent(second.fork);
  // The daemon dies at the fork point: the disks have switched, and the record does not say so.
  await new Promise<void>((reached) => {
    Object.assign(forks.host.vms, { amend: () => new Promise(() => reached()) });
    agent.forks.forkPoint(second.fork).catch(() => undefined);
  });
  await forks.host.restart();
  const active = (await vm().process.disks.active()).get('disk0')?.path;
  expect([active, vm().spec.disks[0]!.path]).toEqual([overlay, overlay]);
  expect(hashOf(base)).toBe(hash);
  await writes('twice');
  expect(readdirSync(forks.directory).filter((name) => name.startsWith('second.qcow2.'))).toHaveLength(1);
  await forks.host.agent.source.unreserve('twice', 'job-1');
  await forks.host.agent.images.remove(first.image);
  expect(vm().spec.disks[0]!.path).toBe(base);
  await writes('twice');
});

test('of a parent that stays stopped, the clones go on from its disk', async () => {
  const { vms } = forks.host;
  const base = makeDisk('frozen');
  await boot('frozen', [{ path: base }]);
  await writes('frozen');
  const { clones } = await forks.fork(forks.request('frozen', { parentMode: 'stop' }));
  const hash = hashOf(base);
  for (const { name } of clones) await writes(name);
  expect(hashOf(base)).toBe(hash);
  for (const { name } of clones)
    expect(latestNumber(vms.get(name).spec.disks[0]!.path)).toBeGreaterThan(latestNumber(base));
});

test('memory runs on the disk of its moment alone, and the chain of a moved parent is flattened', async () => {
  const { vms, agent, registry } = forks.host;
  const { images } = agent;
  const base = makeDisk('moment');
  await boot('moment', [{ path: base }]);
  const request = forks.request('moment', { cloneCount: 1 });
  const { clones, image } = await forks.fork(request);
  const [plain, whole] = [join(forks.directory, 'plain.image'), join(forks.directory, 'whole.image')];
  await images.save(image, plain);
  await images.save(image, whole, { withDisks: true });
  await vms.stop(clones[0]!.name, { isForced: true });
  const atFork = latestNumber(base);
  const again = (namePrefix: string) => forks.request(null, { image, cloneCount: 1, namePrefix });
  const expectSound = async (name: string): Promise<void> => {
    await writes(name);
    // Right after its start the clone goes on with the number after the last one on its disk.
    const first = /VMG DISK n=(\d+)/.exec(await forks.host.serial(name));
    expect(Number(first?.[1])).toBeGreaterThanOrEqual(atFork);
    expect(latestNumber(vms.get(name).spec.disks[0]!.path)).toBeGreaterThan(atFork);
    await vms.stop(name, { isForced: true });
  };

  expect((await images.remove(image)).keptLayers).toMatchObject([{ path: base }]);
  await writes('moment');
  expect(latestNumber(base)).toBe(atFork);
  await images.load(plain);
  const loaded = await forks.fork(again('loaded'));
  await expectSound(loaded.clones[0]!.name);
  // The ended clone's exit code and log go only if the request says so.
  const asked = (change: object) => agent.forks.forkInventory({ ...again('loaded'), ...change });
  expect((await asked({})).namesOfEnded).toEqual(['loaded-0']);
  expect((await asked({ isReplacing: true })).namesOfEnded).toEqual([]);
  // The VM may have ended since pre-flight looked.
  await expect(agent.forks.prepareClones(again('loaded'))).rejects.toMatchObject({ code: 'CONFLICT' });
  expect(vms.get('loaded-0').state).toBe('stopped');
  const replacing = { ...again('loaded'), isReplacing: true };
  await agent.forks.prepareClones(replacing);
  expect(vms.get('loaded-0').state).toBe('incoming');
  await agent.forks.discardFork(replacing.fork);

  // A moved parent keeps its overlay: only its own host may merge it.
  const owner = await registry.owner('moment');
  const epoch = (owner?.epoch ?? 0) + 1;
  await registry.swapOwner('moment', owner?.epoch ?? null, { vm: 'moment', owner: 'B', epoch, session: null });
  const dropped = await images.remove(image, { isForced: false, isDroppingSaved: true });
  expect(dropped).toMatchObject({ mergedDisks: [], keptLayers: [{ reason: expect.stringContaining('belongs to B') }] });
  await registry.swapOwner('moment', epoch, { vm: 'moment', owner: 'A', epoch: epoch + 1, session: null });
  const overlay = vms.get('moment').spec.disks[0]!.path;
  expect(await images.flatten('moment')).toEqual({ vm: 'moment', mergedDisks: [overlay], keptLayers: [] });
  expect(vms.get('moment').spec.disks[0]!.path).toBe(base);
  expect(existsSync(overlay)).toBe(false);
  // The image that waited for the overlay has nothing left to wait for.
  expect(await images.remove(image)).toMatchObject({ mergedDisks: [], keptLayers: [] });
  expect(images.list()).toEqual([]);
  await writes('moment');
  await eventually('it writes to its own file', 60_000, () => (latestNumber(base) > atFork ? true : undefined));

  await expect(images.load(plain)).rejects.toMatchObject({ code: 'DISK_CHANGED' });
  await images.load(whole);
  const brought = await forks.fork(again('brought'));
  await expectSound(brought.clones[0]!.name);
  const own = images.find(image).disks[0]!;
  execFileSync('qemu-io', ['-f', 'qcow2', '-c', 'write 32M 64k', own]);
  const inventory = await agent.forks.forkInventory(again('late'));
  expect(inventory.diskProblem).toMatchObject({ code: 'DISK_CHANGED' });
  await expect(agent.forks.prepareClones(again('late'))).rejects.toMatchObject({ code: 'DISK_CHANGED' });
  expect(vms.has('late-0')).toBe(false);
  await images.remove(image);
});

test('the next daemon ends a merge that was interrupted, and no job moves the VM meanwhile', async () => {
  const base = makeDisk('merged');
  await boot('merged', [{ path: base }]);
  const { clones, image } = await forks.fork(forks.request('merged', { cloneCount: 1 }));
  await forks.host.agent.source.unreserve('merged', 'job-1');
  await forks.host.vms.stop(clones[0]!.name, { isForced: true });
  await writes('merged');
  const vm = () => forks.host.vms.get('merged');
  const overlay = vm().spec.disks[0]!.path;
  expect(overlay).not.toBe(base);
  const atFork = latestNumber(base);
  const remove = () => forks.host.agent.images.remove(image);

  // It dies when both files have the same content.
  await new Promise<void>((reached) => {
    Object.assign(forks.host.vms, { whilePaused: () => new Promise(() => reached()) });
    remove().catch(() => undefined);
  });
  await expect(forks.host.agent.source.reserve('merged', 'job-2')).rejects.toMatchObject({
    ...{ code: 'VM_BUSY', message: expect.stringContaining('are being merged') },
  });
  await forks.host.restart();
  expect(vm()).toMatchObject({ state: 'running', isMerging: false, spec: { disks: [{ path: overlay }] } });
  expect(await vm().process.disks.jobs()).toEqual([]);
  await writes('merged');

  // It dies when the disk has switched, before the record says so.
  const dies = () => Promise.reject(new Error('the daemon has died'));
  Object.assign(forks.host.vms, {
    whilePaused: async (_: string, work: () => Promise<void>) => {
      await vm().process.pause();
      Object.assign(forks.host.vms, { amend: dies });
      return work();
    },
  });
  await expect(remove()).rejects.toThrow('the daemon has died');
  await forks.host.restart();
  expect(vm()).toMatchObject({ state: 'running', isMerging: false, spec: { disks: [{ path: base }] } });
  expect(existsSync(overlay)).toBe(false);
  await writes('merged');
  await eventually('it writes to its own file', 60_000, () => (latestNumber(base) > atFork ? true : undefined));
  expect(await remove()).toMatchObject({ mergedDisks: [], keptLayers: [] });
  expect(vm().spec.disks[0]!.path).toBe(base);

  // A job of somebody else on the disk keeps the VM from being moved, too.
  const source = forks.host.agent.source;
  Object.assign(vm().process.disks, { jobs: async () => ['backup nightly'] });
  await expect(source.reserve('merged', 'job-3')).rejects.toMatchObject({
    ...{ code: 'VM_BUSY', message: expect.stringContaining('backup nightly') },
  });
  expect(vm().job).toBeNull();
});
