/** `vfork` and the commands of `vmctl` for images, as processes against a daemon with fakes behind its API. */
import { spawn } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Readable } from 'node:stream';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { MigrationError } from '../../../src/domain/errors.js';
import { type FakeServices, FORK_REPORT, fakeServices, imageView, vmView } from '../../support/api-fakes.js';

// Each case is a process of its own, which starts slowly on a busy machine.
vi.setConfig({ testTimeout: 60_000 });
const ROOT = fileURLToPath(new URL('../../..', import.meta.url));
const { image: IMAGE } = FORK_REPORT;
let directory: string;
let services: FakeServices;
let server: ApiServer;

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-vfork-'));
  services = fakeServices();
  server = buildServer(services);
  await server.listenUnix(join(directory, 'api.sock'));
});
afterAll(async () => {
  await server.close();
  await rm(directory, { recursive: true, force: true });
});
beforeEach(async () => {
  for (const { name } of services.vms.list()) await services.vms.stop(name, { isForced: true, gracefulMs: 0 });
  services.answers.clear();
  services.jobs.refusals = [];
  services.jobs.forkRequests.length = 0;
  services.images.views.clear();
  services.pool.sets.length = 0;
});

function run(program: string, ...args: readonly string[]) {
  const child = spawn(process.execPath, ['--import', 'tsx', join(ROOT, `src/cli/${program}.ts`), ...args], {
    cwd: ROOT,
    env: { ...process.env, VMIGRATE_HOST: `unix:${directory}/api.sock`, NODE_OPTIONS: '' },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (data: Buffer) => (stdout += data.toString()));
  child.stderr.on('data', (data: Buffer) => (stderr += data.toString()));
  return new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) =>
    child.once('close', (code) => resolve({ code, stdout, stderr })),
  );
}

/** Applies `change` to the next submitted job once a client watches it. */
async function nextJobEnds(change: Parameters<FakeServices['jobs']['change']>[1]): Promise<void> {
  const id = `job-${services.jobs.views.size + 1}`;
  while (![...services.jobs.listeners].some((entry) => entry.id === id))
    await new Promise((resolve) => setTimeout(resolve, 5));
  services.jobs.change(id, change);
}

