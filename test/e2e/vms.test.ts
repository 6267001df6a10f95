import { execFile, spawn } from 'node:child_process';
import { access, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { openConsole } from '../../src/agent/console.js';
import { hostFacts } from '../../src/agent/host-facts.js';
import { parseSpec } from '../../src/agent/spec.js';
import { migrationBlockers, ramFacts } from '../../src/agent/vm-facts.js';
import { type VmExit, VmManager } from '../../src/agent/vms.js';
import type { VmSpec } from '../../src/domain.js';
import { FileRegistry } from '../../src/registry/file.js';
import { guestImage } from '../hosts/guest.js';

const run = promisify(execFile);
const silent = { info: () => undefined, warn: () => undefined, error: () => undefined };

let directory: string;
let ramDir: string;
let registry: FileRegistry;
let vms: VmManager;

function manager(): VmManager {
  return new VmManager({
    host: 'A',
    stateDir: join(directory, 'A'),
    ramDir,
    accel: 'tcg',
    preloadPath: null,
    native: null,
    registry,
    log: silent,
  });
}

/** What a restart of the daemon does to its VMs. */
async function restart(): Promise<void> {
  await vms.close();
  vms = manager();
  await vms.start();
}

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-vms-'));
  ramDir = await mkdtemp('/dev/shm/vmg-vms-');
  registry = await FileRegistry.open(join(directory, 'registry'));
  vms = manager();
  await vms.start();
});

afterEach(async () => {
  for (const vm of vms.all()) await vms.destroy(vm.spec.name);
  await vms.close();
  await registry.close();
  expect(await readdir(ramDir)).toEqual([]);
  expect(await readdir(join(directory, 'A/vms'))).toEqual([]);
  expect(await runningQemus()).toEqual([]);
  await rm(directory, { recursive: true, force: true });
  await rm(ramDir, { recursive: true, force: true });
});

/** Every QEMU that has this test's directory on its command line. */
async function runningQemus(): Promise<string[]> {
  const found: string[] = [];
  for (const pid of await readdir('/proc')) {
    if (!/^\d+$/.test(pid)) continue;
    const line = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
    if (line.includes(`${directory}/`)) found.push(line);
  }
  return found;
}

function spec(change: Record<string, unknown> = {}): VmSpec {
  return parseSpec({ name: 'vm', memory: { size: '64M' }, preload: false, accel: 'tcg', ...change });
}

const failure = (promise: Promise<unknown>) =>
  promise.then(
    () => 'resolved',
    (error: { code?: string }) => error.code ?? 'an error without code',
  );

function exits(): [string, VmExit][] {
  const seen: [string, VmExit][] = [];
  vms.on('exit', (name, info) => seen.push([name, info]));
  return seen;
}

