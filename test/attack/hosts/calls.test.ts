/**
 * A host of the cluster that has been taken over: C calls real daemons with its own, valid certificate. Each call is
 * refused, and the refusal is logged with C's name.
 */
import { existsSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ImageView } from '../../../src/domain/image.js';
import type { JobView } from '../../../src/domain/job.js';
import type { VmView } from '../../../src/domain/vm.js';
import { parseSpec } from '../../../src/schemas/vm-spec.js';
import { Cluster, eventually } from '../../hosts/cluster.js';
import { Guest, guestImage } from '../../hosts/guest.js';

const API_PORT = 7400;
const SESSION = 'c'.repeat(32);
const TOKEN = 'd'.repeat(64);

let cluster: Cluster;
let guest: Guest;
let clones: VmView[];
let image: string;

beforeAll(async () => {
  const allow = { paths: [dirname(guestImage().kernel)] };
  cluster = await Cluster.create({ hosts: ['A', 'B', 'C'], hostConfigs: { B: { security: { allow } } } });
  guest = await Guest.start(cluster, 'A', { name: 'victim', touchMiB: 8, memoryMiB: 128, restPercent: 75 });
  await cluster.must(cluster.vfork('A', '--clones', '2', '--hosts', 'A,B', guest.name));
  clones = (await cluster.api('B').get<VmView[]>('/v1/vms')).filter(({ state }) => state === 'running');
  const [view] = await cluster.api('A').get<ImageView[]>('/v1/images');
  image = view?.id ?? '';
});
afterAll(() => cluster?.destroy());

/** Runs in C's namespace, as C. */
const CLIENT = `
  const { readFileSync } = require('node:fs');
  const { url, folder, method, body, headers } = JSON.parse(process.argv[1]);
  const read = (name) => readFileSync(folder + '/' + name);
  const keys = { ca: read('ca.pem'), cert: read('cert.pem'), key: read('key.pem') };
  const request = require('node:https').request(url, { ...keys, method, headers }, (response) =>
    response.pipe(process.stdout));
  request.on('upgrade', () => (console.log('{"upgraded":true}'), process.exit()));
  request.on('error', (error) => console.error(error.code));
  request.end(body);`;

async function send(host: string, path: string, request: object): Promise<Record<string, unknown>> {
  const url = `https://${cluster.host(host).address}:${API_PORT}${path}`;
  const options = JSON.stringify({ url, folder: join(cluster.hostDirectory('C'), 'tls'), ...request });
  const { namespace } = cluster.host('C');
  const { stdout, stderr } = await cluster.inNamespace(namespace, process.execPath, '-e', CLIENT, options);
  return stdout === '' ? { nothing: stderr } : (JSON.parse(stdout) as Record<string, unknown>);
}

function call(host: string, name: string, ...args: unknown[]): Promise<Record<string, unknown>> {
  const headers = { 'content-type': 'application/json' };
  return send(host, `/agent/v1/call/${name}`, { method: 'POST', headers, body: JSON.stringify(args) });
}

async function expectRefused(host: string, name: string, ...args: unknown[]): Promise<void> {
  const answer = await call(host, name, ...args);
  expect(answer, `${name}: ${JSON.stringify(answer)}`).toMatchObject({ code: 'NOT_PERMITTED' });
  await expectLogged(host, name);
}

async function expectLogged(host: string, name: string): Promise<void> {
  await expect
    .poll(async () => (await cluster.daemonLog(host)).split('\n').filter((line) => line.includes(`"${name}"`)))
    .toContainEqual(expect.stringMatching(/"who":"host\/C".*"result":"NOT_PERMITTED"/));
}

