/**
 * Real QEMU guests under emulation move between two daemons in network namespaces, and prove their own memory
 * afterwards.
 */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readdir, truncate, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { JobView } from '../../src/domain/job.js';
import type { MigrationPlan, MigrationReport } from '../../src/domain/migration.js';
import type { Refusal } from '../../src/domain/refusal.js';
import { Cluster, eventually, type Program, runCommand } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

let cluster: Cluster;

beforeAll(async () => {
  cluster = await Cluster.create({ hasGuestNetwork: true });
});

/** A test that failed half-way must not leave busy guests to the next tests. */
afterEach(async () => {
  for (const { name: host } of cluster.network.hosts) {
    for (const { name } of await cluster.json<{ name: string }[]>(host, 'vmctl', 'ps'))
      await cluster.vmctl(host, 'stop', '--force', name);
  }
});

afterAll(async () => {
  await cluster.destroy();
});

async function migrate(source: string, vm: string, target: string, ...flags: string[]): Promise<MigrationReport> {
  return cluster.json<MigrationReport>(source, 'vmigrate', vm, target, ...flags);
}

async function stop(host: string, vm: string): Promise<void> {
  await cluster.must(cluster.vmctl(host, 'stop', '--force', vm));
}

/** After a move nothing of the VM is left on the source. */
async function expectNothingLeft(host: string, vm: string): Promise<void> {
  expect(await cluster.vmctl(host, 'ps', '--json').then((result) => result.stdout)).not.toContain(`"${vm}"`);
  expect(await cluster.qemuPids(host)).toEqual([]);
  const ram = cluster.ramDirectory(host);
  // The mark of the directory and the copy of the owner records stay.
  expect(existsSync(ram) ? (await readdir(ram)).sort() : []).toEqual(['.owner', '.owners.log']);
}

describe.each([['tcp'], ['shm']])('post-copy over %s', (transport) => {
  it('moves an idle guest', async () => {
    const guest = await Guest.start(cluster, 'A', { name: `idle-${transport}`, workload: 'idle', touchMiB: 16 });
    const report = await migrate('A', guest.name, 'B', '--postcopy', `--${transport}`);
    expect(report).toMatchObject({ vm: guest.name, mode: 'postcopy', transport, source: 'A', target: 'B', rounds: 0 });
    expect(report.memoryBytes).toBe(192 << 20);
    await guest.expectProgress('B');
    await guest.expectClean('B');
    await expectNothingLeft('A', guest.name);
    await stop('B', guest.name);
    await expectNothingLeft('B', guest.name);
  });

  it('moves a busy guest with two vCPUs and two memory regions, and every byte is accounted for', async () => {
    const guest = await Guest.start(cluster, 'A', {
      name: `busy-${transport}`,
      cpus: 2,
      regionsMiB: [128, 96],
      touchMiB: 96,
    });
    const report = await migrate('A', guest.name, 'B', '--postcopy', `--${transport}`);
    const { demand, prefetch, zeroSkipped } = report.bytes;
    expect(demand + prefetch + zeroSkipped).toBe(224 << 20);
    expect(demand + prefetch).toBeGreaterThan(96 << 20);
    expect(report.bytes.deviceState).toBeGreaterThan(10_000);
    expect(report.faults.count).toBeGreaterThan(0);
    expect(report.blackoutMs).toBeGreaterThan(0);
    expect(report.phases.map((phase) => phase.name)).toContain('commit');
    await guest.expectProgress('B');
    await guest.expectClean('B');
    await expectNothingLeft('A', guest.name);
    await stop('B', guest.name);
  });
});

