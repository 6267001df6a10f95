/**
 * Runs inside the bed: two daemons, one on each RDMA host, move a nested guest there and back, each time with another
 * misfortune. Prints a line of JSON per move, as it happens, for moves.test.ts to judge.
 *
 *   moves.ts TRANSPORT
 */

import type { MigrationJobView } from '../../../src/domain/job.js';
import type { MigrationReport } from '../../../src/domain/migration.js';
import type { MigrationBody } from '../../../src/schemas/migration.js';
import { BedNetwork } from '../../hosts/bed-network.js';
import { Cluster, eventually, sleep } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import type { MoveFacts } from '../bed.js';

const CUT_MS = 3000;
const LOSS_PERCENT = 10;
const DONE_MS = 240_000;
/** So slow that a drain is under way for as long as a misfortune takes; the small guest's for long enough to see it. */
const SLOW_MIB_S = 8;
const SLOWER_MIB_S = 1;

interface Move {
  readonly guest: Guest;
  readonly source: string;
  readonly target: string;
}

const transport = process.argv[2] ?? 'rdma';
const cluster = await Cluster.on(new BedNetwork(2));

async function jobOf(host: string, id: string): Promise<MigrationJobView> {
  return cluster.api(host).get<MigrationJobView>(`/v1/jobs/${id}`);
}

/** Starts a move with a slow drain; resolves when the guest runs on the target and pages are on their way. */
async function startSlowly({ guest, source, target }: Move, mibPerS = SLOW_MIB_S): Promise<MigrationJobView> {
  // Not by the command: its end takes emulated processors longer than a small guest's drain may last.
  const order: MigrationBody = {
    vm: guest.name,
    target,
    mode: 'postcopy',
    transport: transport as MigrationBody['transport'],
    bandwidthBytesPerS: mibPerS * 2 ** 20,
    verifyMemory: true,
  };
  const { id } = await cluster.api(source).post<MigrationJobView>('/v1/migrations', order);
  return eventually('the drain is under way', DONE_MS, async () => {
    const job = await jobOf(source, id);
    if (!['queued', 'running', 'recovering'].includes(job.state))
      throw new Error(`the job is ${job.state}: ${JSON.stringify(job.error)}`);
    return job.step === 'drain' && (job.progress?.pagesDone ?? 0) > 0 ? job : undefined;
  });
}

async function finish({ source }: Move, { id }: MigrationJobView): Promise<MigrationReport> {
  return eventually(`job ${id} is done`, DONE_MS, async () => {
    // Each question costs the emulated processors what the move could use.
    await sleep(250);
    const job = await jobOf(source, id).catch(() => undefined);
    if (job?.state === 'failed' || job?.state === 'lost' || job?.state === 'needsRecovery')
      throw new Error(`the job is ${job.state}: ${JSON.stringify(job.error)}`);
    return job?.state === 'done' && job.report !== null ? job.report : undefined;
  });
}

const moves: Record<string, (move: Move) => Promise<MigrationReport>> = {
  plain: ({ guest, source, target }) =>
    cluster.json<MigrationReport>(
      source,
      'vmigrate',
      guest.name,
      target,
      '--postcopy',
      `--${transport}`,
      '--verify-memory',
    ),

  sourceDaemonKilled: async (move) => {
    const job = await startSlowly(move);
    await cluster.stopDaemon(move.source, 'SIGKILL');
    await cluster.startDaemon(move.source);
    return finish(move, job);
  },

  linkCut: async (move) => {
    const job = await startSlowly(move);
    await cluster.network.setLink(move.target, false);
    await sleep(CUT_MS);
    await cluster.network.setLink(move.target, true);
    return finish(move, job);
  },

  packetsLost: async (move) => {
    const { hosts } = cluster.network;
    // Not before: a switchover may take too long by its own deadlines, is undone, and has failed, as it should.
    const job = await startSlowly(move, SLOWER_MIB_S);
    for (const { name } of hosts) await cluster.network.setLoss(name, LOSS_PERCENT);
    try {
      return await finish(move, job);
    } finally {
      for (const { name } of hosts) await cluster.network.setLoss(name, 0);
    }
  },
};

const print = (facts: MoveFacts): void => void process.stdout.write(`${JSON.stringify(facts)}\n`);

async function runMoves(guest: Guest, names: readonly string[]): Promise<void> {
  let [source, target] = ['A', 'B'];
  for (const move of names) {
    // A daemon that has just been started looks around first.
    for (const { name } of cluster.network.hosts) await cluster.expectAcquaintance(name);
    const startedAt = performance.now();
    const report = await moves[move]!({ guest, source, target });
    await guest.expectProgress(target);
    const verdict = await guest.verify(target);
    const badSeen = (await guest.work(target)).at(-1)?.bad ?? 0;
    print({ move, report, ...verdict, badSeen, ms: Math.round(performance.now() - startedAt) });
    [source, target] = [target, source];
  }
  await cluster.must(cluster.vmctl(source, 'stop', '--force', guest.name));
}

try {
  const usual = await Guest.start(cluster, 'A', { name: 'nested', image: 'nano', memoryMiB: 96, touchMiB: 64 });
  await runMoves(usual, ['plain', 'sourceDaemonKilled', 'linkCut']);
  // Where each lost packet makes the device go back to it, and each lost request waits for a timeout, a little memory
  // takes long.
  const small = await Guest.start(cluster, 'A', { name: 'small', image: 'nano', memoryMiB: 16, touchMiB: 4 });
  await runMoves(small, ['packetsLost']);
} catch (error) {
  for (const { name } of cluster.network.hosts) console.error(`--- ${name}\n${await cluster.daemonLog(name)}`);
  throw error;
} finally {
  await cluster.destroy();
}
