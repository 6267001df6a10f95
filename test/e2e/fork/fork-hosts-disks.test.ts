/**
 * A fork on two hosts of which only one sees the parent's disk, with the user's commands and real daemons: that host
 * serves the disk to the clones of the other.
 */
import { execFileSync } from 'node:child_process';
import { mkdirSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import type { ForkReport } from '../../../src/domain/fork.js';
import type { ImageView } from '../../../src/domain/image.js';
import { Cluster, eventually } from '../../hosts/cluster.js';
import { byteAt, diskContentIn, latestNumber } from '../../hosts/disk-content.js';
import { Guest } from '../../hosts/guest.js';

const WRITES_MS = 120_000;
/** Where the disk has bytes that no guest writes. */
const [MARK_MIB, MARK] = [32, 0x5a];
const APPEND = 'console=ttyS0 quiet no_timer_check vmg.workload=memtouch vmg.mb=16 vmg.restpct=80 vmg.disk=vda';

let cluster: Cluster;
let disks: string;

beforeAll(async () => {
  cluster = await Cluster.create();
  disks = join(cluster.directory, 'disks');
  mkdirSync(disks);
  const path = join(disks, 'web.qcow2');
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', path, '64M']);
  execFileSync('qemu-io', ['-f', 'qcow2', '-c', `write -P ${MARK} ${MARK_MIB}M 64k`, path]);
  // Only the daemon of B and its VMs see this mount.
  const [enter, pid] = ['nsenter', `${cluster.daemonPid('B')}`];
  execFileSync(enter, ['--target', pid, '--mount', 'mount', '-t', 'tmpfs', 'none', disks]);
  const extra = { append: APPEND, disks: [{ path, format: 'qcow2' }] };
  await Guest.start(cluster, 'A', { name: 'web', memoryMiB: 128, extra });
});
afterAll(() => cluster?.destroy());

async function writes(host: string, vm: string): Promise<void> {
  const log = () => new Guest(cluster, vm).serialLog(host);
  const count = async () => [...(await log()).matchAll(/VMG DISK n=/g)].length;
  const before = await count();
  await eventually(`${vm} writes to its disk`, WRITES_MS, async () =>
    (await count()) >= before + 2 ? true : undefined,
  );
  expect(await log()).not.toMatch(/VMG ERROR/);
}

async function expectDisk(host: string, vm: string): Promise<void> {
  await writes(host, vm);
  const content = await diskContentIn(join(cluster.hostDirectory(host), 'state/vms', vm), 'disk0');
  expect([vm, byteAt(content, MARK_MIB), latestNumber(content) > 0]).toEqual([vm, MARK, true]);
}

async function removeAll(image: string): Promise<void> {
  await cluster.must(cluster.vmctl('A', 'stop', '--image', image));
  await cluster.must(cluster.vmctl('A', 'image', 'rm', image, '--all-hosts'));
  for (const host of ['A', 'B']) expect(await cluster.api(host).get<ImageView[]>('/v1/images')).toEqual([]);
  expect(readdirSync(disks)).toEqual(['web.qcow2']);
}

const bothHosts = (report: ForkReport) => report.clones.map(({ name, host }) => [name, host]);

test('the clones of both hosts read the disk, and a clone on a served one does not move', async () => {
  const flags = ['--clones', '2', '--hosts', 'A,B', '--name', 'c'];
  const planned = await cluster.must(cluster.vfork('A', 'web', ...flags, '--dry-run'));
  expect(planned.stdout).toMatch(/disk disk0 is served by A to B, because B cannot use disk disk0 .*web\.qcow2/);
  const report = await cluster.json<ForkReport>('A', 'vfork', 'web', ...flags);
  expect(bothHosts(report)).toEqual([
    ['c-0', 'A'],
    ['c-1', 'B'],
  ]);
  await expectDisk('A', 'c-0');
  await expectDisk('B', 'c-1');
  await new Guest(cluster, 'c-1').expectClean('B');
  await writes('A', 'web');
  const moved = await cluster.vmigrate('B', 'c-1', 'A');
  expect(moved.code).not.toBe(0);
  expect(moved.stderr).toMatch(/c-1 reads disk disk0 from A/);

  await cluster.stopDaemon('A');
  await cluster.startDaemon('A');
  await cluster.expectAcquaintance('A');
  await expectDisk('B', 'c-1');
  await removeAll(report.image);
  await writes('A', 'web');
});

test('an image that is there already is forked to a host that does not see its disk', async () => {
  const first = await cluster.json<ForkReport>('A', 'vfork', 'web', '--clones', '1', '--name', 'd');
  const ofImage = ['--image', first.image];
  const there = await cluster.json<ForkReport>(
    'A',
    'vfork',
    ...ofImage,
    '--clones',
    '1',
    '--hosts',
    'B',
    '--name',
    'e',
  );
  expect(bothHosts(there)).toEqual([['e-0', 'B']]);
  await expectDisk('B', 'e-0');
  // The image is there now, and says who serves its disk.
  const more = await cluster.json<ForkReport>(
    'A',
    'vfork',
    ...ofImage,
    '--clones',
    '2',
    '--hosts',
    'A,B',
    '--name',
    'f',
  );
  expect(bothHosts(more)).toEqual([
    ['f-0', 'A'],
    ['f-1', 'B'],
  ]);
  await expectDisk('B', 'f-1');
  await removeAll(first.image);
  await expectDisk('A', 'web');
});
