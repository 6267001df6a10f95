/**
 * `npm run -s bench -- migrate`: moves the same guest with vmigrate over tcp and shm, and in the three ways of QEMU.
 * The moves alternate on the same two test hosts. Two guests are booted once, one for vmigrate and one for QEMU. The
 * one that is not being measured is paused, because two emulated guests would fill two cores.
 */
import { EVERYTHING_ALLOWED } from '../src/domain/policy.js';
import { Cluster, sleep } from '../test/hosts/cluster.js';
import { qemuTrial, startBaseline } from './lib/baseline.js';
import { CpuMeter } from './lib/cpu.js';
import { lostWorkSumMs } from './lib/lost-work.js';
import { describeMachine, describeRun, type Machine } from './lib/machine.js';
import { OurSide } from './lib/our-side.js';
import { type QemuMode, QemuPair } from './lib/qemu-pair.js';
import { type MoveRow, renderRatios, renderRows, row, span, type Trial } from './lib/rows.js';
import { median, round, type Sampled, sampled } from './lib/stats.js';

const GUEST = { memoryMiB: 512, touchMiB: 256, writePercent: 20 };
const SMALL_MIB = 256;
const BIG_MIB = 2048;
const TRIES_MAX = 4;
/** How each of our rows is moved. `ours-tcp` has the default protection, `integrity`; QEMU's rows have none. */
const OUR_FLAGS: Readonly<Record<string, readonly string[]>> = {
  'ours-tcp': ['--postcopy', '--tcp', '--data-security', 'integrity'],
  'ours-tcp-none': ['--postcopy', '--tcp', '--data-security', 'none'],
  'ours-tcp-encrypt': ['--postcopy', '--tcp', '--data-security', 'encrypt'],
  'ours-shm': ['--postcopy', '--shm'],
};

export interface MigrateResult {
  readonly scenario: 'migrate';
  readonly machine: Machine;
  readonly rounds: number;
  readonly rows: readonly MoveRow[];
  /** What a guest loses that is not moved. */
  readonly unmovedLostWorkMs: Sampled;
  readonly ratios: {
    readonly blackout: number;
    readonly lostWork: number;
    readonly degraded: number;
    readonly stall: number;
    readonly total: number;
    readonly faultP99OverQemuMean: number;
    readonly blackout2GOver256M: number;
  };
  readonly finished: { readonly daemonRssMiB: number; readonly daemonIdleCpuPercent: number };
}

async function blackoutOf(cluster: Cluster, memoryMiB: number, touchMiB: number, rounds: number): Promise<number[]> {
  const side = await OurSide.start(cluster, { ...GUEST, name: `size${memoryMiB}`, memoryMiB, touchMiB });
  const samples: number[] = [];
  for (let n = 0; n < rounds; n++) samples.push((await side.move('--postcopy', '--tcp')).report.blackoutByEventsMs);
  await cluster.must(cluster.vmctl(side.host, 'stop', '--force', side.guest.name));
  return samples;
}

function daemonCost(cluster: Cluster, host: string): CpuMeter {
  return new CpuMeter(() => [{ pid: cluster.daemonPid(host), vcpuThreads: [] }]);
}

async function rssMiB(pid: number): Promise<number> {
  const { readFile } = await import('node:fs/promises');
  const status = await readFile(`/proc/${pid}/status`, 'utf8');
  return Number(/^VmRSS:\s+(\d+)/m.exec(status)?.[1] ?? 0) / 1024;
}

