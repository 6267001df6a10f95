/**
 * The image of a fork gets to many hosts by multicast and by a tree of relays, over links that limit it: real daemons,
 * each in a network namespace. Each clone checks every word of its memory.
 */
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { EXIT } from '../../../src/cli/exit-codes.js';
import type { DryRunAnswer } from '../../../src/cli/render-fork.js';
import type { CloneReport, ForkReport } from '../../../src/domain/fork.js';
import type { ForkJobView } from '../../../src/domain/job.js';
import { checkClones } from '../../hosts/clone-check.js';
import { eventually } from '../../hosts/cluster.js';
import { sendAsStranger, starve } from '../../hosts/disturbance.js';
import { Guest } from '../../hosts/guest.js';
import { ManyHosts } from '../../hosts/many-hosts.js';

/** As many as two processors check in a test's time; 64 for runs by hand. */
const CLONES = Number(process.env.VMIGRATE_TEST_CLONES ?? 8);
const MEMORY_MIB = 160;
const TOUCH_MIB = 64;
/** More clones than the processors carry take longer, and must rest more for the daemons to get some time. */
const SLOWNESS = Math.max(1, CLONES / 8);
const REST_PERCENT = CLONES > 16 ? 99 : 90;
const ENDED_MS = 90_000 * SLOWNESS;
const TEST_MS = 300_000 * SLOWNESS;
const MBIT_PER_S = 200;
const LOSS_PERCENT = 10;
/** What headers, pages that are asked for and pages that nobody has received may add to the image. */
const MULTICAST_OVERHEAD = 1.3;
/** Two relays read it all from the root. The others begin there if a busy machine connects them late. */
const ROOT_COPIES_MAX = 3.5;
/** All fan-outs of the root have this group in common. */
const GROUP = { group: '239.83.7.1', port: 7403 };
const MTU = { usual: 1_500, large: 9_000 };

let hosts: ManyHosts;
let parent: Guest;

beforeAll(async () => {
  hosts = await ManyHosts.create({
    memoryBudget: '2G',
    daemonConfig: { limits: { callMsMax: 10_000, undoCallMsMax: 5_000, recoveryMsMax: 30_000 }, multicast: GROUP },
  });
  const shape = { memoryMiB: MEMORY_MIB, touchMiB: TOUCH_MIB, restPercent: REST_PERCENT };
  parent = await Guest.start(hosts.cluster, hosts.root, { name: 'web', ...shape });
  for (const host of hosts.names) await hosts.setRate(host, MBIT_PER_S);
});
afterEach(async () => {
  for (const host of hosts.names) {
    await hosts.setLoss(host, 0);
    if (!hosts.cluster.isDaemonRunning(host)) await hosts.restart(host);
  }
  await hosts.clear();
}, TEST_MS);
afterAll(() => hosts?.destroy());

function job(id: string): Promise<ForkJobView> {
  return hosts.cluster.api(hosts.root).get(`/v1/jobs/${id}`);
}

function begin(...args: string[]): Promise<string> {
  return beginOf(parent, ...args);
}

async function beginOf({ name }: Guest, ...args: string[]): Promise<string> {
  const started = await hosts.cluster.json<ForkJobView>(hosts.root, 'vfork', name, ...args, '--detach');
  return started.id;
}

/** Not all of its peers need be there. */
async function restartRoot(): Promise<void> {
  await hosts.kill(hosts.root);
  await hosts.cluster.startDaemon(hosts.root);
}

async function reportOf(id: string): Promise<ForkReport> {
  const { report, error, state } = await eventually(`job ${id} has ended`, ENDED_MS, async () => {
    const view = await job(id);
    return ['done', 'failed', 'lost'].includes(view.state) ? view : undefined;
  });
  expect({ state, error: error ?? null }).toEqual({ state: 'done', error: null });
  if (report === null) throw new Error('no report');
  return report;
}

/** Resolves when the host has this part of its pages, in percent, while the images of the fork fill. */
function filled(id: string, host: string, percent: number): Promise<true> {
  return eventually(`${host} has ${percent} % of the image`, ENDED_MS, async () => {
    const { step, progress } = await job(id);
    const at = progress?.hosts?.find((one) => one.host === host);
    if (step !== 'fillImage' || at === undefined || at.pagesTotal === 0) return undefined;
    return at.pagesDone >= (at.pagesTotal * percent) / 100 ? true : undefined;
  });
}

async function expectSound(clones: readonly CloneReport[]): Promise<void> {
  const found = await checkClones(hosts.cluster, clones);
  expect(found).toEqual({ badPages: 0, distinctCount: clones.length, shared: [] });
  await parent.expectClean(hosts.root);
}

/** Bytes of the image that are not zero. */
function imageBytes({ bytes }: ForkReport): number {
  return bytes.copied;
}

