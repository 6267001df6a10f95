/**
 * Memory is promised once, with real QEMUs: the guest that has the promise never pays for one that comes later. A host
 * that is full all the same delays a VM that arrives, and costs it nothing.
 */
import { execFileSync } from 'node:child_process';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { hostFacts } from '../../src/agent/inventory/host-facts.js';
import { isFinal, type JobView } from '../../src/domain/job.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { fillTmpfs, freeTmpfs } from '../hosts/full-file-system.js';
import { Guest } from '../hosts/guest.js';
import { Parking } from '../hosts/parking.js';
import { VmHost, vmSpec } from '../hosts/vm-host.js';

const MIB = 2 ** 20;
/** B has room for one of the guests. */
const GUEST_MIB = 48;
const ROOM_BYTES = 80 * MIB;

test('a VM that comes when the memory is promised is refused, and the one that has the promise runs on', async () => {
  const host = await VmHost.start();
  const mount = () => void execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=100m,mode=0700', 'none', host.ramDir]);
  try {
    await host.restart(async () => mount());
    const specs = ['first', 'second'].map((name) => vmSpec({ name }));
    const outcomes = await Promise.allSettled(specs.map((spec) => host.vms.run(spec)));
    expect(outcomes.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
    expect(outcomes.find(({ status }) => status === 'rejected')).toMatchObject({ reason: { code: 'NO_SPACE' } });
    const [{ name } = { name: '' }, ...others] = host.vms.list();
    expect(others).toEqual([]);
    await host.restart();
    // A page that the guest takes while the host is looked at makes it less, never more.
    expect((await hostFacts(host.vms)).ramFileFreeBytes).toBeLessThanOrEqual(36 * MIB);
    await expect.poll(async () => (await hostFacts(host.vms)).ramFileFreeBytes).toBe(36 * MIB);
    expect(host.vms.list()).toMatchObject([{ name, state: 'running' }]);
    await host.vms.destroy(name);
    // The kernel frees the pages when the process of QEMU is gone, a little later.
    await expect.poll(async () => (await hostFacts(host.vms)).ramFileFreeBytes).toBe(100 * MIB);
  } finally {
    execFileSync('umount', ['--lazy', host.ramDir]);
    expect(await host.close()).toEqual([]);
  }
});

describe('a target with room for one', () => {
  let cluster: Cluster;
  let parking: Parking;
  let guests: Guest[];
  const PREPARE = 'before:prepareTarget';

  beforeAll(async () => {
    cluster = await Cluster.create();
    parking = new Parking(cluster.directory, [PREPARE]);
    await cluster.stopDaemon('B', 'SIGTERM');
    const options = `size=${ROOM_BYTES},mode=0700`;
    execFileSync('mount', ['-t', 'tmpfs', '-o', options, 'none', cluster.ramDirectory('B')]);
    await cluster.startDaemon('B');
    await cluster.stopDaemon('A', 'SIGTERM');
    const limits = { recoveryMsMax: 2_000 };
    const config = { ...cluster.network.daemonConfig, limits };
    await writeFile(join(cluster.hostDirectory('A'), 'daemon.json'), JSON.stringify(config));
    await cluster.startDaemon('A', parking.environment);
    await cluster.expectAcquaintance('A');
    guests = await Promise.all(
      ['one', 'other'].map((name) => {
        const size = { memoryMiB: GUEST_MIB, touchMiB: 24, restPercent: 75 };
        return Guest.start(cluster, 'A', { name, image: 'nano', ...size });
      }),
    );
  });
  afterAll(async () => {
    execFileSync('umount', ['--lazy', cluster.ramDirectory('B')]);
    await cluster.destroy();
  });

  const job = (id: string) => cluster.api('A').get<JobView>(`/v1/jobs/${id}`);
  const move = (guest: Guest, ...flags: string[]) =>
    cluster.json<JobView>('A', 'vmigrate', guest.name, 'B', '--detach', ...flags);

  async function until(id: string, what: string, isSo: (view: JobView) => boolean): Promise<JobView> {
    return eventually(`job ${id} is ${what}`, 60_000, async () => {
      const view = await job(id);
      return isSo(view) ? view : undefined;
    });
  }

  test('two moves at once: one is done, the other is refused before its commit and its VM runs on', async () => {
    await parking.arm(PREPARE);
    const ids = await Promise.all(guests.map(async (guest) => (await move(guest)).id));
    // Both have passed pre-flight, so both have seen room.
    for (const id of ids) await until(id, 'about to prepare the target', ({ step }) => step === 'prepareTarget');
    await parking.release(PREPARE);
    const ended = await Promise.all(ids.map((id) => until(id, 'at its end', ({ state }) => isFinal(state))));
    expect(ended.map(({ state }) => state).sort()).toEqual(['done', 'failed']);
    const refused = ended.findIndex(({ state }) => state === 'failed');
    expect(ended[refused]).toMatchObject({ isCommitted: false });
    expect(JSON.stringify(ended[refused]?.error)).toContain('NO_SPACE');
    const loser = guests[refused] as Guest;
    const winner = guests[1 - refused] as Guest;
    expect(await loser.view('A')).toMatchObject({ state: 'running', job: null });
    await Promise.all([loser.expectProgress('A'), winner.expectProgress('B')]);
    await winner.expectClean('B');
    await cluster.must(cluster.vmctl('B', 'stop', '--force', winner.name));
    guests = [loser];
  });

  test('it becomes full after the commit: the job names NO_SPACE and goes on when there is room', async () => {
    const [guest] = guests as [Guest];
    const { id } = await move(guest, '--bandwidth', '2');
    await until(id, 'committed', ({ isCommitted }) => isCommitted);
    await fillTmpfs(cluster.ramDirectory('B'));
    const stalled = await until(id, 'in need of recovery', ({ state }) => state === 'needsRecovery');
    expect(JSON.stringify(stalled.error)).toMatch(/NO_SPACE.*free space in the directory of the memory files/);
    await freeTmpfs(cluster.ramDirectory('B'), ROOM_BYTES);
    await until(id, 'done', ({ state }) => state === 'done');
    await guest.expectProgress('B');
    await guest.expectClean('B');
  });
});