describe('a host that has been taken over', () => {
  it('cannot read the memory of a VM, or stop it, as if it moved', async () => {
    const request = { session: SESSION, vm: guest.name, token: TOKEN, transport: 'tcp', target: 'C' };
    await expectRefused('A', 'expose', request);
    await expectRefused('A', 'stop', guest.name, SESSION);
    await expectRefused('A', 'release', guest.name, SESSION);
    await guest.expectProgress('A');
  });

  it('cannot move or fork the VMs of others', async () => {
    const of = { mode: 'postcopy', accel: 'tcg', token: TOKEN, bandwidthBytesPerS: 0, epoch: 1 };
    const spec = parseSpec({ name: 'planted', memory: { size: '64M' }, qemuArgs: ['-D', '/tmp/planted'] });
    await expectRefused('A', 'prepare', { ...of, session: SESSION, job: 'job-c', source: 'B', spec });
    await expectRefused('A', 'armParent', image);
  });

  it('cannot start a QEMU with arguments, devices and files of its choice', async () => {
    const of = { mode: 'postcopy', accel: 'tcg', token: TOKEN, bandwidthBytesPerS: 0, epoch: 1 };
    const moves = { ...of, session: SESSION, job: 'job-c', source: 'C' };
    const written = join(cluster.directory, 'written-as-root');
    const fork = { vm: null, image: null, cloneCount: 1, namePrefix: null, parentMode: 'continue', network: 'fresh' };
    const forks = {
      ...fork,
      memory: 'cow',
      disks: 'overlay',
      fork: '7'.repeat(16),
      job: 'job-c',
      isPartialAllowed: false,
    };
    const ownImage = { host: 'C', image: '8'.repeat(16), accel: 'tcg', qemuVersion: '7.2.0', allocatedBytes: 0 };
    for (const names of [
      { qemuArgs: ['-D', written] },
      { devices: ['virtio-rng-pci'] },
      { kernel: '/etc/shadow' },
      { nics: [{ id: 'n0', type: 'tap', bridge: 'br0' }] },
      { disks: [{ id: 'd0', path: '/etc/shadow', format: 'raw', readOnly: true }] },
    ]) {
      const spec = parseSpec({ name: 'planted', memory: { size: '64M' }, ...names });
      await expectRefused('B', 'prepare', { ...moves, spec });
      const disks = spec.disks.map(({ id }) => ({ id, access: 'shared' }));
      await expectRefused('B', 'prepareClones', { ...forks, origin: { ...ownImage, spec, disks } });
    }
    expect(existsSync(written)).toBe(false);
    expect((await cluster.api('B').get<VmView[]>('/v1/vms')).map(({ name }) => name)).not.toContain('planted');
    const shadow = { path: '/etc/shadow', use: 'disk', isWritable: false, format: null };
    const seen = await call('B', 'viewStorage', '0'.repeat(32), [shadow]);
    expect(seen).toMatchObject({
      result: [{ digest: null, inode: '', problem: expect.stringMatching(/policy of B/) }],
    });
  });

  it('cannot read an image that is not shared with it, or its disks', async () => {
    await expectRefused('A', 'serveImage', image, 'C', 'tcp');
    await expectRefused('B', 'serveHeld', image, 'C', 'tcp');
    await expectRefused('A', 'touchOrder', image, 'C');
    await expectRefused('B', 'heldDigests', image, 0, 0);
    const headers = { connection: 'upgrade', upgrade: 'vmigrate-disk' };
    const disk = await send('A', `/agent/v1/images/${image}/disks/disk0`, { method: 'GET', headers });
    expect(disk).not.toMatchObject({ upgraded: true });
  });

  it('cannot feed the QEMU that waits for the VM of another host', async () => {
    const private_ = { name: 'private', backing: 'private' as const, hasPreload: false, memoryMiB: 128, touchMiB: 8 };
    await Guest.start(cluster, 'A', { ...private_, workload: 'idle' });
    const slow = ['--native', '--bandwidth', '1', '--detach'];
    const { id } = await cluster.json<JobView>('A', 'vmigrate', 'private', 'B', ...slow);
    const [session] = await eventually('B waits for its memory', 60_000, async () => {
      const sessions = await readdir(join(cluster.hostDirectory('B'), 'state', 'sessions')).catch(() => []);
      return sessions.length > 0 ? sessions.map((file) => file.split('.')[0]) : undefined;
    });
    const headers = { connection: 'upgrade', upgrade: 'vmigrate-stream' };
    const stream = await send('B', `/agent/v1/sessions/${session}/stream`, { method: 'GET', headers });
    expect(stream).not.toMatchObject({ upgraded: true });
    await expectLogged('B', 'openStream');
    // QEMU itself listens at no port, and connects to none.
    for (const host of ['A', 'B']) {
      const { namespace } = cluster.host(host);
      const { stdout } = await cluster.inNamespace(namespace, 'ss', '--no-header', '--all', '--numeric', '--processes');
      expect(stdout).toContain(`:${API_PORT}`);
      expect(stdout.split('\n').filter((line) => line.startsWith('tcp') && line.includes('qemu'))).toEqual([]);
    }
    await cluster.must(cluster.vmctl('A', 'cancel', id));
  });

  it('cannot end the clones and images of others', async () => {
    expect(clones.length).toBeGreaterThan(0);
    const named = clones.map(({ name, uuid }) => ({ name, uuid }));
    await expectRefused('B', 'stopClones', named, true);
    await expectRefused('A', 'removeImage', image, { isForced: true, isDroppingSaved: true });
    const states = (await cluster.api('B').get<VmView[]>('/v1/vms')).map(({ state }) => state);
    expect(states).toEqual(clones.map(() => 'running'));
  });

  it('is let do what a host that shares the image does', async () => {
    // The refusals above are for C alone: a daemon that refuses everybody would pass them.
    const stopped = await cluster.must(cluster.vmctl('A', 'stop', '--image', image));
    expect(stopped.code).toBe(0);
    expect(await cluster.daemonLog('B')).toMatch(/"who":"host\/A".*"what":"stopClones".*"result":"ok"/);
  });
});