describe('vfork', () => {
  test('0: done, with the report as the only thing on stdout', async () => {
    const [ended] = await Promise.all([
      run('vfork', '--clones', '2', 'web', '--json'),
      nextJobEnds({ state: 'done', report: FORK_REPORT }),
    ]);
    expect(ended).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(ended.stdout)).toEqual(FORK_REPORT);
  });

  test('every flag arrives', async () => {
    const flags = ['--parent', 'stop', '--memory', 'private', '--network', 'none', '--disks', 'scratch'];
    const ended = await run(
      'vfork',
      'web',
      '--clones',
      '5',
      ...flags,
      '--name',
      'w',
      '--partial',
      '--replace',
      '--detach',
    );
    expect(ended).toMatchObject({ code: 0, stdout: expect.stringMatching(/^job-\d+\n$/) as string });
    expect(services.jobs.forkRequests).toEqual([
      {
        vm: 'web',
        image: null,
        cloneCount: 5,
        namePrefix: 'w',
        parentMode: 'stop',
        memory: 'private',
        network: 'none',
        disks: 'scratch',
        isPartialAllowed: true,
        isReplacing: true,
      },
    ]);
  });

  test('a person reads pause, times and clones', async () => {
    const [ended] = await Promise.all([
      run('vfork', '--image', IMAGE, '--clones', '2'),
      nextJobEnds({ state: 'done', report: FORK_REPORT }),
    ]);
    expect(services.jobs.forkRequests).toMatchObject([{ vm: null, image: IMAGE }]);
    expect(ended.stdout).toMatch(/^web: 2 clones, 256 MiB, warm\n {2}pause {6}14\.5 ms/);
    expect(ended.stdout).toMatch(/web-1 +A +00000000-\S+ +52:54:00:00:00:01 +60\.0 ms/);
  });

  test('1: failed, and none is left', async () => {
    const error = { code: 'STEP_FAILED', message: 'clone web-1 could not be started' };
    const [ended] = await Promise.all([
      run('vfork', '--clones', '2', 'web'),
      nextJobEnds({ state: 'failed', error, clones: [] }),
    ]);
    expect(ended).toMatchObject({ code: 1, stdout: '' });
    expect(ended.stderr).toMatch(/the fork of web failed: no clone exists \(STEP_FAILED\)\n {2}because: clone web-1/);
  });

  test('1: the fork is committed, but none of its clones could run', async () => {
    const failures = [0, 1].map((index) => ({
      ...{ index, name: `web-${index}`, error: { code: 'QEMU_GONE', message: 'it has ended' } },
    }));
    const [ended] = await Promise.all([
      run('vfork', '--clones', '2', 'web'),
      nextJobEnds({ state: 'done', report: { ...FORK_REPORT, clones: [], failures } }),
    ]);
    expect(ended).toMatchObject({ code: 1, stdout: expect.stringContaining('web-1: it has ended') as string });
  });

  test('3: refused, 4: needs recovery', async () => {
    const [stalled] = await Promise.all([
      run('vfork', '--clones', '2', 'web'),
      nextJobEnds({ state: 'needsRecovery', error: { code: 'NEEDS_RECOVERY', message: 'stuck' } }),
    ]);
    expect(stalled).toMatchObject({ code: 4, stderr: expect.stringMatching(/vfork --recover job-\d+/) as string });
    services.jobs.refusals = [{ code: 'CLONE_COUNT', reason: '0 clones are too few', remedy: 'ask for one' }];
    const refused = await run('vfork', '--clones', '0', 'web', '--dry-run');
    expect(refused).toMatchObject({ code: 3, stdout: expect.stringContaining('ask for one') as string });
  });

  test.each([
    [['web']],
    [['--clones', '2']],
    [['--clones', '-1', 'web']],
    [['--clones', 'many', 'web']],
    [['--clones', '2', 'web', '--image', IMAGE]],
    [['--clones', '2', 'web', '--memory', 'shared']],
    [['--clones', '2', 'web', '--rdma']],
    [['--clones', '2', 'web', '--topology', '/etc/topology.conf']],
    [['--clones', '2', 'web', '--fanout', 'multicast']],
    [['--clones', '2', 'web', '--wait', '--detach']],
    [['--clones', '2', 'web', '--logs', '/tmp']],
  ])('2: usage, %j', async (args) => {
    const ended = await run('vfork', ...args);
    expect(ended).toMatchObject({ code: 2, stdout: '' });
    expect(ended.stderr).not.toBe('');
  });

  test.each([
    ['A,B,B', [], /named twice/],
    ['A:1,B:2', ['--clones', '2'], /to have 3 clones, and the fork has 2/],
    ['A,B:x', ['--clones', '2'], /neither HOST nor HOST:CLONES/],
    ['A,B', [], /give the number of clones/],
  ])('--hosts %s %j is a mistake of usage', async (hosts, flags, message) => {
    const ended = await run(
      'vfork',
      ...(flags.length > 0 || hosts === 'A,B' ? flags : ['--clones', '2']),
      'web',
      '--hosts',
      hosts,
    );
    expect(ended).toMatchObject({ code: 2, stderr: expect.stringMatching(message) as string });
  });

  test('--placement, --fetch and transports need --hosts', async () => {
    for (const flag of ['--placement=pack', '--fetch=demand', '--tcp']) {
      const ended = await run('vfork', '--clones', '2', 'web', flag);
      expect(ended).toMatchObject({ code: 2, stderr: expect.stringMatching(/needs --hosts/) as string });
    }
  });

  test.each([
    [0, 0],
    [3, 1],
  ])('--wait waits until all have ended, and keeps their logs: codes 0 and %i', async (exitCode, code) => {
    for (const { name, uuid } of FORK_REPORT.clones) await services.vms.run(vmView(name, { uuid }) as never);
    const logs = join(directory, `logs-${exitCode}`);
    const waiting = run('vfork', '--clones', '2', 'web', '--wait', '--logs', logs, '--json');
    await nextJobEnds({ state: 'done', report: FORK_REPORT });
    services.ends('web-0', 'bye\n');
    services.ends('web-1', `bye from ${exitCode}\n`, exitCode);
    const ended = await waiting;
    expect(ended).toMatchObject({ code, stderr: '' });
    const { ends } = JSON.parse(ended.stdout) as { ends: { log: string }[] };
    expect(ends).toMatchObject([
      { name: 'web-0', index: 0, exitCode: 0, reason: 'guest-shutdown' },
      { name: 'web-1', index: 1, exitCode },
    ]);
    expect(await readFile(ends[1]?.log ?? '', 'utf8')).toBe(`bye from ${exitCode}\n`);
  });

  test.each([
    ['removes clones and image', ['web'], []],
    ['leaves an image that was there before', ['--image', IMAGE], [IMAGE]],
  ])('--rm %s', async (_, of, left) => {
    services.images.views.set(IMAGE, imageView(IMAGE));
    for (const { name, uuid } of FORK_REPORT.clones) await services.vms.run(vmView(name, { uuid }) as never);
    const waiting = run('vfork', '--clones', '2', ...of, '--wait', '--rm');
    await nextJobEnds({ state: 'done', report: FORK_REPORT });
    for (const { name } of FORK_REPORT.clones) services.ends(name, '');
    expect(await waiting).toMatchObject({ code: 0 });
    expect(services.vms.list()).toEqual([]);
    expect(services.images.list().map(({ id }) => id)).toEqual(left);
  });

  test('--rm that fails adds no second document to --json, and says why', async () => {
    for (const { name, uuid } of FORK_REPORT.clones) await services.vms.run(vmView(name, { uuid }) as never);
    const waiting = run('vfork', '--clones', '2', 'web', '--wait', '--rm', '--json');
    await nextJobEnds({ state: 'done', report: { ...FORK_REPORT, image: 'f'.repeat(16) } });
    for (const { name } of FORK_REPORT.clones) services.ends(name, '');
    const { code, stdout, stderr } = await waiting;
    expect(code).toBe(1);
    expect(JSON.parse(stdout)).toMatchObject({ ends: [{ exitCode: 0 }, { exitCode: 0 }] });
    expect(stderr).toMatch(/^vfork: no image f+ \(NOT_FOUND\)\n/);
  });

  test('--wait --logs --rm works over all hosts of the fork', async () => {
    const [ours, theirs] = FORK_REPORT.clones.map((clone, index) => ({ ...clone, host: 'AB'.charAt(index) }));
    if (ours === undefined || theirs === undefined) throw new Error('two clones');
    const report = { ...FORK_REPORT, clones: [ours, theirs] };
    services.images.views.set(IMAGE, imageView(IMAGE));
    await services.vms.run(vmView('web-0', { uuid: ours.uuid }) as never);
    const exit = { at: '', reason: 'guest-shutdown', code: 0, signal: null, exitCode: 0 };
    const onB = vmView('web-1', { uuid: theirs.uuid, host: 'B', state: 'stopped', exit, exitCode: 0 });
    services.answers.set('vmViews', () => ({ vms: [onB] }));
    services.answers.set('stopClones', () => ({ stopped: ['web-1'], failures: [] }));
    services.answers.set('imageViews', () => ({ images: [imageView(IMAGE, { host: 'B' })] }));
    services.answers.set('removeImage', () => ({ id: IMAGE, freedBytes: 1, mergedDisks: [], keptLayers: [] }));
    services.peers.serialLog = async (host, vm) => Readable.from([`${vm} on ${host}\n`]);
    const logs = join(directory, 'logs-of-hosts');
    const waiting = run('vfork', '--clones', '2', 'web', '--wait', '--logs', logs, '--rm');
    await nextJobEnds({ state: 'done', report });
    services.ends('web-0', 'bye\n');
    const ended = await waiting;
    expect(ended).toMatchObject({ code: 0, stderr: '' });
    expect(ended.stdout).toMatch(/web-1 +B +0 +guest-shutdown .*web-1.log\nA: removed image .*\nB: removed image/);
    expect(await readFile(join(logs, 'web-0.log'), 'utf8')).toBe('bye\n');
    expect(await readFile(join(logs, 'web-1.log'), 'utf8')).toBe('web-1 on B\n');
    expect([services.vms.list(), services.images.list()]).toEqual([[], []]);
    expect(services.calls.map(({ method }) => method)).toEqual(expect.arrayContaining(['stopClones', 'removeImage']));
  });

  test('--logs that cannot be written are told before the wait', async () => {
    for (const { name, uuid } of FORK_REPORT.clones) await services.vms.run(vmView(name, { uuid }) as never);
    const waiting = run('vfork', '--clones', '2', 'web', '--wait', '--logs', '/proc/none/logs');
    await nextJobEnds({ state: 'done', report: FORK_REPORT });
    // Nobody ends the clones.
    expect(await waiting).toMatchObject({ code: 2, stderr: expect.stringContaining('/proc/none/logs cannot be made') });
    for (const { name } of FORK_REPORT.clones) services.ends(name, '');
  });

  test('--wait takes a code for the end, and the log as far as it goes', async () => {
    for (const { name, uuid } of FORK_REPORT.clones) await services.vms.run(vmView(name, { uuid }) as never);
    const waiting = run('vfork', '--clones', '2', 'web', '--wait', '--logs', join(directory, 'logs'), '--json');
    await nextJobEnds({ state: 'done', report: FORK_REPORT });
    // More output than the backlog of a console.
    const said = 'x'.repeat(200_000);
    services.saysCode('web-0', said, 0);
    services.saysCode('web-1', 'done\n', 0);
    const { code, stdout } = await waiting;
    expect(code).toBe(0);
    const { ends } = JSON.parse(stdout) as { ends: { log: string }[] };
    expect(ends).toMatchObject([{ exitCode: 0, reason: 'its word' }, { reason: 'its word' }]);
    expect(await readFile(ends[0]?.log ?? '', 'utf8')).toBe(said);
  });
});

