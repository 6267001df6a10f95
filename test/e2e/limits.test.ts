/**
 * A daemon that may open few files: the doctor and pre-flight say so beforehand, what fails names the limit, and
 * nothing half-made is left. A stranger's connection does not delay the end of a daemon.
 */
import { execFileSync } from 'node:child_process';
import { readdir } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ErrorJson } from '../../src/domain/errors.js';
import { OPEN_FILES_PER_VM } from '../../src/domain/host.js';
import type { VmView } from '../../src/domain/vm.js';
import type { DoctorCheck } from '../../src/schemas/host.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

let cluster: Cluster;
let guest: Guest;

beforeAll(async () => {
  cluster = await Cluster.create();
  guest = await Guest.start(cluster, 'A', { name: 'many', touchMiB: 16, memoryMiB: 128, restPercent: 75 });
});
afterAll(() => cluster?.destroy());

async function openFiles(): Promise<number> {
  return (await readdir(`/proc/${cluster.daemonPid('A')}/fd`)).length;
}

/** The daemon may open so many files more than it has open now. */
async function leave(spareCount: number): Promise<void> {
  const max = (await openFiles()) + spareCount;
  execFileSync('prlimit', ['--pid', String(cluster.daemonPid('A')), `--nofile=${max}:`]);
}

const names = async (): Promise<string[]> => (await cluster.api('A').get<VmView[]>('/v1/vms')).map(({ name }) => name);

async function errorOf(program: 'vmctl' | 'vmigrate' | 'vfork', ...args: string[]) {
  const { code, stdout } = await cluster.command('A', program, [...args, '--json']);
  const { error } = JSON.parse(stdout) as { error: ErrorJson };
  return { code, error, text: JSON.stringify(error) };
}

describe('a daemon that may open few files', () => {
  it('needs no more of them for a clone than pre-flight counts', async () => {
    const before = await openFiles();
    await cluster.must(cluster.vmctl('A', 'pool', 'warm', guest.name, '--clones', '2'));
    expect(((await openFiles()) - before) / 2).toBeLessThanOrEqual(OPEN_FILES_PER_VM);
    await cluster.must(cluster.vmctl('A', 'pool', 'drain', guest.name));
  });

  it('says so in the doctor, and refuses forks and moves with the limit and its place', async () => {
    await leave(24);
    const checks = await cluster.api('A').get<DoctorCheck[]>('/v1/doctor');
    expect(checks.find(({ name }) => name === 'open files')).toMatchObject({
      status: 'warn',
      text: expect.stringMatching(/in use; a VM or clone takes about 12, so 0 more fit/),
      remedy: expect.stringMatching(/LimitNOFILE=.*ulimit -n.*fs\.nr_open/),
    });
    for (const [program, ...args] of [
      ['vfork', guest.name, '--clones', '8'],
      ['vmigrate', guest.name, 'B'],
    ] as const) {
      const { code, text } = await errorOf(program, ...args);
      expect(code, text).toBe(3);
      expect(text).toContain('HOST_LIMIT');
      expect(text).toContain('LimitNOFILE');
    }
  });

  it('names the limit when it meets it, and leaves nothing half-made', async () => {
    await leave(24);
    const { code, text } = await errorOf('vmctl', 'pool', 'warm', guest.name, '--clones', '8');
    expect(code).toBe(1);
    expect(text).toMatch(/EMFILE|Too many open files/);
    expect(text).toContain('LimitNOFILE');
    await eventually('only the guest is left', 30_000, async () => {
      const [known, pids] = [await names(), await cluster.qemuPids('A')];
      return known.length === 1 && pids.length === 1 ? true : undefined;
    });
    await guest.expectProgress('A');
  });

  it('works as before when the limit has been raised', async () => {
    await leave(10_000);
    await cluster.must(cluster.vmctl('A', 'pool', 'warm', guest.name, '--clones', '2'));
    await cluster.must(cluster.vmctl('A', 'pool', 'drain', guest.name));
    expect(await names()).toEqual([guest.name]);
  });
});

describe('a stranger', () => {
  it('whose connection never begins TLS does not keep a daemon from ending', async () => {
    const { address, namespace } = cluster.host('A');
    const script = `require('node:net').connect(7400, '${address}').on('connect', () => console.log('connected'))
      .on('error', () => undefined).on('close', () => process.exit(0))`;
    const stranger = cluster.inNamespace(namespace, process.execPath, '-e', script);
    await eventually('the stranger is connected', 30_000, async () => {
      const { stdout } = await cluster.inNamespace(namespace, 'ss', '-Htn', 'state', 'established', 'sport = :7400');
      // The other daemon's connections come from another address.
      return stdout.split('\n').some((line) => line.split(`${address}:`).length === 3) ? true : undefined;
    });
    await cluster.stopDaemon('A', 'SIGTERM');
    expect((await stranger).stdout).toBe('connected\n');
    await cluster.startDaemon('A');
    await guest.expectProgress('A');
  });
});