describe('a VM on its way', () => {
  it('goes to and fro ten times', async () => {
    const guest = await Guest.start(cluster, 'A', { name: 'pendulum', touchMiB: 48, memoryMiB: 160 });
    for (let trip = 0; trip < 10; trip++) {
      const [source, target] = trip % 2 === 0 ? ['A', 'B'] : ['B', 'A'];
      await migrate(source, guest.name, target, trip % 4 < 2 ? '--tcp' : '--shm');
      await guest.expectProgress(target, 2);
      await expectNothingLeft(source, guest.name);
    }
    const view = await guest.view('A');
    expect(view).toMatchObject({ state: 'running', epoch: 11, host: 'A' });
    await guest.expectClean('A');
    await stop('A', guest.name);
  });

  it('keeps a TCP connection, and every byte of it', async () => {
    const address = `${cluster.network.guestSubnet}.7`;
    const guest = await Guest.start(cluster, 'A', {
      name: 'stream',
      workload: 'memtouch,stream',
      touchMiB: 32,
      address,
    });
    const peerProgram = fileURLToPath(new URL('../hosts/stream-peer.ts', import.meta.url));
    const peer = spawn(
      'ip',
      [
        'netns',
        'exec',
        cluster.network.clientNamespace,
        process.execPath,
        '--import',
        'tsx',
        peerProgram,
        address,
        '7000',
        '400000',
      ],
      { stdio: ['pipe', 'pipe', 'pipe'] },
    );
    let output = '';
    let connected = false;
    peer.stdout.on('data', (data: Buffer) => (output += data.toString()));
    peer.stderr.on('data', (data: Buffer) => (connected ||= data.toString().includes('connected')));
    try {
      await eventually('the stream is connected', 60_000, () => (connected ? true : undefined));
      await guest.expectProgress('A');
      await migrate('A', guest.name, 'B');
      await guest.expectProgress('B', 10);
      const ended = new Promise((resolve) => peer.once('exit', resolve));
      peer.stdin.end();
      await ended;
    } finally {
      peer.kill('SIGKILL');
    }
    const result = JSON.parse(output) as Record<string, number>;
    expect(result).toMatchObject({ bad: 0, guestBad: 0 });
    expect(result.guestReceived).toBe(result.sent);
    expect(result.received).toBeGreaterThan(100_000);
    await guest.expectClean('B');
    await stop('B', guest.name);
  });

  it('shows its plan and starts nothing with --dry-run', async () => {
    const guest = await Guest.start(cluster, 'A', { name: 'planned', touchMiB: 16, restPercent: 75 });
    const plan = await cluster.json<{ plan: MigrationPlan; refusals: Refusal[] }>(
      'A',
      'vmigrate',
      guest.name,
      'B',
      '--dry-run',
    );
    expect(plan.refusals).toEqual([]);
    expect(plan.plan.steps.map((step) => step.name)).toContain('commit');
    expect(await cluster.qemuPids('B')).toEqual([]);
    expect(await cluster.json<JobView[]>('A', 'vmctl', 'jobs')).not.toContainEqual(
      expect.objectContaining({ vm: guest.name }),
    );
    await stop('A', guest.name);
  });

  it('goes in the background with --detach and can be followed', async () => {
    const guest = await Guest.start(cluster, 'A', { name: 'detached', touchMiB: 32, restPercent: 75 });
    const started = await cluster.json<JobView>('A', 'vmigrate', guest.name, 'B', '--detach');
    const followed = await cluster.must(cluster.vmctl('A', 'job', started.id, '--follow', '--json'));
    expect((JSON.parse(followed.stdout) as JobView).state).toBe('done');
    await guest.expectProgress('B');
    await stop('B', guest.name);
  });
});

// The guest writes little: under TCG, QEMU 7.2's own pre-copy sometimes loses a page that was written meanwhile (stock
// QEMU alone does so too).
describe('QEMU’s own migration', () => {
  it.each([[[] as string[]], [['--postcopy']]])('moves a VM with private memory: --native %s', async (flags) => {
    const guest = await Guest.start(cluster, 'A', {
      name: 'private',
      workload: 'idle',
      backing: 'private',
      hasPreload: false,
      touchMiB: 32,
    });
    const report = await migrate('A', guest.name, 'B', '--native', ...flags);
    expect(report.mode).toBe(flags.length === 0 ? 'native-precopy' : 'native-postcopy');
    await guest.expectProgress('B');
    await guest.expectClean('B');
    await expectNothingLeft('A', guest.name);
    await stop('B', guest.name);
  });
});