describe('a VM', () => {
  test('runs, pauses, resumes, stops, and is forgotten', async () => {
    const view = await vms.run(spec({ cpus: 2 }));
    expect(view).toMatchObject({ name: 'vm', host: 'A', state: 'running', epoch: 1, accel: 'tcg', job: null });
    expect(view.machine).toMatch(/^pc-q35-\d/);
    expect(await registry.owner('vm')).toEqual({ vm: 'vm', owner: 'A', epoch: 1, session: null });
    expect(await vms.get('vm').qmp.execute('query-status')).toMatchObject({ running: true });
    await vms.pause('vm');
    expect(vms.list()[0]?.state).toBe('paused');
    expect(await vms.get('vm').qmp.execute('query-status')).toMatchObject({ running: false });
    await vms.resume('vm');
    expect(vms.list()[0]?.state).toBe('running');
    await vms.stop('vm', { isForced: false });
    expect(vms.list()[0]).toMatchObject({ state: 'stopped', pid: null });
    expect(vms.exitOf('vm')).toMatchObject({ reason: 'host-qmp-quit', code: 0 });
    expect(await readdir(ramDir)).toEqual([]);
    expect(() => vms.get('vm').pid).toThrow(/ended/);
    await vms.stop('vm', { isForced: false });
    expect(vms.list()).toEqual([]);
    expect(await registry.owner('vm')).toBeNull();
  });

  test('whose QEMU someone else pauses is seen as paused', async () => {
    await vms.run(spec());
    await vms.get('vm').qmp.execute('stop');
    await expect.poll(() => vms.list()[0]?.state).toBe('paused');
  });

  test('outlives the daemon and is found again', async () => {
    const { pid } = await vms.run(spec());
    await vms.pause('vm');
    await restart();
    expect(vms.list()[0]).toMatchObject({ state: 'paused', pid });
    await vms.resume('vm');
    const seen = exits();
    process.kill(vms.get('vm').pid, 'SIGKILL');
    await expect.poll(() => seen.length, { timeout: 5000 }).toBe(1);
    expect(seen[0]).toMatchObject(['vm', { reason: 'killed' }]);
    expect(vms.list()[0]).toMatchObject({ state: 'stopped', pid: null });
  });

  test('whose QEMU is killed is stopped, and its memory is given back', async () => {
    await vms.run(spec());
    const seen = exits();
    process.kill(vms.get('vm').pid, 'SIGKILL');
    await expect.poll(() => seen.length, { timeout: 5000 }).toBe(1);
    expect(seen[0]).toMatchObject(['vm', { reason: 'killed', signal: 'SIGKILL' }]);
    await expect.poll(() => readdir(ramDir)).toEqual([]);
    expect(await failure(vms.pause('vm'))).toBe('CONFLICT');
  });

  test('whose QEMU ends while no daemon runs is found stopped', async () => {
    const { pid } = await vms.run(spec());
    await vms.close();
    process.kill(pid ?? 0, 'SIGKILL');
    await expect.poll(runningQemus).toEqual([]);
    vms = manager();
    await vms.start();
    expect(vms.list()[0]).toMatchObject({ state: 'stopped', pid: null });
    expect(vms.exitOf('vm')?.reason).toBe('vanished');
  });

  test('gives its name to a new one only when it has stopped', async () => {
    await vms.run(spec());
    expect(await failure(vms.run(spec()))).toBe('CONFLICT');
    expect(await failure(vms.prepareIncoming(spec(), { session: 's', accel: 'tcg', epoch: 9 }))).toBe('CONFLICT');
    await vms.stop('vm', { isForced: true });
    expect((await vms.run(spec())).state).toBe('running');
  });

  test('of one name is started once, however often it is asked for at the same time', async () => {
    const answers = await Promise.all([1, 2, 3].map(() => failure(vms.run(spec()))));
    expect(answers.sort()).toEqual(['CONFLICT', 'CONFLICT', 'resolved']);
  });

  test('in a job is left alone by users', async () => {
    await vms.run(spec());
    await vms.reserve('vm', 'job-1');
    await vms.reserve('vm', 'job-1');
    expect(await failure(vms.reserve('vm', 'job-2'))).toBe('VM_BUSY');
    for (const call of [vms.pause('vm'), vms.resume('vm'), vms.stop('vm', { isForced: false })]) {
      expect(await failure(call)).toBe('VM_BUSY');
    }
    await restart();
    expect(vms.get('vm').job).toBe('job-1');
    await vms.unreserve('vm', 'job-2');
    expect(vms.get('vm').job).toBe('job-1');
    await vms.unreserve('vm', 'job-1');
    await vms.pause('vm');
  });

  test('that belongs to another host is left alone', async () => {
    await vms.run(spec());
    await registry.swapOwner('vm', 1, { vm: 'vm', owner: 'B', epoch: 2, session: null });
    expect(await failure(vms.resume('vm'))).toBe('OWNER_CHANGED');
    expect(await failure(vms.stop('vm', { isForced: true }))).toBe('OWNER_CHANGED');
    await vms.destroy('vm');
    expect(await registry.owner('vm')).toMatchObject({ owner: 'B' });
  });

  test('that has departed keeps its memory even if QEMU ends', async () => {
    await vms.run(spec());
    await vms.setState('vm', 'departed');
    const seen = exits();
    process.kill(vms.get('vm').pid, 'SIGKILL');
    await expect.poll(() => seen.length, { timeout: 5000 }).toBe(1);
    await restart();
    expect(vms.list()[0]).toMatchObject({ state: 'departed', pid: null });
    await access(vms.get('vm').regions[0]?.path ?? '');
  });

  test('answers pre-flight', async () => {
    await vms.run(spec({ nics: [{}] }));
    const vm = vms.get('vm');
    expect(await migrationBlockers(vm)).toEqual([]);
    expect(await ramFacts(vm)).toEqual({ isRamShared: true, isRamNamedFile: true });
    await vms.run(spec({ name: 'private', memory: { size: '64M', backing: 'private' } }));
    expect(await ramFacts(vms.get('private'))).toEqual({ isRamShared: false, isRamNamedFile: false });
    const image = join(directory, 'disk.vdi');
    await run('qemu-img', ['create', '-f', 'vdi', image, '1M']);
    const blockdev = `driver=vdi,node-name=stuck,file.driver=file,file.filename=${image}`;
    await vms.run(spec({ name: 'stuck', qemuArgs: ['-blockdev', blockdev] }));
    expect(await migrationBlockers(vms.get('stuck'))).toEqual([expect.stringContaining('vdi')]);
    const facts = await hostFacts(vms, vms.place);
    expect(facts.vmNames.toSorted()).toEqual(['private', 'stuck', 'vm']);
    expect(facts.qemuVersion).toMatch(/^\d+\.\d+\.\d+$/);
    expect(facts.memoryAvailableBytes).toBeGreaterThan(0);
    expect(facts.ramFileFreeBytes).toBeGreaterThan(0);
  });
});

