/**
 * One guest becomes many on eight hosts at once, with the user's command and real daemons (test/hosts/many-hosts.ts).
 * Each clone checks every word of its memory. Then daemons are killed and links cut: before the commit nothing is left
 * on any host, after it all clones run.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { EXIT } from '../../../src/cli/exit-codes.js';
import type { CloneReport } from '../../../src/domain/fork.js';
import type { ForkJobView } from '../../../src/domain/job.js';
import type { HostProgress } from '../../../src/domain/progress.js';
import { checkClones } from '../../hosts/clone-check.js';
import { eventually } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import { ManyHosts } from '../../hosts/many-hosts.js';

/** As many as two processors check in a test's time; 64 for runs by hand. */
const CLONES = Number(process.env.VMIGRATE_TEST_CLONES ?? 16);
const MEMORY_MIB = 128;
const ENDED_MS = 60_000;
const RUNNING_MS = 60_000;
/** At this rate the image takes some seconds to arrive. */
const SLOW_MBIT_PER_S = 80;
/** What a shared network does to a fork. */
const [LOSS_PERCENT, SHARED_MBIT_PER_S] = [1, 200];
/** The clones of all tests fit on host E, and not one more. */
const PER_HOST = Math.ceil(CLONES / 8);
const CUT = 'before:loadClones';
const COMMITTED = 'agent:fork:committed';

let hosts: ManyHosts;
let parent: Guest;

beforeAll(async () => {
  hosts = await ManyHosts.create({
    memoryBudget: '2G',
    daemonConfig: { limits: { callMsMax: 10_000, undoCallMsMax: 5_000, recoveryMsMax: 30_000 } },
    hostConfigs: { E: { clones: { budget: `${PER_HOST * MEMORY_MIB}M`, overcommit: 1 } } },
    parkingPoints: [CUT, COMMITTED],
  });
  await hosts.restart(hosts.root, { isParkable: true });
  const shape = { memoryMiB: MEMORY_MIB, touchMiB: 16, restPercent: 50 };
  parent = await Guest.start(hosts.cluster, hosts.root, { name: 'web', ...shape });
});
afterEach(async () => {
  await hosts.parking.releaseAll();
  for (const host of hosts.names) {
    await hosts.connectAgain(host);
    await hosts.setRate(host, null);
    await hosts.setLoss(host, 0);
    if (!hosts.cluster.isDaemonRunning(host)) await hosts.restart(host, { isParkable: host === hosts.root });
  }
  await hosts.clear();
});
afterAll(() => hosts?.destroy());

function job(id: string): Promise<ForkJobView> {
  return hosts.cluster.api(hosts.root).get(`/v1/jobs/${id}`);
}

function ended(id: string): Promise<ForkJobView> {
  return eventually(`job ${id} has ended`, ENDED_MS, async () => {
    const view = await job(id);
    return ['done', 'failed', 'lost'].includes(view.state) ? view : undefined;
  });
}

async function begin(...args: string[]): Promise<string> {
  const started = await hosts.cluster.json<ForkJobView>(hosts.root, 'vfork', parent.name, ...args, '--detach');
  return started.id;
}

async function expectSound(clones: readonly CloneReport[]): Promise<void> {
  expect(await checkClones(hosts.cluster, clones)).toEqual({
    badPages: 0,
    distinctCount: clones.length,
    shared: [],
  });
  await parent.expectProgress(hosts.root, 2);
  await parent.expectClean(hosts.root);
}

const countsOf = (clones: readonly CloneReport[]): Record<string, number> => {
  const counts: Record<string, number> = {};
  for (const { host } of clones) counts[host] = (counts[host] ?? 0) + 1;
  return counts;
};

