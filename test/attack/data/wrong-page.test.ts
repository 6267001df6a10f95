/** Somebody on a data network where nothing protects memory changes a bit of it: a move that is verified says so. */
import { afterAll, afterEach, beforeAll, expect, it } from 'vitest';
import type { JobView } from '../../../src/domain/job.js';
import { EVERYTHING_ALLOWED } from '../../../src/domain/policy.js';
import type { DifferentChunk } from '../../../src/domain/verification.js';
import type { VmView } from '../../../src/domain/vm.js';
import { Cluster } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import { Relay } from './relay.js';

/** Within the first megabyte of pages. */
const FLIP_AT = 300_000;

let cluster: Cluster;
let guest: Guest;
let relay: Relay | null = null;

beforeAll(async () => {
  const security = { allow: EVERYTHING_ALLOWED, dataSecurity: 'none' };
  cluster = await Cluster.create({ daemonConfig: { security } });
  guest = await Guest.start(cluster, 'A', { name: 'victim', touchMiB: 32, memoryMiB: 128, restPercent: 75 });
});
afterEach(async () => {
  await relay?.stop();
  relay = null;
});
afterAll(() => cluster?.destroy());

const viewOn = async (host: string): Promise<VmView | undefined> =>
  (await cluster.json<VmView[]>(host, 'vmctl', 'ps')).find(({ name }) => name === guest.name);

it('one flipped bit of memory stops the VM for good, and the job names its place', async () => {
  relay = await Relay.start(cluster, 'A', 'B', { at: FLIP_AT, flips: 1 });
  const moved = await cluster.vmigrate('A', guest.name, 'B', '--tcp', '--verify-memory');
  expect(await relay.flipCount()).toBe(1);
  expect(moved.code).toBe(6);
  expect(moved.stderr).toMatch(/stands still on B: its memory is damaged/);

  const [job] = await cluster.json<JobView[]>('A', 'vmctl', 'jobs');
  expect(job).toMatchObject({ state: 'lost', isCommitted: true, error: { code: 'DAMAGED' } });
  const chunks: Partial<DifferentChunk>[] = [{ region: 'ram0', lengthBytes: 2 ** 21 }];
  expect(job).toMatchObject({ error: { details: { differentCount: 1, chunks } } });

  const there = await viewOn('B');
  expect(there?.state).toBe('paused');
  expect(there?.damage).toMatch(/memory that came from A is not what it was there \(ram0 at \d+\)/);
  const again = await cluster.vmigrate('B', guest.name, 'A', '--dry-run');
  expect(again.code).toBe(3);

  // The source keeps the memory of the switchover, and never runs the VM.
  expect((await viewOn('A'))?.state).toBe('departed');
  await cluster.stopDaemon('A');
  await cluster.stopDaemon('B');
  for (const host of ['B', 'A']) await cluster.startDaemon(host);
  expect(await viewOn('A')).toMatchObject({ state: 'departed' });
  expect(await viewOn('B')).toMatchObject({ state: 'paused', damage: there?.damage });

  await cluster.must(cluster.vmctl('B', 'stop', '--force', guest.name));
  await cluster.must(cluster.vmctl('A', 'stop', '--force', guest.name));
  expect(await viewOn('A')).toBeUndefined();
});