describe('a target', () => {
  const incoming = { session: 's1', accel: 'tcg', epoch: 7 } as const;

  test('waits, survives a restart, and is not started by users', async () => {
    const vm = await vms.prepareIncoming(spec({ memory: { regions: [{ size: '32M' }, { size: '32M' }] } }), incoming);
    expect(vm).toMatchObject({ state: 'incoming', session: 's1', epoch: 7 });
    expect(await vm.qmp.execute('query-status')).toMatchObject({ status: 'inmigrate' });
    expect(await vms.prepareIncoming(spec(), incoming)).toBe(vm);
    expect(await failure(vms.resume('vm'))).toBe('CONFLICT');
    await restart();
    expect(vms.get('vm')).toMatchObject({ state: 'incoming', session: 's1' });
    expect(vms.presencePath('vm', 'ram0')).toBe(join(ramDir, 'vm/ram0.presence'));
  });

  test('of an epoch that is not newer is refused', async () => {
    await registry.swapOwner('vm', null, { vm: 'vm', owner: 'A', epoch: 7, session: null });
    expect(await failure(vms.prepareIncoming(spec(), incoming))).toBe('OWNER_CHANGED');
  });

  test('is removed while it is still starting', async () => {
    const preparing = failure(vms.prepareIncoming(spec(), incoming));
    await expect.poll(() => vms.has('vm')).toBe(true);
    await vms.destroy('vm');
    expect(['CANCELLED', 'QEMU_GONE', 'QEMU_FAILED', 'resolved']).toContain(await preparing);
    expect(vms.list()).toEqual([]);
  });

  // Memory is copied by hand here: what is shown is that the two command lines give the guest one and the same machine.
  test('carries on where the source was stopped', async () => {
    const append = 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=16';
    const devices = {
      nics: [{}, {}],
      cpus: 2,
      devices: ['virtio-rng-pci'],
      disks: [{ path: join(directory, 'disk') }],
    };
    const regions = [{ size: '96M' }, { size: '96M' }];
    await writeFile(join(directory, 'disk'), Buffer.alloc(1 << 20));
    await vms.run(spec({ ...guestImage(), append, ...devices, memory: { regions } }));
    const source = vms.get('vm');
    await expect.poll(() => readFile(vms.serialPaths('vm').log, 'utf8'), { timeout: 90_000 }).toContain('VMG WORK');
    const registryB = await FileRegistry.open(join(directory, 'registry-B'));
    const other = new VmManager({
      host: 'B',
      stateDir: join(directory, 'B'),
      ramDir: join(ramDir, 'B'),
      accel: 'tcg',
      preloadPath: null,
      native: null,
      registry: registryB,
      log: silent,
    });
    await other.start();
    try {
      const target = await other.prepareIncoming(source.spec, incoming);
      const capabilities = [{ capability: 'x-ignore-shared', state: true } as const];
      await source.qmp.execute('migrate-set-capabilities', { capabilities });
      await target.qmp.execute('migrate-set-capabilities', { capabilities });
      await source.qmp.execute('stop');
      for (const [index, region] of source.regions.entries()) {
        const to = target.regions[index]?.path ?? '';
        await run('dd', [`if=${region.path}`, `of=${to}`, 'bs=1M', 'conv=notrunc,sparse']);
      }
      const uri = `unix:${join(directory, 'state.sock')}`;
      await target.qmp.execute('migrate-incoming', { uri });
      await source.qmp.execute('migrate', { uri });
      const status = async () => (await target.qmp.execute('query-status')).status;
      await expect.poll(status, { timeout: 10_000 }).toBe('paused');
      await expect.poll(async () => (await source.qmp.execute('query-migrate')).status).toBe('completed');
      await vms.destroy('vm');
      await other.setState('vm', 'running');
      await target.qmp.execute('cont');
      expect(other.list()[0]).toMatchObject({ state: 'running', epoch: 7 });
      const { socket, log } = other.serialPaths('vm');
      const line = await openConsole({ socketPath: socket, logPath: log, backlogBytes: 0, isFollowing: true });
      line.write('verify\n');
      expect(await expectOutput(line, /VERIFY pages \d+ bad \d+/, 60_000)).toContain('pages 4096 bad 0');
      line.destroy();
    } finally {
      await other.destroy('vm');
      await other.close();
      await registryB.close();
      await rm(join(ramDir, 'B'), { recursive: true });
    }
  });
});

