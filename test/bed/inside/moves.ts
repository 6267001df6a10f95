/**
 * Runs inside the bed: two daemons, one on each RDMA host, move a nested guest there and back, each time with another misfortune. Prints a line of
 * JSON per move, as it happens, for moves.test.ts to judge.
 *
 *   moves.ts TRANSPORT
 */
import type { MigrationReport } from '../../../src/domain.js';
import type { MigrationJobView } from '../../../src/domain-job.js';
import { BedNetwork } from '../../hosts/bed-network.js';
import { Cluster, eventually, sleep } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import type { MoveFacts } from '../bed.js';

const CUT_MS = 3000;
const LOSS_PERCENT = 10;
const DONE_MS = 120_000;
/** So slow that a drain is under way for as long as a misfortune takes. */
const SLOW_MIB_S = '8';

const transport = process.argv[2] ?? 'rdma';
const cluster = await Cluster.on(new BedNetwork(2));

async function jobOf(host: string, id: string): Promise<MigrationJobView> {
  return cluster.api(host).get<MigrationJobView>(`/v1/jobs/${id}`);
}

/** Starts a move with a slow drain; resolves when the guest runs on the target and pages are on their way. */
async function startSlowly(source: string, target: string): Promise<MigrationJobView> {
  const flags = ['--postcopy', `--${transport}`, '--bandwidth', SLOW_MIB_S, '--detach'];
  const { id } = await cluster.json<MigrationJobView>(source, 'vmigrate', guest.name, target, ...flags);
  return eventually('the drain is under way', DONE_MS, async () => {
    const job = await jobOf(source, id);
    if (job.state !== 'running') throw new Error(`the job is ${job.state}: ${JSON.stringify(job.error)}`);
    return job.step === 'drain' && (job.progress?.pagesDone ?? 0) > 0 ? job : undefined;
  });
}

async function finish(source: string, id: string): Promise<MigrationReport> {
  return eventually(`job ${id} is done`, DONE_MS, async () => {
    const job = await jobOf(source, id).catch(() => undefined);
    if (job?.state === 'failed' || job?.state === 'lost' || job?.state === 'needsRecovery')
      throw new Error(`the job is ${job.state}: ${JSON.stringify(job.error)}`);
    return job?.state === 'done' && job.report !== null ? job.report : undefined;
  });
}

const moves: Record<string, (source: string, target: string) => Promise<MigrationReport>> = {
  plain: (source, target) =>
    cluster.json<MigrationReport>(source, 'vmigrate', guest.name, target, '--postcopy', `--${transport}`),

  sourceDaemonKilled: async (source, target) => {
    const { id } = await startSlowly(source, target);
    await cluster.stopDaemon(source, 'SIGKILL');
    await cluster.startDaemon(source);
    return finish(source, id);
  },

  linkCut: async (source, target) => {
    const { id } = await startSlowly(source, target);
    await cluster.network.setLink(target, false);
    await sleep(CUT_MS);
    await cluster.network.setLink(target, true);
    return finish(source, id);
  },

  packetsLost: async (source, target) => {
    for (const host of [source, target]) await cluster.network.setLoss(host, LOSS_PERCENT);
    try {
      return await moves.plain!(source, target);
    } finally {
      for (const host of [source, target]) await cluster.network.setLoss(host, 0);
    }
  },
};

const print = (facts: MoveFacts): void => void process.stdout.write(`${JSON.stringify(facts)}\n`);

let guest: Guest;
try {
  guest = await Guest.start(cluster, 'A', { name: 'nested', image: 'nano', memoryMiB: 96, touchMiB: 64 });
  let [source, target] = ['A', 'B'];
  for (const [move, run] of Object.entries(moves)) {
    const startedAt = performance.now();
    const report = await run(source, target);
    await guest.expectProgress(target);
    const verdict = await guest.verify(target);
    const badSeen = (await guest.work(target)).at(-1)?.bad ?? 0;
    print({ move, report, ...verdict, badSeen, ms: Math.round(performance.now() - startedAt) });
    [source, target] = [target, source];
  }
} catch (error) {
  for (const { name } of cluster.network.hosts) console.error(`--- ${name}\n${await cluster.daemonLog(name)}`);
  throw error;
} finally {
  await cluster.destroy();
}
