/**
 * The daemon is killed at every step of a fork, as by `kill -9`, and restarted. Before the commit the guest continues
 * alone and unprotected, and nothing of the fork is left. After the commit the clones run, and neither they nor the
 * guest ever read a missing page. An image that can never be complete ends only its clones.
 */
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { readdir, readFile, statfs, truncate } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { QmpClient } from '../../../src/backends/qemu/qmp/client.js';
import type { ImageView } from '../../../src/domain/image.js';
import type { ForkJobView } from '../../../src/domain/job.js';
import type { VmView } from '../../../src/domain/vm.js';
import { Cluster, eventually } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import { AGENT_POINTS_AFTER_COMMIT, AGENT_POINTS_BEFORE_COMMIT, Parking } from '../../hosts/parking.js';
import { socketDirectoryIn } from '../../support/qemu-user.js';

const BEFORE_COMMIT = ['before:reserveParent', ...AGENT_POINTS_BEFORE_COMMIT];
const AFTER_COMMIT = [
  ...AGENT_POINTS_AFTER_COMMIT,
  ...['after:commitFork', 'before:runClones', 'after:runClones', 'before:fillImage', 'before:releaseParent'],
];
const CLONES = 2;
const ENDED_MS = 60_000;
/** The memory files are on a file system of their own. */
const RAM_MIB = 4096;

let cluster: Cluster;
let parking: Parking;
let parent: Guest;