describe('pre-flight', () => {
  it('refuses before anything starts, with reason and remedy', async () => {
    const guest = await Guest.start(cluster, 'A', {
      name: 'refused',
      backing: 'private',
      hasPreload: false,
      touchMiB: 16,
    });
    const result = await cluster.vmigrate('A', guest.name, 'B', '--postcopy', '--json');
    expect(result.code).toBe(3);
    const { error } = JSON.parse(result.stdout) as { error: { code: string; details: Refusal[] } };
    expect(error.code).toBe('PREFLIGHT_REFUSED');
    expect(error.details.map((refusal) => refusal.code)).toContain('RAM_NOT_SHARED');
    for (const refusal of error.details) expect(refusal.remedy).not.toBe('');
    expect(await cluster.qemuPids('B')).toEqual([]);
    await guest.expectProgress('A');
    await stop('A', guest.name);
  });

  it('refuses to move onto a disk that is not shared, and to fork what only one VM can have', async () => {
    const [disks, others] = [join(cluster.directory, 'disks'), join(cluster.directory, 'other-disks')];
    const path = join(disks, 'root.img');
    for (const directory of [disks, others]) {
      await mkdir(directory);
      await writeFile(join(directory, 'root.img'), '');
      await truncate(join(directory, 'root.img'), 16 << 20);
    }
    const guest = await Guest.start(cluster, 'A', {
      ...{ name: 'disk', workload: 'idle', touchMiB: 16 },
      extra: { disks: [{ path }], qemuArgs: ['-vnc', '127.0.0.1:7'] },
    });
    const onB = (...command: string[]) =>
      cluster.must(runCommand('nsenter', ['-t', String(cluster.daemonPid('B')), '-m', ...command]));
    const refusal = async (program: Program, ...args: string[]): Promise<Refusal[]> => {
      const result = await cluster.command('A', program, [...args, '--json']);
      expect(result.code).toBe(3);
      return (JSON.parse(result.stdout) as { error: { details: Refusal[] } }).error.details;
    };
    await onB('mount', '--bind', others, disks);
    expect(await refusal('vmigrate', guest.name, 'B')).toMatchObject([
      {
        code: 'DISK_NOT_SHARED',
        reason: expect.stringContaining('B does not see what A has just written beside disk disk0'),
      },
    ]);
    const dryRun = (...flags: string[]) => cluster.vmigrate('A', guest.name, 'B', '--dry-run', ...flags);
    expect(await dryRun()).toMatchObject({ code: 3, stdout: expect.stringContaining('--shared-storage assume') });
    expect(await dryRun('--shared-storage', 'assume')).toMatchObject({
      code: 0,
      stdout: expect.stringContaining('nobody has checked'),
    });
    await truncate(join(others, 'root.img'), 32 << 20);
    expect((await dryRun()).stdout).toContain('16 MiB and 32 MiB');
    await onB('umount', disks);
    expect(await readdir(disks)).toEqual(['root.img']);

    expect((await cluster.vfork('A', guest.name, '--clones', '2', '--dry-run')).stdout).toMatch(
      /HOST_RESOURCE: only one VM of a host can have the VNC display 127\.0\.0\.1:7/,
    );
    expect(await migrate('A', guest.name, 'B')).toMatchObject({ sharedStorage: 'prove' });
    expect(await readdir(disks)).toEqual(['root.img']);
    await guest.expectProgress('B');
    await stop('B', guest.name);
  });

  it('refuses --rdma clearly where there is no RDMA device', async () => {
    const guest = await Guest.start(cluster, 'A', { name: 'verbs', touchMiB: 16, workload: 'idle' });
    const result = await cluster.vmigrate('A', guest.name, 'B', '--rdma', '--json');
    expect(result.code).toBe(3);
    expect(result.stdout).toContain('TRANSPORT_UNAVAILABLE');
    const { plan } = await cluster.json<{ plan: MigrationPlan }>('A', 'vmigrate', guest.name, 'B', '--dry-run');
    expect(plan.request.transport).toBe('tcp');
    expect(plan.transportReason).toMatch(/^A cannot use RDMA: /);
    await stop('A', guest.name);
  });

  it('names a VM, a host or a daemon that is not there, by its exit code', async () => {
    expect((await cluster.vmigrate('A', 'nobody', 'B', '--json')).code).toBe(1);
    expect(
      (await cluster.local('vmigrate', '--host', `unix:${join(cluster.directory, 'no.sock')}`, 'x', 'B')).code,
    ).toBe(5);
    expect((await cluster.vmigrate('A', '--no-such-flag')).code).toBe(2);
  });
});