describe('a multicast', { timeout: TEST_MS }, () => {
  test('brings the image to seven hosts that lose a tenth of it: they get the rest from each other', async () => {
    for (const host of hosts.others) await hosts.setLoss(host, LOSS_PERCENT, 'multicast');
    const id = await begin('--clones', `${CLONES}`, '--hosts', 'all', '--fanout', 'multicast');
    const report = await reportOf(id);
    const { bytes, fanout } = report;
    expect(fanout?.kind).toBe('multicast');
    for (const host of hosts.others) {
      expect(await hosts.lostPackets(host)).toBeGreaterThan(0);
      expect(fanout?.lossPerHost[host]).toBeGreaterThan(LOSS_PERCENT / 200);
    }
    expect(bytes.multicast).toBeGreaterThan(imageBytes(report) * 0.8);
    expect(bytes.rootEgress).toBeLessThan(imageBytes(report) * MULTICAST_OVERHEAD + report.bytes.deviceState * 7);
    expect(bytes.repair).toBeGreaterThan(0);
    await expectSound(report.clones);
    await hosts.clear();
    await hosts.expectNothingLeft('web');
  });

  test('is not disturbed by a stranger, another one in its group, a smaller MTU and a starved host', async () => {
    const other = await Guest.start(hosts.cluster, hosts.root, {
      ...{ name: 'db', memoryMiB: 128, touchMiB: 8, restPercent: REST_PERCENT },
    });
    for (const host of hosts.names) await hosts.setMtu(host, host === 'C' ? MTU.usual : MTU.large);
    const endStranger = await sendAsStranger(hosts, 'H', GROUP);
    const endStarving = starve(hosts, 'D');
    let datagramCount = 0;
    try {
      const [id, idOfOther] = await Promise.all([
        begin('--clones', '4', '--hosts', 'B,C,D,E', '--fanout', 'multicast'),
        beginOf(other, '--clones', '3', '--hosts', 'B,C,D', '--fanout', 'multicast'),
      ]);
      const reports = await Promise.all([reportOf(id), reportOf(idOfOther)]);
      await endStarving();
      for (const { fanout, failures, bytes, clones } of reports) {
        expect({ kind: fanout?.kind, failures }).toEqual({ kind: 'multicast', failures: [] });
        expect(bytes.multicast).toBeGreaterThan(0);
        // Each host has heard genuine datagrams: they were not too large for it.
        expect(Object.keys(fanout?.lossPerHost ?? {}).sort()).toEqual(clones.map(({ host }) => host).sort());
      }
      // Clones of different forks have the same index.
      for (const { clones } of reports) await expectSound(clones);
      await other.expectClean(hosts.root);
    } finally {
      await endStarving();
      datagramCount = await endStranger();
      for (const host of hosts.names) await hosts.setMtu(host, MTU.usual);
      await hosts.cluster.must(hosts.cluster.vmctl(hosts.root, 'stop', '--force', other.name));
    }
    expect(datagramCount).toBeGreaterThan(0);
  });

  test('goes on when a host and the root die in the middle of it, and the hosts get the rest afterwards', async () => {
    const id = await begin('--clones', `${CLONES}`, '--hosts', 'all', '--fanout', 'multicast');
    await filled(id, 'D', 30);
    await hosts.kill('D');
    await restartRoot();
    await filled(id, 'E', 95);
    await hosts.restart('D');
    const report = await reportOf(id);
    expect(report.failures).toEqual([]);
    await expectSound(report.clones);
  });

  test('that gets to no host is refused if it was asked for; auto takes a tree', async () => {
    for (const host of hosts.others) await hosts.setLoss(host, 100, 'multicast');
    const args = ['--clones', '7', '--hosts', hosts.others.join(','), '--json', '--dry-run'];
    const asked = await hosts.cluster.vfork(hosts.root, parent.name, ...args, '--fanout', 'multicast');
    expect(asked.code).toBe(EXIT.refused);
    expect(asked.stdout).toMatch(/B, C, D/);
    const { plan } = await hosts.cluster.json<DryRunAnswer>(hosts.root, 'vfork', parent.name, ...args);
    expect(plan?.fanout?.kind).toBe('tree');
  });
});

describe('a tree of relays', { timeout: TEST_MS }, () => {
  test('brings the image to seven hosts that lose packets, and goes on when a relay and the root die', async () => {
    for (const host of hosts.others) await hosts.setLoss(host, LOSS_PERCENT);
    const id = await begin('--clones', `${CLONES}`, '--hosts', 'all', '--fanout', 'tree');
    await filled(id, 'B', 30);
    await hosts.kill('B');
    await restartRoot();
    await filled(id, 'D', 95);
    await hosts.restart('B');
    const report = await reportOf(id);
    expect(report.failures).toEqual([]);
    expect(report.bytes.relayed).toBeGreaterThan(0);
    await expectSound(report.clones);
  });

  test('sends the image from the root as often as it has relays there, not as often as there are hosts', async () => {
    const report = await reportOf(await begin('--clones', '7', '--hosts', hosts.others.join(','), '--fanout', 'tree'));
    expect(report.fanout?.kind).toBe('tree');
    const fromRoot = report.bytes.rootEgress - report.bytes.deviceState * 7;
    expect(fromRoot).toBeLessThan(imageBytes(report) * ROOT_COPIES_MAX);
    expect(Object.keys(report.bytes.perLink).length).toBeGreaterThan(2);
  });
});