describe('a fork on eight hosts', () => {
  test('spread, over links that lose packets: every host reads the image once, and no page is wrong', async () => {
    for (const host of hosts.names) await hosts.setLoss(host, LOSS_PERCENT);
    for (const host of hosts.others) await hosts.setRate(host, SHARED_MBIT_PER_S);
    const id = await begin('--clones', `${CLONES}`, '--hosts', 'all', '--fanout', 'unicast');
    const seen = new Map<string, HostProgress>();
    const { report } = await eventually('the fork has ended', ENDED_MS, async () => {
      const view = await job(id);
      for (const one of view.progress?.hosts ?? []) seen.set(one.host, one);
      expect(view.error ?? null, 'of the fork').toBeNull();
      expect(['queued', 'running', 'done']).toContain(view.state);
      return view.state === 'done' ? view : undefined;
    });
    if (report === null) throw new Error('no report');
    // One host alone may be lucky.
    let lostPackets = 0;
    for (const host of hosts.names) {
      lostPackets += await hosts.lostPackets(host);
      await hosts.setLoss(host, 0);
      await hosts.setRate(host, null);
    }
    expect(lostPackets).toBeGreaterThan(0);
    expect(report).toMatchObject({ parent: 'web', failures: [] });
    expect(report.clones.map(({ index }) => index)).toEqual(Array.from({ length: CLONES }, (_, index) => index));
    expect(countsOf(report.clones)).toEqual(Object.fromEntries(hosts.names.map((name) => [name, PER_HOST])));
    expect(seen.size).toBeGreaterThanOrEqual(hosts.others.length);

    const { perHost, rootEgress } = report.bytes;
    expect(Object.keys(perHost).sort()).toEqual([...hosts.names]);
    const arrived = hosts.others.reduce((sum, name) => sum + (perHost[name] ?? 0), 0);
    expect(rootEgress).toBeGreaterThanOrEqual(arrived);
    for (const host of hosts.names) {
      const [image] = await hosts.images(host);
      expect(image).toMatchObject({ id: report.image, state: 'complete', parent: 'web' });
      expect(image?.clones).toHaveLength(PER_HOST);
      expect(image?.allocatedBytes).toBeLessThan(MEMORY_MIB << 20);
    }
    await expectSound(report.clones);
    await hosts.clear();
    await hosts.expectNothingLeft('web');
  });

  test('a daemon is killed while its image fills, and the next one goes on; the root makes no clones', async () => {
    await hosts.setRate('C', SLOW_MBIT_PER_S);
    const id = await begin('--clones', `${2 * PER_HOST}`, '--hosts', 'B,C', '--tcp');
    await eventually('the clones of C run', RUNNING_MS, async () => {
      const isRunning = (await hosts.vms('C')).some(({ state }) => state === 'running');
      return isRunning ? true : undefined;
    });
    expect((await hosts.images('C')).map(({ state }) => state)).toEqual(['filling']);
    await hosts.kill('C');
    await hosts.setRate('C', null);
    const [there] = await hosts.vms('B');
    await new Guest(hosts.cluster, there?.name ?? '').expectProgress('B', 2);
    await hosts.restart('C');
    const { state, report } = await ended(id);
    expect(state).toBe('done');
    expect(countsOf(report?.clones ?? [])).toEqual({ B: PER_HOST, C: PER_HOST });
    await expectSound(report?.clones ?? []);
  });

  test('the daemon of the root is killed right after the commit: the next one lets all clones run', async () => {
    await hosts.parking.arm(COMMITTED);
    const id = await begin('--clones', `${hosts.names.length}`, '--hosts', 'all');
    await hosts.parking.parked(COMMITTED);
    await hosts.kill(hosts.root);
    await hosts.parking.release(COMMITTED);
    for (const host of hosts.others) expect((await hosts.vms(host)).map(({ state }) => state)).toEqual(['incoming']);
    await hosts.restart(hosts.root, { isParkable: true });
    const { state, isCommitted, report } = await ended(id);
    expect({ state, isCommitted }).toEqual({ state: 'done', isCommitted: true });
    expect(report?.clones).toHaveLength(hosts.names.length);
    await expectSound(report?.clones ?? []);
  });

  test('a host is cut off before the commit: nothing is left anywhere', async () => {
    await hosts.parking.arm(CUT);
    const id = await begin('--clones', `${hosts.names.length}`, '--hosts', 'all');
    await hosts.parking.parked(CUT);
    await hosts.cutOff('D');
    await hosts.parking.release(CUT);
    expect(await ended(id)).toMatchObject({ state: 'failed', isCommitted: false, clones: [] });
    await parent.expectProgress(hosts.root, 2);
    await hosts.connectAgain('D');
    await hosts.expectNothingLeft('web');
    await parent.expectClean(hosts.root);
  });
});

test.each([
  ['a host that nobody knows', ['--hosts', 'A,Z'], /TARGET_UNREACHABLE: Z/],
  ['a host twice', ['--hosts', 'B,C,B'], /\bB\b/],
  [
    'more clones than the budget of a host allows',
    ['--hosts', `A,B,E:${PER_HOST + 1}`],
    /CLONE_MEMORY: .*budget for clones on E/,
  ],
])('%s is refused, and nothing has changed', async (_name, args, reason) => {
  const refused = await hosts.cluster.vfork(hosts.root, parent.name, '--clones', `${PER_HOST + 3}`, ...args);
  expect([EXIT.usage, EXIT.refused]).toContain(refused.code);
  expect(refused.stderr).toMatch(reason);
  await hosts.expectNothingLeft('web');
});
