/** Two real daemons with mutual TLS and a real guest: everything except moving it. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { VmView } from '../../src/domain/vm.js';
import type { DoctorCheck, HostView } from '../../src/schemas/host.js';
import { Cluster, eventually, sleep } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

const MIB = 2 ** 20;
/**
 * Memory of the daemon's own, measured at 30 MiB. The rest of its resident memory, some 41 MiB, are pages of Node's
 * program file: how many of them the kernel maps depends on the machine's page cache.
 */
const OWN_BYTES_MAX = 38 * MIB;
const IDLE_WINDOW_MS = 4000;
const IDLE_CPU_MAX = 0.005;

let cluster: Cluster;
let guest: Guest;

const list = (host: string): Promise<VmView[]> => cluster.json<VmView[]>(host, 'vmctl', 'ps');

async function pidOf(host: string): Promise<number> {
  const vm = (await list(host)).find(({ name }) => name === guest.name);
  if (vm?.pid === undefined || vm.pid === null) throw new Error(`${guest.name} has no process`);
  return vm.pid;
}

/** Returns the processor time that a process has used, in ms. The kernel counts in ticks of 10 ms. */
async function cpuMs(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

/** Returns the memory of a process that no file backs. */
async function ownBytes(pid: number): Promise<number> {
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  const [, kib] = /^RssAnon:\s+(\d+) kB$/m.exec(status) ?? [];
  if (kib === undefined) throw new Error(`no RssAnon of process ${pid}`);
  return Number(kib) * 1024;
}

beforeAll(async () => {
  cluster = await Cluster.create();
  guest = await Guest.start(cluster, 'A', { name: 'kept', touchMiB: 16, memoryMiB: 128, restPercent: 75 });
});
afterAll(() => cluster?.destroy());

describe('a host', () => {
  it('knows itself and its peer', async () => {
    const hosts = await cluster.json<HostView[]>('A', 'vmctl', 'hosts');
    expect(hosts.map(({ host, isSelf, isReachable }) => ({ host, isSelf, isReachable }))).toEqual([
      { host: 'A', isSelf: true, isReachable: true },
      { host: 'B', isSelf: false, isReachable: true },
    ]);
    expect(hosts[1]?.inventory?.machines).toContain('pc-q35-7.2');
  });

  it('says what it can and cannot do', async () => {
    const checks = await cluster.json<DoctorCheck[]>('A', 'vmctl', 'doctor');
    const status = Object.fromEntries(checks.map((check) => [check.name, check.status]));
    expect(status).toMatchObject({
      kernel: 'ok',
      userfaultfd: 'ok',
      preload: 'ok',
      QEMU: 'ok',
      certificate: 'ok',
      'peer B': 'ok',
      RDMA: 'warn',
    });
    for (const check of checks) expect(check.remedy === '', check.name).toBe(check.status === 'ok');
  });

  it('refuses a second daemon on its state directory, and stays as it is', async () => {
    const [program, args] = [process.execPath, cluster.daemonArguments('A')];
    const { namespace } = cluster.host('A');
    const second = await cluster.inNamespace(namespace, program, 'dist/cli/vmigrated.js', ...args);
    expect(second.code).toBe(1);
    expect(second.stderr).toMatch(/in use by process \d+ on .* \(CONFLICT\)/);
    expect(await list('A')).toHaveLength(1);
  });
});

describe('a VM', () => {
  it('pauses and goes on', async () => {
    await guest.expectProgress('A');
    await cluster.must(cluster.vmctl('A', 'pause', guest.name));
    expect((await list('A'))[0]?.state).toBe('paused');
    await sleep(300);
    expect(await guest.isSilent('A')).toBe(true);
    await cluster.must(cluster.vmctl('A', 'resume', guest.name));
    await guest.expectProgress('A');
  });

  it('does not start twice under one name', async () => {
    const again = await cluster.vmctl('A', 'run', join(cluster.directory, `${guest.name}.json`), '--json');
    expect(again.code).toBe(1);
    expect(JSON.parse(again.stdout)).toMatchObject({ error: { code: 'CONFLICT' } });
    await guest.expectProgress('A');
  });

  it.each(['SIGTERM', 'SIGKILL'] as const)('outlives its daemon (%s), which finds it again', async (signal) => {
    const pid = await pidOf('A');
    await cluster.stopDaemon('A', signal);
    expect(await cluster.qemuPids('A')).toEqual([pid]);
    await cluster.startDaemon('A');
    expect(await list('A')).toMatchObject([{ name: guest.name, state: 'running', pid, epoch: 1 }]);
    await guest.expectProgress('A');
  });

  it('that dies while no daemon looks is known to have ended', async () => {
    const other = await Guest.start(cluster, 'B', {
      name: 'dying',
      touchMiB: 16,
      memoryMiB: 128,
      workload: 'memtouch',
    });
    const [pid] = await cluster.qemuPids('B');
    await cluster.stopDaemon('B');
    process.kill(pid ?? 0, 'SIGKILL');
    await cluster.startDaemon('B');
    expect(await other.view('B')).toMatchObject({ state: 'stopped', pid: null });
    await cluster.must(cluster.vmctl('B', 'stop', 'dying'));
    expect(await list('B')).toEqual([]);
  });

  it('leaves nothing when it is stopped', async () => {
    await guest.expectClean('A');
    await cluster.must(cluster.vmctl('A', 'stop', '--force', guest.name));
    expect(await list('A')).toEqual([]);
    expect(await cluster.qemuPids('A')).toEqual([]);
  });
});

describe('an idle daemon', () => {
  it('is small and quiet', async () => {
    const pid = cluster.daemonPid('A');
    await eventually('the daemon is quiet', 60_000, async () => {
      const beforeMs = await cpuMs(pid);
      await sleep(IDLE_WINDOW_MS);
      return (await cpuMs(pid)) - beforeMs <= IDLE_WINDOW_MS * IDLE_CPU_MAX ? true : undefined;
    });
    const { residentBytes } = await cluster.json<{ residentBytes: number }>('A', 'vmctl', 'host');
    const bytes = await ownBytes(pid);
    expect(residentBytes).toBeGreaterThan(bytes);
    expect(bytes).toBeLessThan(OWN_BYTES_MAX);
  });

  it('leaves its API socket to nobody when it ends', async () => {
    await cluster.stopDaemon('B', 'SIGTERM');
    expect((await cluster.vmctl('B', 'ps')).code).toBe(5);
    await cluster.startDaemon('B');
    expect(await list('B')).toEqual([]);
  });
});