describe('nothing is left of a start that fails', () => {
  afterEach(async () => {
    expect(vms.list()).toEqual([]);
    expect(await registry.owner('vm')).toBeNull();
  });

  test.each([
    ['an unknown option', { qemuArgs: ['-no-such-option'] }, /no-such-option/],
    ['an unknown device', { devices: ['no-such-device'] }, /no-such-device/],
    ['a missing kernel', { kernel: '/no/such/kernel' }, /no\/such\/kernel/],
    ['a missing disk', { disks: [{ path: '/no/such/disk' }] }, /no\/such\/disk/],
  ])('%s: QEMU_FAILED with what QEMU said', async (_what, change, words) => {
    const error: unknown = await vms.run(spec(change)).catch((thrown: unknown) => thrown);
    expect(error).toMatchObject({ code: 'QEMU_FAILED', message: expect.stringMatching(words) as string });
  });

  test.each([
    ['an unknown machine', { machine: 'pc-q35-99.9' }, 'UNSUPPORTED'],
    ['the preload, where there is none', { preload: true }, 'UNSUPPORTED'],
    ['more memory than there is', { memory: { size: '15T' } }, 'OUT_OF_MEMORY'],
    ['huge pages that nobody has mounted', { memory: { size: '1G', pageSize: '1G' } }, 'UNSUPPORTED'],
    ['a bridge that is not there', { nics: [{ bridge: 'no-such-bridge' }] }, 'NOT_FOUND'],
  ])('%s', async (_what, change, code) => {
    expect(await failure(vms.run(spec(change)))).toBe(code);
  });

  test('a name too long for a socket', async () => {
    await vms.close();
    const outer = directory;
    directory = join(outer, 'x'.repeat(60));
    try {
      await mkdir(directory, { recursive: true });
      vms = manager();
      await vms.start();
      expect(await failure(vms.run(spec({ name: 'n'.repeat(60) })))).toBe('SPEC_INVALID');
    } finally {
      await vms.close();
      directory = outer;
      vms = manager();
      await vms.start();
    }
  });

  test('a crash in the middle of a start: the next daemon removes it', async () => {
    await vms.run(spec());
    await vms.close();
    const path = join(directory, 'A/vms/vm/record.json');
    const record = JSON.parse(await readFile(path, 'utf8')) as Record<string, unknown>;
    // As it is between QEMU's start and the note of its pid.
    await writeFile(path, JSON.stringify({ ...record, state: 'starting', process: null }));
    vms = manager();
    await vms.start();
    expect(await runningQemus()).toEqual([]);
  });
});

test('a record that cannot be read keeps its name, and harms no other', async () => {
  await vms.run(spec({ name: 'good' }));
  await vms.close();
  await mkdir(join(directory, 'A/vms/bad'));
  await writeFile(join(directory, 'A/vms/bad/record.json'), '{"version":1,');
  vms = manager();
  await vms.start();
  expect(vms.list().map((vm) => vm.name)).toEqual(['good']);
  expect(await failure(vms.run(spec({ name: 'bad' })))).toBe('CORRUPT');
  await rm(join(directory, 'A/vms/bad'), { recursive: true });
});

