/**
 * Runs inside the bed: three daemons, one on each RDMA host, fork a nested guest into clones on all of them: first in
 * peace, then with packets lost, as a multicast with packets lost, and along a relay. Prints a line of JSON per fork,
 * as it happens, for forks.test.ts to judge.
 *
 *   forks.ts LOSS_PERCENT TOUCH_MIB [NAME...]      all forks but those by hand, or these
 */
import type { ForkReport } from '../../../src/domain/fork.js';
import { type ForkJobView, isEnded } from '../../../src/domain/job.js';
import type { ForkBody } from '../../../src/schemas/fork.js';
import { BedNetwork } from '../../hosts/bed-network.js';
import { Cluster, eventually, sleep } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import type { ForkFacts } from '../bed.js';

const HOSTS = ['A', 'B', 'C'];
const CLONES = 6;
const DONE_MS = 240_000;
const BEFORE_POINT: ReadonlySet<string> = new Set(['reserveParent', 'prepareClones', 'armParent', 'connectHosts']);
const [lossPercent = 0, lossyTouchMiB = 0] = process.argv.slice(2, 4).map(Number);
const names = process.argv.slice(4);
const TWO_RACKS = {
  name: 'racks',
  text: 'SwitchName=s1 Nodes=A\nSwitchName=s2 Nodes=B,C\nSwitchName=top Switches=s1,s2\n',
};
const VICTIM: Victim = { host: 'B', reader: 'C' };
/** Of this the hosts read by RDMA only what they have not heard. */
const MULTICAST_TOUCH_MIB = 4;
/** With packets lost, all pages go by RDMA: the files of a parent that stays stopped can be read from the beginning. */
const FORKS: readonly Fork[] = [
  { name: 'plain', lossPercent: 0, touchMiB: 16, parent: 'continue' },
  { name: 'packetsLost', lossPercent, touchMiB: lossyTouchMiB, parent: 'stop' },
  { name: 'multicast', lossPercent, touchMiB: MULTICAST_TOUCH_MIB, parent: 'continue', fanout: 'multicast' },
  // B and C share a switch, so that C reads from B. A host does not wait long for its relay, and C must not have all of
  // the image from the root by then, however long the emulated processors take to connect the two.
  {
    ...{ name: 'tree', lossPercent: 0, touchMiB: 8, parent: 'continue', fanout: 'tree', topology: TWO_RACKS },
    slowHost: 'C',
  },
  {
    ...{ name: 'relayDies', lossPercent: 0, touchMiB: 4, parent: 'continue', fanout: 'tree', topology: TWO_RACKS },
    // A daemon that starts again takes the emulated processors two minutes: too long for every run of the tests.
    ...{ isByHand: true, victim: VICTIM },
  },
];
const OWN_MIB = 14;
/** More than two thirds of the pages are zero. */
const KILLED_AT_PERCENT = 80;
/** Slow enough to find a host in the middle of its image. */
const SLOW_MBIT_PER_S = 12;

interface Fork {
  readonly name: string;
  readonly lossPercent: number;
  readonly touchMiB: number;
  readonly parent: 'continue' | 'stop';
  readonly fanout?: 'multicast' | 'tree';
  readonly topology?: { readonly name: string; readonly text: string };
  readonly victim?: Victim;
  /** Receives slowly from before the fork on. */
  readonly slowHost?: string;
  readonly isByHand?: boolean;
}

/** The daemon of a host is killed when another, which reads from it, has a part of the image, and started again. */
interface Victim {
  readonly host: string;
  readonly reader: string;
}

const cluster = await Cluster.on(new BedNetwork(HOSTS.length));

const jobUntil = (id: string, is: (job: ForkJobView) => boolean): Promise<ForkJobView> =>
  eventually(`job ${id} goes on`, DONE_MS, async () => {
    // Each question costs the emulated processors what the fork could use.
    await sleep(100);
    const job = await cluster.api('A').get<ForkJobView>(`/v1/jobs/${id}`);
    return is(job) || isEnded(job.state) ? job : undefined;
  });

