/**
 * Moves of clones with the user's commands, between real daemons. One daemon is killed on the way. What one host needs
 * of an image's disks keeps the other from merging them.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { QmpClient } from '../../src/backends/qemu/qmp/client.js';
import type { ForkReport } from '../../src/domain/fork.js';
import type { FlattenReport, ImageRemoval, ImageView } from '../../src/domain/image.js';
import type { MigrationJobView } from '../../src/domain/job.js';
import type { MigrationReport } from '../../src/domain/migration.js';
import type { Refusal } from '../../src/domain/refusal.js';
import type { VmView } from '../../src/domain/vm.js';
import { answersAt } from '../hosts/arping.js';
import { Cluster, eventually, runCommand } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';
import { socketDirectoryIn } from '../support/qemu-user.js';

const SETTLE_MS = 120_000;
/** The parent's address. Its clones take the addresses after it (guest/init). */
const [ADDRESS, CLONE_ADDRESS] = ['10.84.0.10', '10.84.0.11'] as const;

let cluster: Cluster;
let parent: Guest;
let report: ForkReport;

beforeAll(async () => {
  cluster = await Cluster.create({ hasGuestNetwork: true });
  const busy = { memoryMiB: 128, touchMiB: 24, writePercent: 50, restPercent: 50 };
  parent = await Guest.start(cluster, 'A', { name: 'parent', address: ADDRESS, ...busy });
  report = await cluster.json<ForkReport>('A', 'vfork', '--clones', '3', 'parent', '--name', 'c');
  await eventually('the clones have their network', SETTLE_MS, async () => {
    const vms = await cluster.json<VmView[]>('A', 'vmctl', 'ps');
    return vms.every(({ identityIssue }) => identityIssue === null) ? true : undefined;
  });
});
afterAll(() => cluster?.destroy());

async function expectSound(host: string, guest: Guest): Promise<void> {
  await guest.expectProgress(host, 2);
  await guest.expectClean(host);
}

it('vmigrate moves one, by tcp of its own accord, and refuses what cannot be', async () => {
  const refused = await cluster.vmigrate('A', 'c-0', 'B', '--postcopy', '--shm', '--json');
  expect(refused.code).toBe(3);
  const { refusals } = JSON.parse(
    (await cluster.vmigrate('A', 'c-0', 'B', '--postcopy', '--shm', '--dry-run', '--json')).stdout,
  ) as { refusals: Refusal[] };
  expect(refusals.map(({ code }) => code)).toEqual(['TRANSPORT_UNAVAILABLE']);
  const guest = new Guest(cluster, 'c-0');
  await guest.expectProgress('A', 2);
  // QEMU keeps the same when the guest writes to its exit port.
  const monitor = await QmpClient.connect(
    join(socketDirectoryIn(join(cluster.hostDirectory('A'), 'state/vms/c-0')), 'monitor.sock'),
    {
      timeoutMs: 10_000,
    },
  );
  await monitor.executeUntyped('ringbuf-write', { device: 'chr-exit', data: '7\n' });
  monitor.close();
  const moved = await cluster.json<MigrationReport>('A', 'vmigrate', 'c-0', 'B', '--postcopy', '--verify-memory');
  expect(moved).toMatchObject({ vm: 'c-0', source: 'A', target: 'B', transport: 'tcp', mode: 'postcopy' });
  expect(moved.verified).toMatchObject({ isComplete: true, pages: (128 << 20) / 4096 });
  expect(moved.bytes.demand + moved.bytes.prefetch + moved.bytes.zeroSkipped).toBe(128 << 20);
  await expectSound('B', guest);
  // The clone answers at its own address, with the NIC that it got on A.
  expect(await answersAt(cluster, CLONE_ADDRESS)).toEqual([report.clones[0]?.mac]);
  expect(await guest.view('A')).toBeUndefined();
  expect(await guest.view('B')).toMatchObject({ state: 'running', image: null, identityIssue: null, exitCode: 7 });
  const [pid, ...others] = await cluster.qemuPids('B');
  expect(others).toEqual([]);
  process.kill(pid ?? Number.NaN, 'SIGKILL');
  await eventually('its end is noticed', 60_000, async () =>
    (await guest.view('B'))?.state === 'stopped' ? true : undefined,
  );
  expect(await guest.view('B')).toMatchObject({ exitCode: 7, exit: { reason: 'killed', exitCode: 7 } });
});