test('the console: past and present output to each reader, input to the guest', async () => {
  await vms.run(
    spec({ ...guestImage(), memory: { size: '192M' }, append: 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=16' }),
  );
  const { socket, log } = vms.serialPaths('vm');
  const open = () => openConsole({ socketPath: socket, logPath: log, backlogBytes: 65_536, isFollowing: true });
  const early = await open();
  await expectOutput(early, /VMG WORK/, 90_000);
  const logged = await readFile(log, 'utf8');
  const late = await open();
  const backlog = expectOutput(late, /VMG BOOT/, 5_000);
  expect(logged).toContain('VMG BOOT');
  await backlog;
  late.write('verify\n');
  expect(await expectOutput(late, /VERIFY pages \d+ bad \d+/, 60_000)).toContain('bad 0');
  const ended = new Promise((resolve) => early.once('close', resolve));
  early.resume();
  await vms.stop('vm', { isForced: false });
  await ended;
  late.destroy();
  const past = await openConsole({ socketPath: null, logPath: log, backlogBytes: 100, isFollowing: false });
  const chunks: Buffer[] = [];
  for await (const chunk of past) chunks.push(chunk as Buffer);
  expect(Buffer.concat(chunks)).toHaveLength(100);
});

async function expectOutput(stream: NodeJS.ReadableStream, wanted: RegExp, timeoutMs: number): Promise<string> {
  let text = '';
  const listen = (chunk: Buffer) => {
    text += chunk.toString();
  };
  stream.on('data', listen);
  try {
    for (const startMs = Date.now(); !wanted.test(text); await sleep(50)) {
      if (Date.now() - startMs > timeoutMs)
        throw new Error(`no ${String(wanted)} on the console:\n${text.slice(-2000)}`);
    }
  } finally {
    stream.off('data', listen);
  }
  return wanted.exec(text)?.[0] ?? '';
}

test('a tap on a bridge, in a network of its own', async () => {
  const script = `
    import { createTaps, listBridges, removeTaps, tapNames } from './src/agent/network.ts';
    import { parseSpec } from './src/agent/spec.ts';
    import { execFileSync } from 'node:child_process';
    const ip = (...args: string[]) => execFileSync('ip', args, { encoding: 'utf8' });
    void (async () => {
      ip('link', 'add', 'br0', 'type', 'bridge');
      const spec = parseSpec({ name: 'vm', memory: { size: '64M' }, nics: [{ bridge: 'br0' }, {}] });
      const taps = tapNames('A', spec);
      await createTaps(spec, taps);
      const joined = ip('link', 'show', 'master', 'br0');
      // As after a crash: the tap is there already.
      await createTaps(spec, taps);
      await removeTaps(taps);
      await removeTaps(taps);
      const left = ip('-o', 'link', 'show').split('\\n').filter((line) => line.includes('vmg'));
      console.log(JSON.stringify({ bridges: await listBridges(), taps, joined, left }));
    })();
  `;
  const { stdout } = await run('unshare', ['--net', 'node_modules/.bin/tsx', '--eval', script]);
  const seen = JSON.parse(stdout) as {
    bridges: string[];
    taps: Record<string, string>;
    joined: string;
    left: string[];
  };
  expect(seen.bridges).toEqual(['br0']);
  expect(Object.keys(seen.taps)).toEqual(['net0']);
  expect(seen.taps['net0']).toMatch(/^vmg[0-9a-f]{12}$/);
  expect(seen.joined).toContain(seen.taps['net0']);
  expect(seen.left).toEqual([]);
});

test('QEMU is not disturbed by the end of the process that started it', async () => {
  const script = `
    import { startDetached } from './src/agent/vm-process.ts';
    void (async () => {
      const options = { outputPath: process.argv[1] + '/out', directory: process.argv[1], environment: { MARK: 'yes' } };
      const { identity } = await startDetached('/bin/sh', ['-c', 'echo $MARK; exec sleep 60'], options);
      console.log(JSON.stringify(identity));
      process.kill(process.pid, 'SIGKILL');
    })();
  `;
  const child = spawn('node_modules/.bin/tsx', ['--eval', script, directory], { stdio: ['ignore', 'pipe', 'inherit'] });
  const [output] = (await new Promise<[Buffer]>((resolve) =>
    child.stdout.once('data', (data: Buffer) => resolve([data])),
  )) as [Buffer];
  const identity = JSON.parse(output.toString()) as { pid: number; startTicks: string; bootId: string };
  const { isAlive, endProcess } = await import('../../src/agent/vm-process.js');
  await sleep(200);
  expect(await isAlive(identity)).toBe(true);
  expect(await isAlive({ ...identity, startTicks: '1' })).toBe(false);
  expect(await readFile(join(directory, 'out'), 'utf8')).toBe('yes\n');
  await endProcess(identity, 1000);
  expect(await isAlive(identity)).toBe(false);
});