/** Resolves to what the host that reads from it has of the image then, in percent. */
async function killInTheMiddle(id: string, { host: victim, reader }: Victim): Promise<number> {
  let percent = 0;
  const { state } = await jobUntil(id, ({ step, progress }) => {
    const at = progress?.hosts?.find(({ host }) => host === reader);
    if (step !== 'fillImage' || at === undefined || at.pagesTotal === 0) return false;
    percent = (at.pagesDone / at.pagesTotal) * 100;
    return percent >= KILLED_AT_PERCENT;
  });
  await cluster.stopDaemon(victim);
  await cluster.startDaemon(victim);
  return isEnded(state) ? 100 : percent;
}

async function fork({ name, lossPercent, touchMiB, parent, victim, slowHost, ...how }: Fork): Promise<ForkFacts> {
  const memoryMiB = touchMiB + OWN_MIB;
  const guest = await Guest.start(cluster, 'A', { name: name.toLowerCase(), image: 'nano', memoryMiB, touchMiB });
  const startedAt = performance.now();
  let report: ForkReport;
  let isSpoilt = false;
  let killedAtPercent: number | null = null;
  try {
    const usual = { vm: guest.name, cloneCount: CLONES, hosts: HOSTS, transport: 'rdma', parentMode: parent } as const;
    const order: ForkBody = { ...usual, ...how };
    if (slowHost !== undefined) await cluster.network.setRate(slowHost, SLOW_MBIT_PER_S);
    const { id } = await cluster.api('A').post<ForkJobView>('/v1/forks', order);
    // Not before: pre-flight refuses hosts that do not reach each other well, as it should.
    await jobUntil(id, ({ step }) => step !== null && !BEFORE_POINT.has(step));
    isSpoilt = lossPercent > 0 || victim !== undefined;
    for (const host of isSpoilt ? HOSTS : []) {
      if (lossPercent > 0) await cluster.network.setLoss(host, lossPercent);
      else await cluster.network.setRate(host, SLOW_MBIT_PER_S);
    }
    if (victim !== undefined) killedAtPercent = await killInTheMiddle(id, victim);
    const job = await jobUntil(id, ({ state }) => isEnded(state));
    if (job.report === null) throw new Error(`the fork is ${job.state}: ${JSON.stringify(job.error)}`);
    report = job.report;
  } finally {
    // Not before there is any: the error of a fork that was refused would be lost.
    for (const host of HOSTS) if (isSpoilt || host === slowHost) await cluster.network.setLoss(host, 0);
  }
  const ms = Math.round(performance.now() - startedAt);
  const clones: ForkFacts['clones'][number][] = [];
  for (const { name: clone, host } of report.clones) {
    const { pages, bad } = await new Guest(cluster, clone).verify(host);
    clones.push({ clone, host, pages, bad });
  }
  // Not by commands, whose start takes emulated processors seconds.
  const image = `/v1/images/${report.image}`;
  await cluster.api('A').post(`${image}/stop`, { force: true, allHosts: true });
  await cluster.api('A').delete(image, { allHosts: true });
  await cluster.api('A').post(`/v1/vms/${guest.name}/stop`, { force: true });
  return { fork: name, report, clones, ms, killedAtPercent };
}

try {
  const isChosen = ({ name, isByHand = false }: Fork) => (names.length === 0 ? !isByHand : names.includes(name));
  const chosen = FORKS.filter(isChosen);
  for (const options of chosen) process.stdout.write(`${JSON.stringify(await fork(options))}\n`);
} catch (error) {
  for (const { name } of cluster.network.hosts) console.error(`--- ${name}\n${await cluster.daemonLog(name)}`);
  throw error;
} finally {
  await cluster.destroy();
}
