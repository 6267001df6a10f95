/**
 * What a user sees of an image and its clones on two hosts, with the commands and real daemons: clones are waited for,
 * listed and ended on both, and so are the copies of the image. In the end one host is silent.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import type { HostCloneEnd } from '../../../src/cli/await-clones.js';
import type { ForkReport } from '../../../src/domain/fork.js';
import type { ImagesOnHosts, StoppedOnHosts, VmsOnHosts } from '../../../src/schemas/all-hosts.js';
import { Cluster, eventually } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';

const SMALL = { memoryMiB: 128, touchMiB: 16, restPercent: 50 };

let cluster: Cluster;

beforeAll(async () => {
  cluster = await Cluster.create();
});
afterAll(() => cluster?.destroy());

const vmsOf = async () => {
  const { vms } = await cluster.json<VmsOnHosts>('A', 'vmctl', 'ps', '--all-hosts');
  return vms.map(({ name, host, state }) => `${name} ${host} ${state}`).sort();
};
const imagesOf = async () => {
  const { images } = await cluster.json<ImagesOnHosts>('A', 'vmctl', 'images', '--all-hosts');
  return images.map(({ id, host, state }) => `${id} ${host} ${state}`).sort();
};

it.each(['all', 'demand'])(
  'vfork --fetch %s --wait --logs --rm waits for all, has all logs, and leaves nothing',
  async (fetch) => {
    const extra = { append: 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=16 vmg.onfork=poweroff' };
    await Guest.start(cluster, 'A', { ...SMALL, name: 'job', extra });
    const logs = join(cluster.directory, `logs-${fetch}`);
    const flags = [
      '--clones',
      '4',
      '--hosts',
      'A,B',
      '--name',
      'j',
      '--wait',
      '--logs',
      logs,
      '--rm',
      '--fetch',
      fetch,
    ];
    const { code, stdout, stderr } = await cluster.vfork('A', ...flags, 'job', '--json');
    const { ends } = JSON.parse(stdout) as ForkReport & { ends: HostCloneEnd[] };
    // Each clone exits with its index.
    expect(ends.map(({ name, host, exitCode }) => [name, host, exitCode])).toEqual([
      ['j-0', 'A', 0],
      ['j-1', 'A', 1],
      ['j-2', 'B', 2],
      ['j-3', 'B', 3],
    ]);
    expect({ code, stderr }).toEqual({ code: 1, stderr: '' });
    for (const { index, log } of ends)
      expect(await readFile(log ?? '', 'utf8')).toMatch(new RegExp(`VMG EXIT code=${index}`));
    expect([await vmsOf(), await imagesOf()]).toEqual([['job A running'], []]);
    await cluster.must(cluster.vmctl('A', 'stop', 'job', '--force'));
  },
);

it('images, logs and stop --image reach both hosts, and a copy makes an image known to the second', async () => {
  await Guest.start(cluster, 'A', { ...SMALL, name: 'web' });
  const report = await cluster.json<ForkReport>('A', 'vfork', '--clones', '1', '--name', 'w', 'web');
  const { image } = report;
  expect(await imagesOf()).toEqual([`${image} A complete`]);
  const copied = await cluster.must(cluster.vmctl('A', 'image', 'copy', image, 'B'));
  expect(copied.stdout).toMatch(new RegExp(`${image} +B +complete`));
  const more = ['--image', image, '--clones', '2', '--name', 'x'];
  await cluster.json('B', 'vfork', ...more);
  expect(await vmsOf()).toEqual(['w-0 A running', 'web A running', 'x-0 B running', 'x-1 B running']);
  await new Guest(cluster, 'x-1').expectClean('B');
  const { stdout: log } = await cluster.must(cluster.vmctl('A', 'logs', 'x-1', '--on', 'B'));
  expect(log).toMatch(/VERIFY pages \d+ bad 0/);

  const onBoth = await cluster.must(cluster.vmctl('A', 'stop', '--image', image));
  expect(onBoth.stdout).toBe('stopped 3 clones\n');
  expect(await vmsOf()).toEqual(['web A running']);
  await cluster.must(cluster.vmctl('A', 'image', 'rm', image, '--all-hosts'));
  expect(await imagesOf()).toEqual([]);
});

it('a clone that moves while it is waited for is followed to its new host', async () => {
  const logs = join(cluster.directory, 'logs-of-moved');
  const flags = ['--clones', '2', '--hosts', 'A,B', '--name', 'm', '--wait', '--logs', logs, '--json'];
  const waiting = cluster.vfork('A', 'web', ...flags);
  await eventually('the image is complete on both hosts', 60_000, async () => {
    const images = await imagesOf();
    return images.length === 2 && images.every((image) => image.endsWith('complete')) ? true : undefined;
  });
  await cluster.must(cluster.vmigrate('A', 'm-0', 'B', '--postcopy'));
  await new Guest(cluster, 'm-0').expectProgress('B');
  for (const pid of await cluster.qemuPids('B')) process.kill(pid, 'SIGKILL');
  const { code, stdout } = await waiting;
  const { ends, image } = JSON.parse(stdout) as ForkReport & { ends: HostCloneEnd[] };
  expect({ code, ends }).toMatchObject({
    code: 1,
    ends: [0, 1].map((index) => ({ name: `m-${index}`, host: 'B', exitCode: null, reason: 'killed' })),
  });
  for (const { log } of ends) expect(await readFile(log ?? '', 'utf8')).toContain('VMG');
  // The clone that has moved has left the image.
  expect(await cluster.vmctl('A', 'stop', '--image', image)).toMatchObject({ code: 0, stdout: 'stopped 1 clone\n' });
  await cluster.must(cluster.vmctl('B', 'stop', 'm-0'));
  await cluster.must(cluster.vmctl('A', 'image', 'rm', image, '--all-hosts'));
});

it('a host that does not answer is named, and what it has is not called ended', async () => {
  const report = await cluster.json<ForkReport>('A', 'vfork', '--clones', '2', '--hosts', 'A,B', '--name', 'z', 'web');
  await cluster.stopDaemon('B');
  const images = await cluster.must(cluster.vmctl('A', 'images', '--all-hosts'));
  expect(images.stdout).toMatch(new RegExp(`${report.image} +A +complete.*\nno answer from B: `));
  const { code, stdout } = await cluster.vmctl('A', 'stop', '--image', report.image, '--json');
  const stopped = JSON.parse(stdout) as StoppedOnHosts;
  expect({ code, ...stopped }).toMatchObject({ code: 1, stopped: ['z-0'], unanswered: [{ host: 'B' }] });
  await cluster.startDaemon('B');
  expect(await cluster.vmctl('A', 'stop', '--image', report.image)).toMatchObject({
    code: 0,
    stdout: 'stopped 1 clone\n',
  });
});