describe('vmctl', () => {
  test('images, image show, rm, save and load', async () => {
    const pages = { pagesTotal: 10, pagesDone: 4, problem: 'A is silent' };
    services.images.views.set(IMAGE, imageView(IMAGE, { state: 'filling', ...pages }));
    const shown = /00112233445566ff +filling 40 % +web +256 MiB +128 MiB.*\n00112233445566ff: A is silent\n$/;
    expect((await run('vmctl', 'images')).stdout).toMatch(shown);
    expect(JSON.parse((await run('vmctl', 'image', 'show', IMAGE, '--json')).stdout)).toMatchObject({ id: IMAGE });
    expect(await run('vmctl', 'image', 'save', IMAGE, '/srv/x.image')).toMatchObject({ code: 0 });
    expect(await run('vmctl', 'image', 'rm', IMAGE)).toMatchObject({ code: 0 });
    expect(await run('vmctl', 'image', 'show', IMAGE)).toMatchObject({ code: 1 });
    expect(await run('vmctl', 'image', 'load', '/srv/x.image', '--json')).toMatchObject({ code: 0 });
    expect(services.images.list()).toHaveLength(1);
  });

  test('what happens to disk layers is the user’s word, and what stays is said', async () => {
    const { images } = services;
    for (const calls of [images.removals, images.saves, images.loads]) calls.length = 0;
    services.images.views.set(IMAGE, imageView(IMAGE));
    services.images.keptLayers = [{ path: '/srv/web.qcow2', reason: 'needed by saved image /srv/x.image' }];
    await run('vmctl', 'image', 'save', IMAGE, '/srv/x.image', '--with-disks');
    const removed = await run('vmctl', 'image', 'rm', IMAGE, '--drop-saved', '--force');
    expect(removed.stdout).toMatch(/^unloaded image .*freed 128 MiB/);
    expect(removed.stdout).toMatch(/kept \/srv\/web.qcow2: needed by saved image \/srv\/x.image\n.*--drop-saved/);
    expect(services.images.removals).toEqual([{ id: IMAGE, options: { isForced: true, isDroppingSaved: true } }]);
    await run('vmctl', 'image', 'load', '/srv/x.image', '--disks', 'assume', '--trust');
    expect(images).toMatchObject({ saves: [{ withDisks: true }], loads: [{ isAssumed: true, isTrusted: true }] });
    expect((await run('vmctl', 'image', 'prune', '--dry-run')).stdout).toMatch(/would remove image 0011.*\nwould free/);
    expect((await run('vmctl', 'image', 'prune')).stdout).toMatch(/^removed image 00112233445566ff: 128 MiB\nfreed/);
    expect((await run('vmctl', 'flatten', 'web')).stdout).toMatch(/^web:\n {2}merged \/srv\/web.qcow2.0011/);
  });

  test('pool warm, list and drain', async () => {
    expect(await run('vmctl', 'pool', 'warm', 'web', '--clones', '4', '--network', 'none')).toMatchObject({ code: 0 });
    expect((await run('vmctl', 'pool')).stdout).toMatch(/web +4 +4 +cow +none/);
    expect((await run('vmctl', 'pool', 'drain', 'web')).stdout).toBe('ended 4 processes\n');
    expect(await run('vmctl', 'pool', 'warm', 'web')).toMatchObject({ code: 2 });
  });

  test('stop --image ends all clones of an image', async () => {
    await services.vms.run(vmView('web-5') as never);
    services.images.views.set(IMAGE, imageView(IMAGE, { clones: ['web-5'] }));
    expect(await run('vmctl', 'stop', '--image', IMAGE)).toMatchObject({ code: 0, stdout: 'stopped 1 clone\n' });
    expect(await run('vmctl', 'stop')).toMatchObject({ code: 2 });
    expect(await run('vmctl', 'stop', 'web', '--image', IMAGE)).toMatchObject({ code: 2 });
  });

  test('what all hosts have is shown with the hosts, and so is who does not answer', async () => {
    const error = new MigrationError('UNREACHABLE', 'host B cannot be reached');
    const images = [imageView(IMAGE, { host: 'B', state: 'filling', pagesTotal: 10, pagesDone: 4 })];
    services.images.views.set(IMAGE, imageView(IMAGE));
    services.answers.set('imageViews', () => ({ images }));
    const shown = (await run('vmctl', 'images', '--all-hosts')).stdout;
    expect(shown).toMatch(/00112233445566ff +A +complete +65536 +256 MiB +128 MiB/);
    expect(shown).toMatch(/00112233445566ff +B +filling +4\/10 40 % +256 MiB/);
    services.answers.set('vmViews', () => {
      throw error;
    });
    const vms = await run('vmctl', 'ps', '--all-hosts');
    expect(vms).toMatchObject({
      code: 0,
      stdout: expect.stringContaining('no answer from B: host B cannot') as string,
    });
  });

  test('stop --image and image rm reach all hosts, and fail if one does not answer', async () => {
    const uuid = '00000000-0000-4000-8000-00000000000b';
    const onB = vmView('web-6', { uuid, host: 'B', image: IMAGE });
    services.answers.set('imageClones', () => ({ clones: [onB] }));
    services.answers.set('stopClones', () => ({ stopped: ['web-6'], failures: [] }));
    services.answers.set('imageViews', () => ({ images: [imageView(IMAGE, { host: 'B' })] }));
    services.answers.set('removeImage', () => ({ id: IMAGE, freedBytes: 4096, mergedDisks: [], keptLayers: [] }));
    expect(await run('vmctl', 'stop', '--image', IMAGE)).toMatchObject({ code: 0, stdout: 'stopped 1 clone\n' });
    expect(services.calls.at(-1)).toEqual({ method: 'stopClones', args: [[{ name: 'web-6', uuid }], false] });
    expect(await run('vmctl', 'stop', '--image', IMAGE, '--this-host')).toMatchObject({ code: 1 });
    const removed = await run('vmctl', 'image', 'rm', IMAGE, '--all-hosts');
    expect(removed).toMatchObject({ code: 0, stdout: expect.stringMatching(/^B: removed image 0011/) as string });
    services.images.views.set(IMAGE, imageView(IMAGE));
    services.answers.set('imageClones', () => {
      throw new MigrationError('TIMEOUT', 'B did not answer within 5 s');
    });
    const silent = await run('vmctl', 'stop', '--image', IMAGE);
    expect(silent).toMatchObject({ code: 1, stdout: expect.stringContaining('no answer from B') as string });
  });

  test('logs of a VM on another host', async () => {
    services.peers.serialLog = async (host, vm) => Readable.from([`${vm} on ${host}\n`]);
    expect(await run('vmctl', 'logs', 'web-6', '--on', 'B')).toMatchObject({ code: 0, stdout: 'web-6 on B\n' });
  });

  test('image copy is a fork without clones on that host', async () => {
    expect(await run('vmctl', 'image', 'copy', IMAGE, 'B', '--detach')).toMatchObject({ code: 0 });
    const hosts = [{ host: 'B', cloneCount: 0 }];
    expect(services.jobs.forkRequests).toMatchObject([{ vm: null, image: IMAGE, cloneCount: 0, hosts }]);
    services.answers.set('imageViews', () => ({ images: [imageView(IMAGE, { host: 'B' })] }));
    const copying = run('vmctl', 'image', 'copy', IMAGE, 'B');
    await nextJobEnds({ state: 'done', report: { ...FORK_REPORT, clones: [] } });
    const copied = await copying;
    expect(copied).toMatchObject({ code: 0, stdout: expect.stringMatching(/0011\S+ +B +complete/) as string });
  });

  test('image fetch has a host read the rest of an image, and waits for it', async () => {
    const pages = [10, 40, 65_536];
    services.answers.set('imageViews', () => {
      const pagesDone = pages.length > 1 ? pages.shift() : pages[0];
      const state = pagesDone === 65_536 ? 'complete' : 'filling';
      return { images: [imageView(IMAGE, { host: 'B', state, pagesDone: pagesDone ?? 0 })] };
    });
    const fetched = await run('vmctl', 'image', 'fetch', IMAGE, '--on', 'B', '--json');
    expect(fetched).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(fetched.stdout)).toMatchObject({ host: 'B', state: 'complete' });
    expect(services.calls.filter(({ method }) => method === 'completeImage')).toHaveLength(3);
    services.answers.set('completeImage', () => {
      throw new MigrationError('CONFLICT', 'it has failed');
    });
    expect(await run('vmctl', 'image', 'fetch', IMAGE)).toMatchObject({ code: 1 });
  });
});
