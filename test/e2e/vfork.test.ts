/**
 * `vfork` with the user's commands, against a real daemon: busy guests become many, and each of them proves its memory.
 */
import { existsSync } from 'node:fs';
import { readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { ForkPlan, ForkReport, WarmSetView } from '../../src/domain/fork.js';
import type { ImageView } from '../../src/domain/image.js';
import type { ForkJobView } from '../../src/domain/job.js';
import type { Refusal } from '../../src/domain/refusal.js';
import type { VmView } from '../../src/domain/vm.js';
import { checkClones } from '../hosts/clone-check.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { Guest, type GuestOptions } from '../hosts/guest.js';
import { Parking } from '../hosts/parking.js';

/** The number that two processors can handle in a test's time. `npm run bench -- vfork` does the same with 64. */
const MANY = Number(process.env.VMIGRATE_TEST_CLONES ?? 16);

const BEFORE_FILLING = 'before:fillImage';

let cluster: Cluster;

beforeAll(async () => {
  cluster = await Cluster.create({ hosts: ['A'] });
});
afterEach(async () => {
  await cluster.vmctl('A', 'pool', 'drain');
  for (const { name } of await ps()) await cluster.vmctl('A', 'stop', name, '--force');
  for (const { id } of await images()) await cluster.vmctl('A', 'image', 'rm', id);
});
afterAll(() => cluster?.destroy());

const ps = (): Promise<VmView[]> => cluster.json('A', 'vmctl', 'ps');
const images = (): Promise<ImageView[]> => cluster.json('A', 'vmctl', 'images');
const vfork = (...args: string[]): Promise<ForkReport> => cluster.json('A', 'vfork', ...args);
const start = (options: GuestOptions): Promise<Guest> =>
  Guest.start(cluster, 'A', { memoryMiB: 128, touchMiB: 32, restPercent: 50, ...options });

async function expectSound(name: string): Promise<void> {
  const guest = new Guest(cluster, name);
  await guest.expectProgress('A', 2);
  await guest.expectClean('A');
}

/** Checks that nothing of any fork is left but the VMs in `names`. */
async function expectOnly(...names: string[]): Promise<void> {
  expect((await ps()).map(({ name }) => name).sort()).toEqual([...names].sort());
  expect(await images()).toEqual([]);
  const folder = join(cluster.ramDirectory('A'), '.images');
  expect(existsSync(folder) ? await readdir(folder) : []).toEqual([]);
  expect(await cluster.qemuPids('A')).toHaveLength(names.length);
}

async function expectRefused(file: string, why: string): Promise<void> {
  const { code, stdout } = await cluster.vmctl('A', 'image', 'load', file, '--json');
  expect(code).not.toBe(0);
  expect(stdout).toContain(why);
  await expectOnly();
}

describe('vfork --clones', () => {
  it('eight copies of a busy guest run on, and so does the guest', async () => {
    const parent = await start({ name: 'web', restPercent: 0 });
    const report = await vfork('--clones', '8', 'web');
    expect(report).toMatchObject({ parent: 'web', failures: [], memoryBytes: 128 << 20 });
    expect(report.parentPauseMs).toBeGreaterThan(0);
    expect(report.clones.map(({ index }) => index)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    expect(new Set(report.clones.map(({ uuid }) => uuid)).size).toBe(8);
    expect(new Set(report.clones.map(({ vmGenerationId }) => vmGenerationId)).size).toBe(8);
    expect(report.bytes.copied + report.bytes.zeroSkipped).toBe(128 << 20);
    expect(report.bytes.deviceState).toBeGreaterThan(10_000);
    const vms = await ps();
    expect(vms).toHaveLength(9);
    for (const { name, uuid } of report.clones) {
      expect(vms.find((vm) => vm.name === name)).toMatchObject({ state: 'running', image: report.image, uuid });
      await expectSound(name);
    }
    await parent.expectProgress('A');
    await parent.expectClean('A');
    expect(await images()).toMatchObject([
      { id: report.image, state: 'complete', parent: 'web', clones: report.clones.map(({ name }) => name) },
    ]);
    expect(await cluster.vmctl('A', 'image', 'rm', report.image)).toMatchObject({ code: 1 });
    await cluster.must(cluster.vmctl('A', 'stop', '--image', report.image));
    await cluster.must(cluster.vmctl('A', 'image', 'rm', report.image));
    await expectOnly('web');
  });

  it('many at once: no page is wrong, and none is another', async () => {
    const parent = await start({ name: 'crowd', touchMiB: 16, restPercent: 0 });
    const report = await vfork('--clones', `${MANY}`, 'crowd');
    expect(report).toMatchObject({ failures: [] });
    expect(await checkClones(cluster, report.clones)).toEqual({ badPages: 0, distinctCount: MANY, shared: [] });
    await parent.expectClean('A');
  });

  it('a second fork after the first, and one of the image', async () => {
    await start({ name: 'twice' });
    const first = await vfork('--clones', '1', 'twice');
    const second = await vfork('--clones', '2', 'twice', '--name', 'other');
    expect(second.image).not.toBe(first.image);
    expect(second.clones.map(({ name }) => name)).toEqual(['other-0', 'other-1']);
    const again = await vfork('--clones', '1', '--image', first.image, '--name', 'again');
    expect(again).toMatchObject({ image: first.image, parentPauseMs: 0 });
    for (const { clones } of [first, second, again]) for (const { name } of clones) await expectSound(name);
    await expectSound('twice');
  });

  it('two at once: the second begins when the image of the first is complete', async () => {
    const parking = new Parking(cluster.directory, [BEFORE_FILLING]);
    await cluster.stopDaemon('A', 'SIGTERM');
    await cluster.startDaemon('A', parking.environment);
    await start({ name: 'queue' });
    const body = { vm: 'queue', cloneCount: 2 };
    // The first fork is held here until the others have been requested.
    await parking.arm(BEFORE_FILLING);
    const [first, second, third] = [
      await cluster.api('A').post<ForkJobView>('/v1/forks', body),
      await cluster.api('A').post<ForkJobView>('/v1/forks', body),
      await cluster.api('A').post<ForkJobView>('/v1/forks', body),
    ];
    for (const { state, waitsFor } of [second, third])
      expect({ state, waitsFor }).toEqual({ state: 'queued', waitsFor: first.id });
    expect(await cluster.json('A', 'vmctl', 'cancel', third.id)).toMatchObject({ state: 'cancelled' });
    await parking.parked(BEFORE_FILLING);
    await parking.release(BEFORE_FILLING);
    const names: string[] = [];
    for (const { id } of [first, second]) {
      const job = await cluster.json<ForkJobView>('A', 'vmctl', 'job', id, '--follow');
      expect(job).toMatchObject({ state: 'done', waitsFor: null });
      names.push(...job.clones);
    }
    expect(new Set(names).size).toBe(4);
    for (const name of ['queue', ...names]) await expectSound(name);
  });

  it('an image that was saved to a file runs when all else is gone; a damaged file is refused', async () => {
    await start({ name: 'saved' });
    const { image } = await vfork('--clones', '1', 'saved');
    const file = join(cluster.directory, 'saved.image');
    await cluster.must(cluster.vmctl('A', 'image', 'save', image, file));
    await cluster.must(cluster.vmctl('A', 'stop', '--image', image, '--force'));
    await cluster.must(cluster.vmctl('A', 'stop', 'saved', '--force'));
    await cluster.must(cluster.vmctl('A', 'image', 'rm', image));
    await expectOnly();

    const whole = await readFile(file);
    const damaged = join(cluster.directory, 'damaged.image');
    for (const [at, why] of [
      [0, 'SPEC_INVALID'],
      [Math.floor(whole.length / 2), 'CORRUPT'],
      [whole.length - 1, 'CORRUPT'],
    ] as const) {
      const bytes = Buffer.from(whole);
      bytes.writeUInt8(bytes.readUInt8(at) ^ 1, at);
      await writeFile(damaged, bytes);
      await expectRefused(damaged, why);
    }
    await writeFile(damaged, whole.subarray(0, whole.length - 4096));
    await expectRefused(damaged, 'CORRUPT');

    const loaded = await cluster.json<ImageView>('A', 'vmctl', 'image', 'load', file);
    expect(loaded).toMatchObject({ id: image, state: 'complete', parent: 'saved', clones: [] });
    const { clones } = await vfork('--clones', '2', '--image', image, '--name', 'again');
    expect(clones.map(({ name }) => name)).toEqual(['again-0', 'again-1']);
    for (const { name } of clones) await expectSound(name);
  });

  it('of waiting processes', async () => {
    await start({ name: 'hot' });
    const set = await cluster.json<WarmSetView>('A', 'vmctl', 'pool', 'warm', 'hot', '--clones', '3');
    expect(set).toMatchObject({ vm: 'hot', cloneCount: 3, state: 'ready', readyCount: 3 });
    const report = await vfork('--clones', '3', 'hot');
    expect(report).toMatchObject({ isWarm: true, failures: [] });
    for (const { name } of report.clones) await expectSound(name);
    await expectSound('hot');
  });

  it('--parent stop: the guest stays stopped, its memory is the image', async () => {
    await start({ name: 'frozen' });
    const report = await vfork('--clones', '2', 'frozen', '--parent', 'stop');
    expect(report.bytes.copied).toBe(0);
    for (const { name } of report.clones) await expectSound(name);
    expect((await ps()).find(({ name }) => name === 'frozen')?.state ?? 'stopped').toBe('stopped');
  });

  it('--wait: until all have ended, with their codes and logs', async () => {
    await start({
      name: 'job',
      extra: { append: 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=16 vmg.onfork=poweroff' },
    });
    const logs = join(cluster.directory, 'logs');
    const { code, stdout } = await cluster.vfork('A', '--clones', '3', 'job', '--wait', '--logs', logs, '--json');
    const { ends } = JSON.parse(stdout) as { ends: { name: string; exitCode: number; log: string }[] };
    // Each clone exits with its index, so one of three exits with 0.
    expect(ends.map(({ exitCode }) => exitCode)).toEqual([0, 1, 2]);
    expect(code).toBe(1);
    expect(await readFile(ends[2]?.log ?? '', 'utf8')).toMatch(/VMG EXIT code=2/);
  });
});

describe('before anything is touched', () => {
  it('--dry-run shows the plan', async () => {
    await start({ name: 'plan', workload: 'idle' });
    const { plan, refusals } = await cluster.json<{ plan: ForkPlan; refusals: Refusal[] }>(
      ...(['A', 'vfork', '--clones', '4', 'plan', '--dry-run'] as const),
    );
    expect(refusals).toEqual([]);
    expect(plan.steps.map(({ name }) => name)).toContain('forkPoint');
    await expectOnly('plan');
  });

  it('impossible numbers, names and hosts are refused', async () => {
    await start({ name: 'no', workload: 'idle' });
    for (const clones of ['0', '10000']) {
      const refused = await cluster.vfork('A', '--clones', clones, 'no', '--json');
      expect(refused.code).toBe(3);
      expect(refused.stdout).toContain('CLONE_COUNT');
    }
    expect(await cluster.vfork('A', '--clones', '-1', 'no')).toMatchObject({ code: 2 });
    expect(await cluster.vfork('A', '--clones', '1', 'nobody')).toMatchObject({ code: 1 });
    expect(await cluster.vfork('A', '--clones', '1', 'no', '--hosts', 'A,B')).toMatchObject({ code: 3 });
    const paused = await cluster
      .must(cluster.vmctl('A', 'pause', 'no'))
      .then(() => cluster.vfork('A', '--clones', '1', 'no'));
    expect(paused).toMatchObject({ code: 3, stderr: expect.stringMatching(/VM_NOT_RUNNING/) as string });
    await expectOnly('no');
  });
});

describe('the daemon', () => {
  it('takes an unfinished fork up again: the image fills on, all clones run', async () => {
    const parent = await start({ name: 'killed', memoryMiB: 256, touchMiB: 128 });
    await cluster.stopDaemon('A', 'SIGTERM');
    await cluster.startDaemon('A', { VMIGRATE_FAULT: 'before:fillImage=crash' });
    const { stdout } = await cluster.must(cluster.vfork('A', '--clones', '2', 'killed', '--detach', '--json'));
    const { id } = JSON.parse(stdout) as ForkJobView;
    await eventually('the daemon dies', 60_000, () => (cluster.isDaemonRunning('A') ? undefined : true));
    await cluster.startDaemon('A');
    const job = await cluster.json<ForkJobView>('A', 'vmctl', 'job', id, '--follow');
    expect(job).toMatchObject({ state: 'done', isCommitted: true, report: { failures: [] } });
    for (const name of job.clones) await expectSound(name);
    expect(job.clones).toHaveLength(2);
    await parent.expectProgress('A');
    await parent.expectClean('A');
  });

  it('undoes one that was not committed: the guest runs on alone', async () => {
    const parent = await start({ name: 'undone' });
    await cluster.stopDaemon('A', 'SIGTERM');
    await cluster.startDaemon('A', { VMIGRATE_FAULT: 'before:commitFork=crash' });
    const { stdout } = await cluster.must(cluster.vfork('A', '--clones', '2', 'undone', '--detach', '--json'));
    const { id } = JSON.parse(stdout) as ForkJobView;
    await eventually('the daemon dies', 60_000, () => (cluster.isDaemonRunning('A') ? undefined : true));
    await cluster.startDaemon('A');
    const job = await cluster.vmctl('A', 'job', id, '--follow', '--json');
    expect(JSON.parse(job.stdout)).toMatchObject({ state: 'failed', clones: [] });
    await parent.expectProgress('A');
    await parent.expectClean('A');
    await expectOnly('undone');
  });
});
