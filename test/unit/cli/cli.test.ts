/** The commands as processes against a daemon with fakes behind its API: exit codes and output on stdout. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest';
import { unreachable } from '../../../src/api/client.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { exitCodeOfJob } from '../../../src/cli/exit-codes.js';
import { openStateDirectory } from '../../../src/durable/state-directory.js';
import { loadNativeBinding } from '../../../src/native/binding.js';
import { type FakeServices, fakeServices, REPORT, vmEvent } from '../../support/api-fakes.js';
import { rdma } from '../planner/planner-facts.js';

// Each case is a process of its own, which starts slowly on a busy machine.
vi.setConfig({ testTimeout: 60_000 });

const ROOT = fileURLToPath(new URL('../../..', import.meta.url));

interface Ended {
  code: number | null;
  stdout: string;
  stderr: string;
}

let directory: string;
let socketPath: string;
let services: FakeServices;
let server: ApiServer;

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-cli-'));
  socketPath = join(directory, 'api.sock');
  services = fakeServices();
  server = buildServer(services);
  await server.listenUnix(socketPath);
});
afterAll(async () => {
  await server.close();
  await rm(directory, { recursive: true, force: true });
});
beforeEach(() => {
  services.jobs.refusals = [];
  services.jobs.requests.length = 0;
});

function start(
  program: string,
  args: readonly string[],
  host = `unix:${socketPath}`,
): { child: ChildProcess; ended: Promise<Ended> } {
  const child = spawn(process.execPath, ['--import', 'tsx', join(ROOT, `src/cli/${program}.ts`), ...args], {
    cwd: ROOT,
    env: { ...process.env, VMIGRATE_HOST: host, NODE_OPTIONS: '' },
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (data: Buffer) => (stdout += data.toString()));
  child.stderr.on('data', (data: Buffer) => (stderr += data.toString()));
  const ended = new Promise<Ended>((resolve) => child.once('close', (code) => resolve({ code, stdout, stderr })));
  return { child, ended };
}

const run = (program: string, ...args: string[]): Promise<Ended> => start(program, args).ended;

/** Applies `change` to the next submitted job once a client watches it. */
async function nextJobEnds(change: Parameters<FakeServices['jobs']['change']>[1]): Promise<void> {
  const known = services.jobs.views.size;
  const id = `job-${known + 1}`;
  while (![...services.jobs.listeners].some((entry) => entry.id === id))
    await new Promise((resolve) => setTimeout(resolve, 5));
  services.jobs.change(id, change);
}

describe('every command', () => {
  test.each(['vmctl', 'vmigrate', 'vfork', 'vmigrated'])('%s tells its version', async (program) => {
    expect(await run(program, '--version')).toEqual({ code: 0, stdout: '0.1.0\n', stderr: '' });
  });
});

describe('a daemon that cannot be used', () => {
  const ask = (host: string) => start('vmctl', ['ps', '--host', host]).ended;

  test('is not called absent if only its socket is closed to this user', async () => {
    const error = Object.assign(new Error('connect EACCES'), { code: 'EACCES' });
    expect(unreachable({ host: 'unix:/run/x.sock', tls: null }, error)).toMatchObject({
      code: 'UNREACHABLE',
      message: "this user may not use the daemon's socket /run/x.sock",
      remedy: expect.stringContaining('https with a certificate'),
    });
  });

  test('is told apart from one that nobody has started, and from one that refuses the certificate', async () => {
    const absent = await ask(`unix:${directory}/none.sock`);
    expect(absent).toMatchObject({
      code: 5,
      stderr: expect.stringMatching(/no daemon answers.*\n[^]*start vmigrated/),
    });
    const texts = ['ECONNREFUSED', 'ECONNRESET', 'CERT_HAS_EXPIRED'].map(
      (code) =>
        unreachable({ host: 'https://10.0.0.1:7400', tls: '/tls' }, Object.assign(new Error(code), { code })).message,
    );
    expect(texts).toEqual([
      'no daemon answers at https://10.0.0.1:7400',
      'the daemon at https://10.0.0.1:7400 closed the connection: it probably does not accept the certificate in /tls',
      'the certificate of the daemon at https://10.0.0.1:7400 is not accepted here: CERT_HAS_EXPIRED',
    ]);
  });
});

