/**
 * Every process and the link are killed at every step of a real migration. Before the commit the VM must continue on
 * the source, and nothing may be left on the target. After the commit the VM must continue on the target, and never
 * read a missing page. The simulation (test/sim/world.ts) shows that the source runs again within 5 s: a busy machine
 * cannot slow down its clock. The coordinator parks before a step while a file exists (VMIGRATE_FAULT), so each fault
 * hits exactly the step that it names.
 */
import { existsSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { EXIT } from '../../src/cli/exit-codes.js';
import type { JobView } from '../../src/domain/job.js';
import type { StepName } from '../../src/domain/migration.js';
import type { VmView } from '../../src/domain/vm.js';
import { Cluster, eventually, sleep } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';
import { Parking } from '../hosts/parking.js';

/** Long enough for a VM that stands still while its coordinator is parked. */
const PRECOPY = ['--precopy', '--max-downtime', '15000'];
const BEFORE_COMMIT: readonly { readonly step: StepName; readonly flags: readonly string[] }[] = [
  ...(['prepareTarget', 'exposeSource', 'connectTarget', 'stopSource', 'transferState'] as const).map((step) => ({
    step,
    flags: [],
  })),
  { step: 'pushLast', flags: PRECOPY },
];
/**
 * Before `commit` everything else is done. So the coordinator continues and commits, whatever happens to the target.
 */
const COMMIT: StepName = 'commit';
const AFTER_COMMIT: StepName[] = ['resumeTarget', 'drain', 'releaseSource'];
const ALL_STEPS = [...BEFORE_COMMIT.map(({ step }) => step), COMMIT, ...AFTER_COMMIT];
const RECOVERED_MS = 60_000;
/** Short, so that a job needs recovery soon after the link is cut. It goes on by itself all the same. */
const RECOVERY_MS_MAX = 1_500;

let cluster: Cluster;
let guest: Guest;
let parking: Parking;

const before = (step: StepName): string => `before:${step}`;

async function restart(host: string): Promise<void> {
  await cluster.stopDaemon(host);
  await cluster.startDaemon(host, parking.environment);
}

async function job(host: string, id: string): Promise<JobView> {
  return cluster.json<JobView>(host, 'vmctl', 'job', id);
}

/** Starts a migration. Resolves when it is parked before `step`. */
async function migrateUpTo(step: StepName, source: string, target: string, ...flags: string[]): Promise<JobView> {
  await parking.arm(before(step));
  const started = await cluster.json<JobView>(source, 'vmigrate', guest.name, target, '--detach', ...flags);
  await parking.parked(before(step));
  return started;
}

async function expectNothingLeft(host: string): Promise<void> {
  await eventually(`nothing is left on ${host}`, 60_000, async () => {
    const ram = cluster.ramDirectory(host);
    // The mark of the directory stays.
    const files = (existsSync(ram) ? await readdir(ram) : []).filter((name) => !name.startsWith('.owner'));
    const list = await cluster.json<{ name: string }[]>(host, 'vmctl', 'ps');
    const isListed = list.some((vm) => vm.name === guest.name);
    return !isListed && files.length === 0 && (await cluster.qemuPids(host)).length === 0 ? true : undefined;
  });
}

/** The host has neither the VM nor its memory. */
async function expectGone(host: string, name: string): Promise<void> {
  await eventually(`nothing of ${name} is left on ${host}`, 60_000, async () => {
    const files = (await readdir(cluster.ramDirectory(host))).filter((file) => file.includes(name));
    const list = await cluster.json<{ name: string }[]>(host, 'vmctl', 'ps');
    return files.length === 0 && !list.some((vm) => vm.name === name) ? true : undefined;
  });
}

/** The target forgets a session, and the secret in its record, when the job is over. */
async function expectNoSession(host: string): Promise<void> {
  await eventually(`no session is left on ${host}`, 60_000, async () => {
    const sessions = await readdir(join(cluster.hostDirectory(host), 'state', 'sessions'));
    return sessions.length === 0 ? true : undefined;
  });
}

async function killQemu(host: string): Promise<void> {
  for (const pid of await cluster.qemuPids(host)) process.kill(pid, 'SIGKILL');
}

beforeAll(async () => {
  cluster = await Cluster.create({ daemonConfig: { limits: { recoveryMsMax: RECOVERY_MS_MAX } } });
  parking = new Parking(cluster.directory, ALL_STEPS.map(before));
  for (const host of ['A', 'B']) await restart(host);
  guest = await Guest.start(cluster, 'A', { name: 'survivor', touchMiB: 48, memoryMiB: 160, restPercent: 50 });
});

/** A test that failed half-way must not make the next tests fail. */
afterEach(async () => {
  await parking.releaseAll();
  await cluster.network.setLink('B', true);
  for (const host of ['A', 'B']) if (!cluster.isDaemonRunning(host)) await restart(host);
});

afterAll(async () => {
  await cluster.destroy();
});

/**
 * The link is cut, and both hosts know what that means for the VM that is spread over them. Nobody hurries the job: it
 * must go on by itself.
 */
async function expectNeedsRecovery(id: string, source: string, target: string): Promise<void> {
  expect((await cluster.vmctl(source, 'job', id, '--follow')).code).toBe(EXIT.needsRecovery);
  expect(await guest.view(source)).toMatchObject({ state: 'departed', leaving: { target, job: id, isStalled: true } });
  await eventually('the target says so, too', RECOVERED_MS, async () => {
    const { state } = await job(target, id);
    return state === 'needsRecovery' ? true : undefined;
  });
  expect(await guest.view(target)).toMatchObject({ arriving: { source, job: id, isStalled: true } });
  expect((await cluster.vmctl(target, 'job', id, '--follow')).code).toBe(EXIT.needsRecovery);
}

type Fault = { name: string; strike: (id: string) => Promise<void>; heal: () => Promise<void>; state: string };

const FAULTS_BEFORE: Fault[] = [
  {
    name: 'the target daemon is killed',
    strike: () => cluster.stopDaemon('B'),
    heal: () => restart('B'),
    state: 'failed',
  },
  { name: 'QEMU on the target is killed', strike: () => killQemu('B'), heal: async () => undefined, state: 'failed' },
  {
    name: 'the link is cut',
    strike: () => cluster.network.setLink('B', false),
    heal: () => cluster.network.setLink('B', true),
    state: 'failed',
  },
  {
    name: 'the job is cancelled',
    // Cancel returns when the VM runs on the source again. So the test does not wait for it while the job is parked.
    strike: async (id) => {
      const api = cluster.api('A');
      api.post(`/v1/jobs/${id}/cancel`).catch(() => undefined);
      // The daemon accepts requests in order. Once it has answered a later request, it has received this one.
      for (let later = 0; later < 3; later++) await api.get(`/v1/jobs/${id}`);
    },
    heal: async () => undefined,
    state: 'cancelled',
  },
  {
    name: 'the source daemon is killed',
    strike: () => cluster.stopDaemon('A'),
    heal: async () => undefined,
    state: 'failed',
  },
];

describe.each(BEFORE_COMMIT)('before $step', ({ step, flags }) => {
  it.each(FAULTS_BEFORE)('$name: the VM goes on at the source', async ({ name, strike, heal, state }) => {
    // Before its QEMU exists on the target there is none to kill.
    if (step === 'prepareTarget' && name.startsWith('QEMU')) return;
    const { id } = await migrateUpTo(step, 'A', 'B', ...flags);
    await strike(id);
    await parking.release(before(step));
    if (name.startsWith('the source daemon')) await restart('A');
    await guest.expectProgress('A', 2);
    await eventually(`job ${id} is ${state}`, 60_000, async () =>
      (await job('A', id)).state === state ? true : undefined,
    );
    await heal();
    await expectNothingLeft('B');
    expect(await guest.view('A')).toMatchObject({ state: 'running', job: null });
  });
});

it('has lost nothing in all of that, and still moves', async () => {
  await guest.expectClean('A');
  const { id } = await cluster.json<JobView>('A', 'vmigrate', guest.name, 'B', '--detach');
  await eventually('the move is done', 60_000, async () => ((await job('A', id)).state === 'done' ? true : undefined));
  await guest.expectProgress('B');
});

const FAULTS_AFTER: {
  name: string;
  strike: (source: string, target: string) => Promise<void>;
  heal: (source: string, target: string) => Promise<void>;
}[] = [
  {
    name: 'the target daemon is killed',
    strike: (_source, target) => cluster.stopDaemon(target),
    heal: (_source, target) => restart(target),
  },
  {
    name: 'the source daemon is killed',
    strike: (source) => cluster.stopDaemon(source),
    heal: (source) => restart(source),
  },
  {
    name: 'both daemons are killed',
    strike: async (source, target) => {
      await cluster.stopDaemon(source);
      await cluster.stopDaemon(target);
    },
    heal: async (source, target) => {
      await restart(target);
      await restart(source);
    },
  },
  {
    name: 'the link is cut for 3 s',
    strike: () => cluster.network.setLink('B', false),
    heal: async () => {
      await sleep(3000);
      await cluster.network.setLink('B', true);
    },
  },
];

describe('before commit', () => {
  it('the source daemon is killed: the VM goes on at the source', async () => {
    const source = (await guest.view('A'))?.state === 'running' ? 'A' : 'B';
    const target = source === 'A' ? 'B' : 'A';
    const { id } = await migrateUpTo(COMMIT, source, target);
    await cluster.stopDaemon(source);
    await parking.release(before(COMMIT));
    await restart(source);
    await guest.expectProgress(source, 2);
    expect((await job(source, id)).state).toBe('failed');
    await expectNothingLeft(target);
    await guest.expectClean(source);
  });
});

const AT_COMMIT = FAULTS_AFTER.filter(
  ({ name }) => name.startsWith('the target daemon') || name.startsWith('the link'),
);

describe.each([{ step: COMMIT, faults: AT_COMMIT }, ...AFTER_COMMIT.map((step) => ({ step, faults: FAULTS_AFTER }))])(
  'before $step',
  ({ step, faults }) => {
    it.each(faults)('$name: the VM goes on at the target', async ({ name, strike, heal }) => {
      const source = (await guest.view('A'))?.state === 'running' ? 'A' : 'B';
      const target = source === 'A' ? 'B' : 'A';
      // Slow prefetch, so that pages are still missing when the fault strikes.
      const { id } = await migrateUpTo(step, source, target, '--bandwidth', '16');
      if (step === 'drain') await sleep(300);
      await strike(source, target);
      await parking.release(before(step));
      if (step === 'drain' && name.startsWith('the link')) await expectNeedsRecovery(id, source, target);
      await heal(source, target);
      await eventually(`job ${id} is done`, RECOVERED_MS, async () =>
        (await job(source, id)).state === 'done' ? true : undefined,
      );
      await guest.expectProgress(target);
      await guest.expectClean(target);
      await expectNothingLeft(source);
    });
  },
);

it('needs the source no more once a pre-copy has switched over', async () => {
  const source = (await guest.view('A'))?.state === 'running' ? 'A' : 'B';
  const target = source === 'A' ? 'B' : 'A';
  const { id } = await migrateUpTo('drain', source, target, ...PRECOPY);
  await cluster.stopDaemon(source);
  await killQemu(source);
  await guest.expectProgress(target);
  await guest.expectClean(target);
  await parking.release(before('drain'));
  await restart(source);
  await eventually(`job ${id} is done`, RECOVERED_MS, async () =>
    (await job(source, id)).state === 'done' ? true : undefined,
  );
  await expectNothingLeft(source);
});

it('says plainly that a VM is lost when its QEMU is killed on the target before all pages are there', async () => {
  const source = (await guest.view('A'))?.state === 'running' ? 'A' : 'B';
  const target = source === 'A' ? 'B' : 'A';
  const { id } = await migrateUpTo('drain', source, target, '--bandwidth', '4');
  await killQemu(target);
  await parking.release(before('drain'));
  expect((await cluster.vmctl(source, 'job', id, '--follow')).code).toBe(EXIT.lost);
  expect(await job(source, id)).toMatchObject({ state: 'lost' });
  await expectNoSession(target);
  expect(await guest.isSilent(source)).toBe(true);
  expect((await cluster.vmctl(source, 'resume', guest.name)).code).not.toBe(0);
  await cluster.must(cluster.vmctl(source, 'stop', '--force', guest.name));
  await expectNothingLeft(source);
});

it('shows an incomplete move on both hosts, and ends the VM there only by force', async () => {
  const name = 'halfway';
  const half = await Guest.start(cluster, 'A', { name, touchMiB: 32, memoryMiB: 128, restPercent: 50 });
  const started = await cluster.json<JobView>('A', 'vmigrate', half.name, 'B', '--detach', '--bandwidth', '2');
  const { id } = started;
  const vm = (host: string) => cluster.json<VmView>(host, 'vmctl', 'show', name);
  await eventually('the VM runs on B', 30_000, async () => {
    const view = await cluster.json<VmView[]>('B', 'vmctl', 'ps');
    return view.some((other) => other.name === name && other.state === 'running') ? true : undefined;
  });
  const { arriving } = await vm('B');
  expect(arriving).toMatchObject({ source: 'A', job: id, isStalled: false });
  expect(arriving?.percent).toBeLessThan(100);
  expect((await vm('A')).leaving).toMatchObject({ target: 'B', job: id });
  expect((await cluster.vmctl('B', 'ps')).stdout).toMatch(/halfway +running, arriving from A, \d+ % /);
  expect((await cluster.vmctl('B', 'jobs')).stdout).toContain(id);
  for (const host of ['A', 'B']) {
    const refused = await cluster.vmctl(host, 'stop', name);
    expect(refused.code).toBe(1);
    expect(refused.stderr).toMatch(/lost.*\(CONFLICT\)\n.*vmctl job .* --follow.*vmctl stop --force halfway/s);
  }

  // While the coordinator is away and no page comes, the target knows by itself.
  await cluster.stopDaemon('A');
  await eventually('B says that nothing comes', 30_000, async () => {
    const { state } = await job('B', id);
    const isHeldUp = state === 'recovering' || state === 'needsRecovery';
    return isHeldUp && (await vm('B')).arriving?.isStalled === true ? true : undefined;
  });
  await restart('A');
  await eventually('B says that pages come again', 60_000, async () =>
    (await job('B', id)).state === 'running' ? true : undefined,
  );

  await cluster.must(cluster.vmctl('B', 'stop', name, '--force'));
  const followed = await cluster.vmctl('A', 'job', id, '--follow');
  expect(followed).toMatchObject({ code: EXIT.lost });
  expect(followed.stdout).toMatch(/halfway was stopped by force on B/);
  await expectNoSession('B');
  await expectGone('A', name);
  const gone = await cluster.vmctl('A', 'show', name);
  expect(gone.stderr).toMatch(/halfway is not on A: it has moved to B/);
});

it('gives a VM up on its source by force, and the target says that nothing comes any more', async () => {
  const name = 'abandoned';
  await Guest.start(cluster, 'A', { name, touchMiB: 32, memoryMiB: 128, restPercent: 50 });
  const { id } = await cluster.json<JobView>('A', 'vmigrate', name, 'B', '--detach', '--bandwidth', '2');
  await eventually('the job is committed', 30_000, async () => ((await job('A', id)).isCommitted ? true : undefined));
  await cluster.must(cluster.vmctl('A', 'stop', name, '--force'));
  const { state, error } = await job('A', id);
  expect({ state, error }).toMatchObject({ state: 'lost', error: { code: 'VM_LOST' } });
  await expectGone('A', name);
  await eventually('B says that nothing comes', 30_000, async () => {
    const { arriving } = await cluster.json<VmView>('B', 'vmctl', 'show', name);
    return arriving?.isStalled === true ? true : undefined;
  });
  expect((await cluster.vmctl('B', 'stop', name)).code).toBe(1);
  await cluster.must(cluster.vmctl('B', 'stop', name, '--force'));
  await expectGone('B', name);
  await expectNoSession('B');
});