export async function benchMigrate(options: { isQuick: boolean; log: (line: string) => void }): Promise<MigrateResult> {
  const rounds = options.isQuick ? 2 : 5;
  const machine = describeMachine();
  // What the hosts demand is the least; each row asks for its own.
  const config = { security: { allow: EVERYTHING_ALLOWED, dataSecurity: 'none' } };
  const cluster = await Cluster.create({ hostConfigs: { A: config, B: config } });
  try {
    const ours = await OurSide.start(cluster, { name: 'ours', ...GUEST });
    await ours.pause();
    const pair = new QemuPair(cluster, { name: 'baseline', ...GUEST });
    let baseline = await startBaseline(pair);
    const guestsLost: Record<string, number> = {};

    const trials: Record<string, Trial[]> = {
      ...Object.fromEntries(Object.keys(OUR_FLAGS).map((name) => [name, []])),
      'qemu-precopy': [],
      'qemu-postcopy': [],
      'qemu-postcopy-preempt': [],
    };
    const unmoved: number[] = [];
    for (let n = 1; n <= rounds; n++) {
      await ours.resume();
      unmoved.push(round(await ours.stay(), 3));
      await ours.pause();
      for (const name of Object.keys(trials)) {
        let trial: Trial | undefined;
        const flags = OUR_FLAGS[name];
        if (flags !== undefined) {
          await ours.resume();
          ({ trial } = await ours.move(...flags));
          await ours.pause();
        } else {
          const mode = name.slice('qemu-'.length) as QemuMode;
          for (let attempt = 1; ; attempt++) {
            const moved = await qemuTrial(pair, baseline, mode).catch((error: unknown) => {
              if (attempt === TRIES_MAX) throw error;
              return null;
            });
            if (moved !== null) ({ trial, target: baseline } = moved);
            if (moved?.isAlive || attempt === TRIES_MAX) break;
            // QEMU's own pre-copy under emulation sometimes loses a page. The figures of such a move do not count.
            guestsLost[name] = (guestsLost[name] ?? 0) + 1;
            options.log(`${name}: the guest did not survive QEMU's move; starting a new guest`);
            await pair.endAll();
            baseline = await startBaseline(pair);
          }
        }
        if (trial === undefined) throw new Error(`${name} could not be measured`);
        (trials[name] as Trial[]).push(trial);
        const { blackoutMs, lostWorkMs, stallMsMax, totalMs } = trial;
        const lostMs = lostWorkSumMs(lostWorkMs);
        const times = Object.entries({ blackout: blackoutMs, lost: lostMs, stall: stallMsMax, total: totalMs });
        const figures = times.map(([figure, ms]) => `${figure} ${round(ms)} ms`);
        options.log(`round ${n}/${rounds} ${name}: ${figures.join(', ')}`);
      }
    }
    await pair.end(baseline);
    await ours.resume();
    const verdict = await ours.guest.verify(ours.host);
    await cluster.must(cluster.vmctl(ours.host, 'stop', '--force', ours.guest.name));

    const finished = { host: ours.host, meter: daemonCost(cluster, ours.host) };
    const idleMs = options.isQuick ? 3000 : 10_000;
    await sleep(idleMs);
    const daemonIdleCpuPercent = round((finished.meter.seconds() / (idleMs / 1000)) * 100, 3);
    const daemonRssMiB = round(await rssMiB(cluster.daemonPid(finished.host)), 1);

    const small = await blackoutOf(cluster, SMALL_MIB, 128, rounds);
    const big = await blackoutOf(cluster, BIG_MIB, 1536, rounds);

    const rows = Object.entries(trials).map(([name, list]) =>
      row(name, list, name.startsWith('ours') ? verdict.bad : 0, guestsLost[name] ?? 0),
    );
    const named = (name: string) => rows.find((candidate) => candidate.name === name) as MoveRow;
    const tcp = named('ours-tcp');
    const postcopies = [named('qemu-postcopy'), named('qemu-postcopy-preempt')];
    const better = (pick: (candidate: MoveRow) => number) => Math.min(...postcopies.map(pick));
    const ratio = (pick: (candidate: MoveRow) => number) => round(pick(tcp) / better(pick), 3);
    return {
      scenario: 'migrate',
      machine,
      rounds,
      rows,
      unmovedLostWorkMs: sampled(unmoved),
      ratios: {
        blackout: ratio((candidate) => candidate.blackoutMs),
        lostWork: ratio((candidate) => candidate.lostWorkMs.sum),
        degraded: ratio((candidate) => candidate.degradedMs),
        stall: ratio((candidate) => candidate.stallMsMax),
        total: ratio((candidate) => candidate.totalMs),
        faultP99OverQemuMean: round(
          (tcp.faultP99Us ?? Number.NaN) / better((candidate) => candidate.requestMeanUs ?? Number.POSITIVE_INFINITY),
          3,
        ),
        blackout2GOver256M: round(median(big) / median(small), 3),
      },
      finished: { daemonRssMiB, daemonIdleCpuPercent },
    };
  } finally {
    await cluster.destroy();
  }
}

export function printMigrate(result: MigrateResult): string {
  return [
    describeRun(result.machine, result.rounds),
    '',
    ...renderRows(result.rows),
    '',
    `lost work of a guest that is not moved, in ms: ${span(result.unmovedLostWorkMs, 0)}`,
    ...renderRatios(result.ratios),
    '',
    `finished VM, idle daemon: ${result.finished.daemonRssMiB} MiB RSS, ${result.finished.daemonIdleCpuPercent} % CPU`,
  ].join('\n');
}