describe('vmigrate', () => {
  test('2: a limit of the downtime where none holds', async () => {
    const ended = await run('vmigrate', 'web', 'B', '--max-downtime', '300');
    expect(ended).toMatchObject({ code: 2, stdout: '' });
    expect(ended.stderr).toMatch(/--max-downtime is for pre-copies; a postcopy does not wait for memory/);
  });

  test('0: done, with the report as the only thing on stdout', async () => {
    const [ended] = await Promise.all([
      run('vmigrate', 'web', 'B', '--json'),
      nextJobEnds({ state: 'done', report: REPORT }),
    ]);
    expect(ended).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(ended.stdout)).toEqual(REPORT);
  });

  test('1: failed, the VM runs where it was', async () => {
    const error = { code: 'STEP_FAILED', message: 'connect failed' };
    const [ended] = await Promise.all([run('vmigrate', 'web', 'B'), nextJobEnds({ state: 'failed', error })]);
    expect(ended).toMatchObject({ code: 1, stdout: '' });
    expect(ended.stderr).toMatch(/web runs on A: the migration failed \(STEP_FAILED\)\n {2}because: connect failed/);
  });

  test('4: paused, and how to recover it', async () => {
    const [ended] = await Promise.all([run('vmigrate', 'web', 'B', '--json'), nextJobEnds({ state: 'needsRecovery' })]);
    expect(ended.code).toBe(4);
    const { error } = JSON.parse(ended.stdout) as { error: { code: string; remedy: string } };
    expect(error.code).toBe('NEEDS_RECOVERY');
    expect(error.remedy).toMatch(/vmigrate --recover job-\d+$/);
  });

  test('3: refused by pre-flight, also for --dry-run', async () => {
    services.jobs.refusals = [{ code: 'TRANSPORT_UNAVAILABLE', reason: 'no verbs', remedy: 'use --tcp' }];
    const [refused, dry] = await Promise.all([
      run('vmigrate', 'web', 'B', '--rdma', '--json'),
      run('vmigrate', 'web', 'B', '--rdma', '--dry-run'),
    ]);
    expect(refused.code).toBe(3);
    expect(JSON.parse(refused.stdout)).toMatchObject({
      error: { code: 'PREFLIGHT_REFUSED', details: services.jobs.refusals },
    });
    expect(dry).toMatchObject({ code: 3, stdout: expect.stringContaining('use --tcp') });
    expect(services.jobs.requests.map(({ transport }) => transport)).toEqual(['rdma', 'rdma']);
  });

  test('5: no daemon', async () => {
    const ended = await start('vmigrate', ['web', 'B', '--json'], `unix:${directory}/none`).ended;
    expect(ended).toMatchObject({ code: 5, stderr: '' });
    expect(JSON.parse(ended.stdout)).toMatchObject({ error: { code: 'UNREACHABLE' } });
  });

  test.each([
    [[]],
    [['web']],
    [['web', 'B', 'C']],
    [['web', 'B', '--no-such-flag']],
    [['web', 'B', '--precopy', '--postcopy']],
    [['web', 'B', '--max-downtime', '5']],
    [['web', 'B', '--hybrid', '--postcopy']],
    [['web', 'B', '--hybrid', '--max-downtime', '5']],
    [['web', 'B', '--tcp', '--shm']],
    [['web', 'B', '--bandwidth', '-1']],
    [['web', 'B', '--bandwidth', '1e3']],
    [['web', 'B', '--max-downtime', '0']],
    [['web', '--recover', 'job-1']],
    [['we b', 'B']],
    [['web', 'B', '--host', 'ftp://x']],
    [['web', 'B', '--host', 'https://127.0.0.1:1']],
  ])('2: usage, %j', async (args) => {
    const ended = await run('vmigrate', ...args);
    expect(ended).toMatchObject({ code: 2, stdout: '' });
    expect(ended.stderr).not.toBe('');
    expect(services.jobs.requests).toEqual([]);
  });

  test('a usage error is JSON too', async () => {
    const ended = await run('vmigrate', '--nope', '--json');
    expect(ended.code).toBe(2);
    expect(JSON.parse(ended.stdout)).toMatchObject({ error: { code: 'USAGE' } });
  });

  test('flags become a request', async () => {
    for (const flags of [
      ['--native'],
      ['--native', '--postcopy', '--bandwidth', '100', '--max-downtime', '50'],
      ['--shm'],
      ['--hybrid', '--verify-memory'],
      ['--precopy', '--max-downtime', '80'],
    ])
      expect(await run('vmigrate', 'web', 'B', '--detach', ...flags)).toMatchObject({
        code: 0,
        stdout: expect.stringMatching(/^job-\d+\n$/),
      });
    expect(services.jobs.requests).toMatchObject([
      { mode: 'native-precopy', transport: 'auto' },
      { mode: 'native-postcopy', bandwidthBytesPerS: 100 * 2 ** 20, downtimeMsMax: 50 },
      { mode: 'postcopy', transport: 'shm' },
      { mode: 'hybrid', verifyMemory: true },
      { mode: 'precopy', downtimeMsMax: 80 },
    ]);
  });

  test('Ctrl-C asks to cancel once; a second one leaves the job to the daemon', async () => {
    const cancelled = services.jobs.cancel.bind(services.jobs);
    const asked: string[] = [];
    services.jobs.cancel = (id) => {
      asked.push(id);
      return Promise.resolve(services.jobs.get(id)); // too late: the job continues
    };
    const { child, ended } = start('vmigrate', ['web', 'B']);
    const id = `job-${services.jobs.views.size + 1}`;
    while (![...services.jobs.listeners].some((entry) => entry.id === id))
      await new Promise((resolve) => setTimeout(resolve, 5));
    child.kill('SIGINT');
    await expect.poll(() => asked, { timeout: 10_000 }).toEqual([id]);
    child.kill('SIGINT');
    expect(await ended).toMatchObject({ code: 0, stdout: expect.stringContaining(`${id} continues in the daemon`) });
    expect(asked).toEqual([id]);
    services.jobs.cancel = cancelled;
  });
});