beforeAll(async () => {
  cluster = await Cluster.create({ hosts: ['A'] });
  await cluster.stopDaemon('A');
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${RAM_MIB}m`, 'none', cluster.ramDirectory('A')]);
  parking = new Parking(cluster.directory, [...BEFORE_COMMIT, ...AFTER_COMMIT]);
  await restart();
});
afterEach(async () => {
  await parking.releaseAll();
  if (!cluster.isDaemonRunning('A')) await restart();
  for (const { name, image } of await vms()) if (image !== null) await cluster.vmctl('A', 'stop', name, '--force');
  for (const { id } of await images()) await cluster.vmctl('A', 'image', 'rm', id);
});
afterAll(async () => {
  // The unmount is lazy, because QEMUs still have files there.
  if (cluster !== undefined) execFileSync('umount', ['--lazy', cluster.ramDirectory('A')]);
  await cluster?.destroy();
});

const vms = (): Promise<VmView[]> => cluster.api('A').get('/v1/vms');
const images = (): Promise<ImageView[]> => cluster.api('A').get('/v1/images');

async function restart(environment = parking.environment): Promise<void> {
  await cluster.stopDaemon('A');
  await cluster.startDaemon('A', environment);
}

/** Starts a fork of the parent. Resolves when its daemon is parked at `point`. */
async function forkUpTo(point: string): Promise<string> {
  await parking.arm(point);
  const { id } = await cluster.api('A').post<ForkJobView>('/v1/forks', { vm: parent.name, cloneCount: CLONES });
  await parking.parked(point);
  return id;
}

function ended(id: string): Promise<ForkJobView> {
  return eventually(`job ${id} has ended`, ENDED_MS, async () => {
    const job = await cluster.api('A').get<ForkJobView>(`/v1/jobs/${id}`);
    return ['done', 'failed', 'lost', 'needsRecovery'].includes(job.state) ? job : undefined;
  });
}

/** Returns the job of a fork whose daemon was killed at `point`, resumed by another daemon. */
async function killedAt(point: string, meanwhile: () => Promise<void> = async () => undefined): Promise<ForkJobView> {
  const id = await forkUpTo(point);
  await cluster.stopDaemon('A');
  await parking.release(point);
  await meanwhile();
  await restart();
  return ended(id);
}

/** The kernel shows the flag `uw` for a mapping whose writes are held back. */
async function isProtected(pid: number): Promise<boolean> {
  const smaps = await readFile(`/proc/${pid}/smaps`, 'utf8');
  return /^VmFlags:.* uw( |$)/m.test(smaps);
}

function namesIn(path: string): Promise<string[]> {
  return existsSync(path) ? readdir(path) : Promise.resolve([]);
}

async function expectNothingLeft(): Promise<void> {
  const state = join(cluster.hostDirectory('A'), 'state');
  expect(await vms()).toMatchObject([{ name: parent.name, state: 'running', job: null }]);
  expect(await namesIn(join(state, 'vms'))).toHaveLength(1);
  expect(await images()).toEqual([]);
  expect(await namesIn(join(cluster.ramDirectory('A'), '.images'))).toEqual([]);
  for (const folder of ['images', 'forks']) expect(await namesIn(join(state, folder))).toEqual([]);
  const pids = await cluster.qemuPids('A');
  expect(pids).toHaveLength(1);
  for (const pid of pids) expect(await isProtected(pid)).toBe(false);
}

describe('a daemon that is killed', () => {
  beforeAll(async () => {
    // The memory is so large that much of it remains to be copied when the clones run.
    parent = await Guest.start(cluster, 'A', { name: 'parent', memoryMiB: 256, touchMiB: 160, writePercent: 50 });
  });
  afterAll(() => cluster.vmctl('A', 'stop', parent.name, '--force'));

  test.each(BEFORE_COMMIT)('before the commit, %s: the guest runs on alone', async (point) => {
    const job = await killedAt(point);
    expect(job).toMatchObject({ state: 'failed', isCommitted: false, clones: [], error: { code: 'STEP_FAILED' } });
    await parent.expectProgress('A', 2);
    await expectNothingLeft();
  });

  test('before the commit has lost nothing', () => parent.expectClean('A'));

  test.each(AFTER_COMMIT)('after the commit, %s: the clones run, and nobody lacks a page', async (point) => {
    const job = await killedAt(point);
    expect(job).toMatchObject({ state: 'done', isCommitted: true, error: null });
    expect(job.clones).toHaveLength(CLONES);
    expect(job.report?.clones.map(({ name }) => name)).toEqual(job.clones);
    for (const name of [parent.name, ...job.clones]) {
      const guest = new Guest(cluster, name);
      await guest.expectProgress('A', 2);
      await guest.expectClean('A');
    }
    expect(await images()).toMatchObject([{ state: 'complete', clones: job.clones }]);
    for (const pid of await cluster.qemuPids('A')) expect(await isProtected(pid)).toBe(false);
  });
});

describe('a daemon that is killed between the commit and the go', () => {
  beforeAll(async () => {
    parent = await Guest.start(cluster, 'A', { name: 'patient', memoryMiB: 192, touchMiB: 96, writePercent: 50 });
  });
  afterAll(() => cluster.vmctl('A', 'stop', parent.name, '--force'));

  const others = async (): Promise<VmView[]> => (await vms()).filter(({ name }) => name !== parent.name);

  /** QEMU's own word for the state of a VM, by the socket for users. */
  async function statusOf(name: string): Promise<string> {
    const path = join(socketDirectoryIn(join(cluster.hostDirectory('A'), 'state', 'vms', name)), 'monitor.sock');
    const monitor = await QmpClient.connect(path, { timeoutMs: 10_000 });
    const { status } = await monitor.execute('query-status');
    monitor.close();
    return status;
  }

  test('twice: no clone runs, ends or counts as paused before its job goes on', async () => {
    const id = await forkUpTo('agent:fork:committed');
    const names = (await others()).map(({ name }) => name);
    expect(names).toHaveLength(CLONES);
    await cluster.stopDaemon('A');
    await parking.release('agent:fork:committed');
    for (const name of names) expect(await statusOf(name)).toBe('paused');
    await parking.arm('agent:fork:run');
    await restart();
    await parking.parked('agent:fork:run');
    await parent.expectProgress('A', 2);
    expect((await others()).map(({ state }) => state)).toEqual(Array(CLONES).fill('incoming'));
    for (const name of names) {
      expect(await statusOf(name)).toBe('paused');
      expect(await new Guest(cluster, name).serialLog('A')).toBe('');
    }
    await cluster.stopDaemon('A');
    await parking.release('agent:fork:run');
    await restart();
    const job = await ended(id);
    expect(job).toMatchObject({ state: 'done', clones: names, report: { failures: [] } });
    for (const name of [parent.name, ...names]) {
      await new Guest(cluster, name).expectProgress('A', 2);
      await new Guest(cluster, name).expectClean('A');
    }
  });

  test('and whose clone is killed meanwhile: the others run, and the report lists it', async () => {
    let name = '';
    const job = await killedAt('agent:fork:run', async () => {
      const pids = await cluster.qemuPids('A');
      const record = JSON.parse(
        await readFile(join(cluster.hostDirectory('A'), 'state', 'vms', await firstClone(), 'record.json'), 'utf8'),
      ) as { spec: { name: string }; process: { pid: number } };
      name = record.spec.name;
      expect(pids).toContain(record.process.pid);
      process.kill(record.process.pid, 'SIGKILL');
    });
    expect(job).toMatchObject({ state: 'done', report: { failures: [{ name }] } });
    expect(job.clones).toHaveLength(CLONES - 1);
    expect((await others()).find((vm) => vm.name === name)).toMatchObject({ state: 'stopped' });
    for (const clone of job.clones) await new Guest(cluster, clone).expectProgress('A', 2);
  });

  async function firstClone(): Promise<string> {
    const names = await readdir(join(cluster.hostDirectory('A'), 'state', 'vms'));
    return names.filter((name) => name !== parent.name).sort()[0] ?? '';
  }
});

describe('an image that can never be complete', () => {
  const imageFile = async (): Promise<string> => {
    const folder = join(cluster.ramDirectory('A'), '.images');
    const [image = ''] = await readdir(folder);
    return join(folder, image, 'ram0.ram');
  };

  beforeAll(async () => {
    // The memory is so large that the copy is far from complete when the clones run.
    parent = await Guest.start(cluster, 'A', { name: 'large', memoryMiB: 768, touchMiB: 640 });
    // The guest's own pages are allocated, whatever happens to the file system.
    execFileSync('fallocate', ['-l', '768M', join(cluster.ramDirectory('A'), parent.name, 'ram0.ram')]);
  });

  async function expectLost(job: ForkJobView, cause: string): Promise<void> {
    expect(job).toMatchObject({
      state: 'lost',
      isCommitted: true,
      error: { code: 'VM_LOST', cause: { code: cause } },
    });
    expect(await cluster.vmctl('A', 'job', job.id, '--follow')).toMatchObject({ code: 6 });
    const [image] = await images();
    expect(image).toMatchObject({ state: 'failed', clones: [], allocatedBytes: 0 });
    const clones = (await vms()).filter(({ name }) => name !== parent.name);
    expect(clones.map(({ state }) => state)).toEqual(Array(CLONES).fill('stopped'));
    // None of the clones has read a zero instead of data, or any other wrong byte.
    for (const { name } of clones) expect(await new Guest(cluster, name).serialLog('A')).not.toMatch(/VMG BAD/);
    await cluster.must(cluster.vmctl('A', 'stop', '--image', image?.id ?? ''));
    await cluster.must(cluster.vmctl('A', 'image', 'rm', image?.id ?? ''));
    await parent.expectProgress('A', 2);
    await expectNothingLeft();
  }

  test('because there is no room: its clones are ended, and the guest runs on', async () => {
    // The file system is filled before the clones run, because from then on the copy is as fast as a processor allows.
    const point = 'agent:fork:load';
    const id = await forkUpTo(point);
    const { blocks, bfree, bsize } = await statfs(cluster.ramDirectory('A'));
    const resize = (bytes: number) => execFileSync('mount', ['-o', `remount,size=${bytes}`, cluster.ramDirectory('A')]);
    // There is space for half of the image. Until the commit the fork has space, and then it runs out.
    resize((blocks - bfree) * bsize + 384 * 2 ** 20);
    try {
      await parking.release(point);
      await expectLost(await ended(id), 'NO_SPACE');
    } finally {
      resize(RAM_MIB * 2 ** 20);
    }
  });

  test('because its file was cut while no daemon looked', async () => {
    // The daemon ends itself at that point. A kill by the test might come after the image is complete.
    await restart({ VMIGRATE_FAULT: 'agent:fork:committed=crash' });
    const { id } = await cluster.api('A').post<ForkJobView>('/v1/forks', { vm: parent.name, cloneCount: CLONES });
    await eventually('the daemon dies', ENDED_MS, () => (cluster.isDaemonRunning('A') ? undefined : true));
    await truncate(await imageFile(), 2 ** 20);
    await restart();
    await expectLost(await ended(id), 'REGION_CHANGED');
    await parent.expectClean('A');
  });
});
