/**
 * `npm run -s bench -- contained`: what it costs that QEMU is contained. Two pairs of hosts on one machine take turns,
 * of which one contains QEMU and the other gives it root: a cold start of a VM, a fork with and without waiting
 * processes, and a move.
 */

import { QEMU_USERS_DEFAULT } from '../src/config.js';
import type { ForkReport } from '../src/domain/fork.js';
import type { ForkJobView } from '../src/domain/job.js';
import type { MigrationReport } from '../src/domain/migration.js';
import { EVERYTHING_ALLOWED } from '../src/domain/policy.js';
import { Cluster, eventually, sleep } from '../test/hosts/cluster.js';
import { Guest, guestSpec } from '../test/hosts/guest.js';
import { describeMachine, describeRun, type Machine } from './lib/machine.js';
import { median, round, type Sampled, sampled } from './lib/stats.js';

const CLONES = 8;
const SETTLE_MS = 300;
const FORK_MS = 60_000;
/** The rights of QEMU, and the hosts that give them. */
const PAIRS = { root: ['A', 'B'], contained: ['C', 'D'] } as const;
type Rights = keyof typeof PAIRS;
const RIGHTS = Object.keys(PAIRS) as Rights[];
/** What is measured, in milliseconds, and how much larger it may be if QEMU is contained. */
const GOALS = { coldStart: 1.15, coldFork: 1.15, warmFork: 1.05, blackout: 1.05 } as const;
type Figure = keyof typeof GOALS;
const FIGURES = Object.keys(GOALS) as Figure[];

export interface ContainedResult {
  readonly machine: Machine;
  readonly rounds: number;
  readonly ms: Readonly<Record<Rights, Readonly<Record<Figure, Sampled>>>>;
  /** Contained over root, medians. */
  readonly ratios: Readonly<Record<Figure, number>>;
}

export async function benchContained(options: {
  isQuick: boolean;
  log: (line: string) => void;
}): Promise<ContainedResult> {
  const rounds = options.isQuick ? 5 : 20;
  const machine = describeMachine();
  const security = (rights: Rights) => ({
    security: { allow: EVERYTHING_ALLOWED, qemuUser: rights === 'root' ? 'root' : QEMU_USERS_DEFAULT },
  });
  const hostConfigs = Object.fromEntries(
    RIGHTS.flatMap((rights) => PAIRS[rights].map((host) => [host, security(rights)])),
  );
  const cluster = await Cluster.create({ hosts: ['A', 'B', 'C', 'D'], hostConfigs });
  const samples = new Map<string, number[]>();
  const add = (rights: Rights, figure: Figure, ms: number): void => {
    const key = `${rights} ${figure}`;
    samples.set(key, [...(samples.get(key) ?? []), ms]);
    options.log(`${key}: ${ms.toFixed(1)} ms`);
  };
  try {
    for (const rights of RIGHTS) {
      const shape = { memoryMiB: 128, touchMiB: 16, restPercent: 90 };
      await Guest.start(cluster, PAIRS[rights][0], { name: `parent-${rights}`, ...shape });
      await Guest.start(cluster, PAIRS[rights][0], { name: `mover-${rights}`, ...shape });
    }
    for (let n = 0; n < rounds; n++) {
      // Who is first changes, because whoever is second finds more in the caches.
      for (const rights of n % 2 === 0 ? RIGHTS : [...RIGHTS].reverse()) {
        add(rights, 'coldStart', await coldStart(cluster, PAIRS[rights][0]));
        add(rights, 'coldFork', await fork(cluster, rights, false));
        add(rights, 'warmFork', await fork(cluster, rights, true));
        add(rights, 'blackout', await move(cluster, rights, n));
      }
    }
  } finally {
    await cluster.destroy();
  }
  const of = (rights: Rights, figure: Figure) => samples.get(`${rights} ${figure}`) ?? [];
  const perFigure = <T>(value: (figure: Figure) => T) =>
    Object.fromEntries(FIGURES.map((figure) => [figure, value(figure)])) as Record<Figure, T>;
  return {
    machine,
    rounds,
    ms: {
      root: perFigure((figure) => sampled(of('root', figure))),
      contained: perFigure((figure) => sampled(of('contained', figure))),
    },
    ratios: perFigure((figure) => median(of('contained', figure)) / median(of('root', figure))),
  };
}

/** From the request until the VM runs. */
async function coldStart(cluster: Cluster, host: string): Promise<number> {
  await sleep(SETTLE_MS);
  const spec = guestSpec({ name: 'cold', image: 'nano', memoryMiB: 64, touchMiB: 4 });
  const startedAtMs = performance.now();
  await cluster.api(host).post('/v1/vms', spec);
  const ms = performance.now() - startedAtMs;
  await cluster.api(host).post('/v1/vms/cold/stop', { force: true });
  return ms;
}

/** From the request until the last clone runs. */
async function fork(cluster: Cluster, rights: Rights, isWarm: boolean): Promise<number> {
  const [host] = PAIRS[rights];
  const [vm, api] = [`parent-${rights}`, cluster.api(host)];
  if (isWarm) {
    const options = ['--clones', `${CLONES}`, '--network', 'none', '--name', 'warm'];
    await cluster.must(cluster.vmctl(host, 'pool', 'warm', vm, ...options));
  }
  await sleep(SETTLE_MS);
  const order = { vm, cloneCount: CLONES, namePrefix: isWarm ? 'warm' : 'cold', network: 'none' };
  const { id } = await api.post<ForkJobView>('/v1/forks', order);
  const report = await eventually<ForkReport>('the clones run', FORK_MS, async () => {
    const job = await api.get<ForkJobView>(`/v1/jobs/${id}`);
    if (job.error !== null) throw new Error(JSON.stringify(job.error));
    return job.report ?? undefined;
  });
  if (report.isWarm !== isWarm) throw new Error(`the fork was not as warm as it should be: ${report.coldReason}`);
  await api.post('/v1/pool/drain', {});
  for (let n = 0; n < 2; n++) await cluster.must(cluster.vmctl(host, 'stop', '--force', '--image', report.image));
  await cluster.must(cluster.vmctl(host, 'image', 'rm', report.image));
  return report.lastReadyMs;
}

/** There and back by turns. */
async function move(cluster: Cluster, rights: Rights, n: number): Promise<number> {
  const [source, target] = n % 2 === 0 ? PAIRS[rights] : [PAIRS[rights][1], PAIRS[rights][0]];
  await sleep(SETTLE_MS);
  const { stdout } = await cluster.must(cluster.vmigrate(source, '--tcp', '--json', `mover-${rights}`, target));
  return (JSON.parse(stdout) as MigrationReport).blackoutMs;
}

export function printContained({ machine, rounds, ms, ratios }: ContainedResult): string {
  const cell = ({ median: middle, min, max }: Sampled) => `${round(middle, 1)} (${round(min, 1)}–${round(max, 1)})`;
  return [
    describeRun(machine, rounds),
    '',
    '| ms | root | contained | ratio | goal |',
    '| --- | --- | --- | --- | --- |',
    ...FIGURES.map((figure) => {
      const columns = [cell(ms.root[figure]), cell(ms.contained[figure]), round(ratios[figure]), GOALS[figure]];
      return `| ${figure} | ${columns.join(' | ')} |`;
    }),
  ].join('\n');
}