it('a source whose daemon is killed after the commit goes on when there is a next one', async () => {
  const guest = new Guest(cluster, 'c-1');
  await guest.expectProgress('A', 2);
  await cluster.stopDaemon('A');
  await cluster.startDaemon('A', { VMIGRATE_FAULT: 'before:drain=crash' });
  const { stdout } = await cluster.must(
    cluster.vmigrate('A', 'c-1', 'B', '--verify-memory', '--bandwidth', '16', '--detach', '--json'),
  );
  const { id } = JSON.parse(stdout) as MigrationJobView;
  await eventually('the daemon dies', 60_000, () => (cluster.isDaemonRunning('A') ? undefined : true));
  await cluster.startDaemon('A');
  const job = await cluster.json<MigrationJobView>('A', 'vmctl', 'job', id, '--follow');
  expect(job).toMatchObject({ state: 'done', isCommitted: true, report: { verified: { isComplete: true } } });
  await expectSound('B', guest);
});

it('the others run on, and the image stays for the one that is left', async () => {
  const vms = await cluster.json<VmView[]>('A', 'vmctl', 'ps');
  expect(vms.map(({ name }) => name).sort()).toEqual(['c-2', 'parent']);
  const [image] = await cluster.json<ImageView[]>('A', 'vmctl', 'images');
  expect(image).toMatchObject({ id: report.image, state: 'complete', clones: ['c-2'] });
  await expectSound('A', new Guest(cluster, 'c-2'));
  await expectSound('A', parent);
});

it('a disk layer that another host needs is not merged, nor one of a host that cannot be asked', async () => {
  const disk = join(cluster.directory, 'layer.qcow2');
  await cluster.must(runCommand('qemu-img', ['create', '-q', '-f', 'qcow2', disk, '16M']));
  const [a, b] = [() => cluster.api('A'), () => cluster.api('B')];
  // No guest is needed to name a disk, so none has to boot.
  const run = (disks: object[]) =>
    a().postText<VmView>('/v1/vms', JSON.stringify({ name: 'bare', accel: 'tcg', memory: { size: '32M' }, disks }));
  expect((await run([])).warnings).toEqual([expect.stringContaining('nothing to boot from')]);
  await a().post('/v1/vms/bare/stop', { force: true });
  expect((await run([{ path: disk }])).warnings).toBeUndefined();
  const { image } = await cluster.json<ForkReport>('A', 'vfork', 'bare', '--clones', '1', '--name', 'here');
  const saved = join(cluster.directory, 'bare.image');
  await a().post(`/v1/images/${image}/save`, { path: saved });
  await a().post(`/v1/images/${image}/stop`, { force: true });
  await b().post('/v1/images/load', { path: saved });
  await cluster.must(cluster.vfork('B', '--image', image, '--clones', '1', '--name', 'there'));

  const overlay = `${disk}.${image}`;
  const remove = () => a().delete<ImageRemoval>(`/v1/images/${image}`, { dropSaved: true });
  const flatten = () => a().post<FlattenReport>('/v1/vms/bare/flatten');
  const expectKept = async (reason: RegExp): Promise<void> => {
    for (const { mergedDisks, keptLayers } of [await remove(), await flatten()]) {
      expect(mergedDisks).toEqual([]);
      expect(keptLayers.map(({ reason: why }) => why).join()).toMatch(reason);
    }
    expect(existsSync(overlay)).toBe(true);
  };
  await expectKept(new RegExp(`image ${image} on B, VM there-0 on B`));
  await cluster.stopDaemon('B');
  await expectKept(/host B, which cannot be asked/);
  await cluster.startDaemon('B');
  await b().post(`/v1/images/${image}/stop`, { force: true });
  await b().delete(`/v1/images/${image}`);
  await eventually('A reaches B again', SETTLE_MS, async () =>
    (await flatten()).keptLayers.length === 0 ? true : undefined,
  );
  expect(existsSync(overlay)).toBe(false);
  expect(await remove()).toMatchObject({ mergedDisks: [], keptLayers: [] });
});