test('every state of a job has its exit code', () => {
  const states = ['done', 'failed', 'cancelled', 'lost', 'needsRecovery'] as const;
  expect(states.map(exitCodeOfJob)).toEqual([0, 1, 1, 6, 4]);
});

describe('vmctl', () => {
  test('starts, lists, shows, pauses and stops a VM', async () => {
    const spec = join(directory, 'vm.yaml');
    await writeFile(spec, 'name: web\nmemory: {size: 64M}\n');
    expect(await run('vmctl', 'run', spec)).toMatchObject({ code: 0, stdout: expect.stringContaining('web') });
    const listed = await run('vmctl', 'ps', '--json');
    expect(JSON.parse(listed.stdout)).toMatchObject([{ name: 'web', state: 'running' }]);
    expect((await run('vmctl', '--json', 'show', 'web')).stdout).toContain('"epoch": 1');
    expect((await run('vmctl', 'pause', 'web')).stdout).toContain('paused');
    expect((await run('vmctl', 'stop', 'web', '--force')).code).toBe(0);
    expect((await run('vmctl', 'show', 'web')).code).toBe(1);
  });

  test('warns of what the start of a VM could not find out, on stderr', async () => {
    const spec = join(directory, 'vm.yaml');
    await writeFile(spec, 'name: web\nmemory: {size: 64M}\n');
    const run0 = services.vms.run.bind(services.vms);
    const asked: unknown[] = [];
    services.vms.run = async (given, options) => {
      asked.push(options);
      return { ...(await run0(given, options)), warnings: ['B does not answer'] };
    };
    try {
      expect(await run('vmctl', 'run', spec)).toMatchObject({ code: 0, stderr: 'warning: B does not answer\n' });
      expect(await run('vmctl', 'run', spec, '--force-name')).toMatchObject({ code: 0 });
      expect(asked).toEqual([{ isNameForced: false }, { isNameForced: true }]);
    } finally {
      services.vms.run = run0;
    }
  });

  test('checks and repairs a state directory without a daemon', async () => {
    const state = join(directory, 'state');
    await mkdir(state);
    const intact = await run('vmctl', 'state', 'check', state, '--json');
    expect(intact).toMatchObject({ code: 0 });
    expect(JSON.parse(intact.stdout)).toMatchObject({ directory: state, isDamaged: false });
    await writeFile(join(state, 'pool.json'), '{ "nonsense": 1, "seal": "1 2" }');
    const damaged = await run('vmctl', 'state', 'check', '--state', state);
    expect(damaged).toMatchObject({ code: 1, stdout: expect.stringMatching(/damaged +pool\.json/) });
    expect(await run('vmctl', 'state', 'repair', state)).toMatchObject({
      code: 0,
      stdout: 'done: pool.json: set aside\n',
    });
    expect((await run('vmctl', 'state', 'check', state)).code).toBe(0);
    expect((await run('vmctl', 'state', 'repair', state, '--owner', 'x')).code).toBe(2);
    expect((await run('vmctl', 'state', 'check', join(directory, 'none'))).code).toBe(1);
    const held = await openStateDirectory(state, (descriptor) => loadNativeBinding().lockFile(descriptor));
    expect(held.id).toHaveLength(32);
    expect(await run('vmctl', 'state', 'check', state)).toMatchObject({
      code: 1,
      stderr: expect.stringContaining(`is in use by process ${process.pid}`),
    });
    await held.giveBack();
  });

  test('events lists what has happened to VMs, and follows what happens', async () => {
    const exit = { at: '2030-01-01T00:00:00Z', reason: 'panicked', code: 0, signal: null, exitCode: 3 };
    services.happens(vmEvent(1, { kind: 'arriving', peer: 'B', job: 'job-9' }));
    services.happens(vmEvent(2, { kind: 'stopped', exit }));
    const listed = await run('vmctl', 'events');
    expect(listed).toMatchObject({ code: 0, stdout: expect.stringMatching(/web +arriving from B +job-9 +f00d-1\n/) });
    expect(listed.stdout).toContain('stopped: panicked (exit code 3)');
    const later = await run('vmctl', 'events', '--after', 'f00d-1', '--json');
    expect(JSON.parse(later.stdout)).toMatchObject([{ id: 'f00d-2', exit }]);
    const { child, ended } = start('vmctl', ['events', '--follow', '--after', 'f00d-1', '--json']);
    let lines = '';
    child.stdout?.on('data', (data: Buffer) => (lines += data.toString()));
    await expect.poll(() => lines, { timeout: 30_000 }).toContain('f00d-2');
    services.happens(vmEvent(3, { kind: 'gone' }));
    await expect.poll(() => lines, { timeout: 30_000 }).toContain('f00d-3');
    child.kill('SIGINT');
    await ended;
    const ids = lines
      .trim()
      .split('\n')
      .map((line) => (JSON.parse(line) as { id: string }).id);
    expect(ids).toEqual(['f00d-2', 'f00d-3']);
  });

  test('hosts, jobs and doctor', async () => {
    services.answers.set('inventory', () => ({
      ...{ host: 'A', machineId: 'm', protocolVersion: 1, qemuVersion: '7.2.22', machines: ['pc-q35-7.2'] },
      ...{ isKvmUsable: false, isUserfaultfdPermitted: false, hasMinorFaults: true, isPreloadPresent: true },
      ...{ memoryAvailableBytes: 1, ramFileFreeBytes: 2 ** 33, hugePagesFree: {}, dataAddress: '127.0.0.1' },
      ...{ vmNames: [], bridges: [], certificateExpiresAt: null, clockMs: 0, rdma: rdma('10.0.1.1') },
    }));
    expect((await run('vmctl', 'hosts')).stdout).toMatch(/A +this host +7\.2\.22/);
    const doctor = await run('vmctl', 'doctor');
    expect(doctor.code).toBe(1); // userfaultfd is not permitted here
    expect(doctor.stdout).toMatch(/fail +userfaultfd/);
    expect(doctor.stdout).toMatch(/userfaultfd → .*root/);
    expect(doctor.stdout).toMatch(/ok +RDMA +at 10\.0\.1\.1 port 7401/);
    expect(doctor.stdout).toMatch(/RDMA mlx5_0 +port 1 active, Ethernet, MTU 4096, address 10\.0\.1\.1, GIDs ::ffff:/);
    expect(JSON.parse((await run('vmctl', 'jobs', '--json')).stdout)).toBeInstanceOf(Array);
  });

  test('console is a pipe where there is no terminal', async () => {
    await services.vms.run({ name: 'web' } as never);
    const { child, ended } = start('vmctl', ['console', 'web']);
    let seen = '';
    child.stdout?.on('data', (data: Buffer) => (seen += data.toString()));
    child.stdin?.write('hello\n');
    await expect.poll(() => seen, { timeout: 20_000 }).toBe('hello\n');
    services.consoles.get('web')?.destroy();
    expect((await ended).code).toBe(0);
  });

  test('certs make, show and revoke certificates without a daemon', async () => {
    const [ca, out] = [join(directory, 'ca'), join(directory, 'tls')];
    expect((await run('vmctl', 'certs', 'init', ca)).code).toBe(0);
    expect((await run('vmctl', 'certs', 'init', ca)).code).toBe(1);
    expect((await run('vmctl', 'certs', 'host', 'A', '--address', '10.0.0.1', '--dir', ca, '--out', out)).code).toBe(0);
    expect((await run('vmctl', 'certs', 'host', 'A', '--dir', ca, '--out', out)).code).toBe(2);
    expect((await run('vmctl', 'certs', 'show', '--dir', out)).stdout).toMatch(/host\/A .* valid .*10\.0\.0\.1/);
    expect((await run('vmctl', 'certs', 'revoke', 'A', '--dir', ca, '--out', out)).code).toBe(0);
    const shown = await run('vmctl', 'certs', 'show', '--dir', out, '--json');
    expect(JSON.parse(shown.stdout)).toMatchObject([{ name: 'A', role: 'host', revokedAt: 'revoked' }]);
  });

  test.each([[['run', '/no/such/file']], [['frobnicate']], [['show']], [['job', '../x']]])(
    '2: usage, %j',
    async (args) => {
      expect(await run('vmctl', ...args)).toMatchObject({ code: 2, stdout: '' });
    },
  );
});

describe('vmigrated', () => {
  test.each([
    [['--nope']],
    [['stray']],
    [['--name', 'A']],
    [['--config', '/no/such/file']],
    [['--name', 'A', '--api', 'unix:/x', '--data', '127.0.0.1', '--state', '/tmp/x', '--peer', 'B']],
  ])('2: usage, %j', async (args) => {
    const ended = await run('vmigrated', ...args);
    expect(ended).toMatchObject({ code: 2, stdout: '' });
    expect(ended.stderr).toMatch(/^vmigrated: .*\((USAGE|SPEC_INVALID)\)/);
  });

  test('--help and --version', async () => {
    expect(await run('vmigrated', '--help')).toMatchObject({ code: 0, stdout: expect.stringContaining('--ram-dir') });
    expect((await run('vmigrated', '--version')).stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
  });
});
