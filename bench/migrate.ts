/**
 * `npm run -s bench -- migrate`: the same guest moved by us over tcp and shm and by QEMU's three own ways, interleaved, on the same two test hosts.
 * Two guests are booted once, one for us and one for QEMU; whichever is not measured is paused, because two emulated guests would fill two cores.
 */
import type { MigrationReport, VmView } from '../src/domain.js';
import { Cluster, eventually, sleep } from '../test/hosts/cluster.js';
import { Guest } from '../test/hosts/guest.js';
import { CpuMeter } from './lib/cpu.js';
import { describeMachine, type Machine } from './lib/machine.js';
import { type QemuMode, QemuPair, type QemuProcess } from './lib/qemu-pair.js';
import { rateAfter, readWork } from './lib/rate.js';
import { median, round, type Sampled, sampled } from './lib/stats.js';

const GUEST = { memoryMiB: 512, touchMiB: 256, writePercent: 20 };
const SETTLE_MS = 2500;
const SMALL_MIB = 256;
const BIG_MIB = 2048;

interface Trial {
  readonly blackoutMs: number;
  readonly degradedMs: number;
  readonly stallMsMax: number;
  readonly faultP50Us: number;
  readonly faultP99Us: number;
  readonly requestMeanUs: number;
  readonly totalMs: number;
  readonly bytes: number;
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
}

export interface MigrateRow {
  readonly name: string;
  readonly blackoutMs: number;
  readonly degradedMs: number;
  readonly stallMsMax: number;
  readonly faultP50Us: number | null;
  readonly faultP99Us: number | null;
  /** QEMU's blocktime / requests; null for us */
  readonly requestMeanUs: number | null;
  readonly totalMs: number;
  readonly bytes: number;
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
  readonly badPages: number;
  /** Guests that were dead or had bad pages after a move; each such move was repeated with a fresh guest. */
  readonly guestsLost: number;
  readonly spread: Record<string, Sampled>;
}

export interface MigrateResult {
  readonly scenario: 'migrate';
  readonly machine: Machine;
  readonly rounds: number;
  readonly rows: readonly MigrateRow[];
  readonly ratios: {
    readonly blackout: number;
    readonly degraded: number;
    readonly stall: number;
    readonly total: number;
    readonly faultP99OverQemuMean: number;
    readonly blackout2GOver256M: number;
  };
  readonly finished: { readonly daemonRssMiB: number; readonly daemonIdleCpuPercent: number };
}

const other = (host: string): string => (host === 'A' ? 'B' : 'A');

/** Our side: a VM run by the daemons, moved by `vmigrate`. */
class OurSide {
  host = 'A';
  private constructor(
    private readonly cluster: Cluster,
    readonly guest: Guest,
  ) {}

  static async start(cluster: Cluster, name: string, memoryMiB: number, touchMiB: number): Promise<OurSide> {
    const guest = await Guest.start(cluster, 'A', { name, memoryMiB, touchMiB, writePercent: GUEST.writePercent });
    return new OurSide(cluster, guest);
  }

  async view(host: string): Promise<VmView> {
    const view = await this.guest.view(host);
    if (!view) throw new Error(`${this.guest.name} is not on ${host}`);
    return view;
  }

  async pause(): Promise<void> {
    await this.cluster.must(this.cluster.vmctl(this.host, 'pause', this.guest.name));
  }

  async resume(): Promise<void> {
    await this.cluster.must(this.cluster.vmctl(this.host, 'resume', this.guest.name));
  }

  async move(transport: 'tcp' | 'shm'): Promise<{ trial: Trial; report: MigrationReport }> {
    const source = this.host;
    const target = other(source);
    await sleep(SETTLE_MS);
    const serialLog = (await this.view(source)).serialLog as string;
    const before = readWork(serialLog);
    const meters = [source, target].map((host) => new CpuMeter(() => this.processes(host)));
    const sampling = setInterval(() => meters.forEach((meter) => meter.sample()), 50);
    const report = await this.cluster.json<MigrationReport>(
      source,
      'vmigrate',
      this.guest.name,
      target,
      '--postcopy',
      `--${transport}`,
    );
    clearInterval(sampling);
    const cpuS = meters.map((meter) => meter.seconds());
    this.host = target;
    await sleep(SETTLE_MS);
    const rate = rateAfter(before, readWork((await this.view(target)).serialLog as string));
    const { demand, prefetch, deviceState } = report.bytes;
    const trial: Trial = {
      blackoutMs: report.blackoutByEventsMs,
      degradedMs: rate.degradedMs,
      stallMsMax: rate.stallMsMax,
      faultP50Us: report.faults.p50Us,
      faultP99Us: report.faults.p99Us,
      requestMeanUs: Number.NaN,
      totalMs: report.totalMs,
      bytes: demand + prefetch + deviceState,
      sourceCpuS: cpuS[0] ?? 0,
      targetCpuS: cpuS[1] ?? 0,
    };
    return { trial, report };
  }

  /** The daemon; our QEMU does nothing for the memory (its threads move device state alone, which QEMU's rows count too). */
  private processes(host: string): { pid: number; vcpuThreads: number[] }[] {
    return [{ pid: this.cluster.daemonPid(host), vcpuThreads: [] }];
  }
}

/** A guest that reports less than this after a move did not survive it. */
const WINDOWS_ALIVE_MIN = 5;
const TRIES_MAX = 4;

async function startBaseline(pair: QemuPair): Promise<QemuProcess> {
  const baseline = await pair.start('A', false);
  await eventually('the baseline guest works', 90_000, () =>
    readWork(baseline.serialLog).length >= 5 ? true : undefined,
  );
  await baseline.qmp.execute('stop');
  return baseline;
}

async function qemuTrial(
  pair: QemuPair,
  at: QemuProcess,
  mode: QemuMode,
): Promise<{ trial: Trial; target: QemuProcess; isAlive: boolean }> {
  await at.qmp.execute('cont');
  await sleep(SETTLE_MS);
  const before = readWork(at.serialLog);
  const { target, move } = await pair.move(at, other(at.host), mode);
  await sleep(SETTLE_MS);
  const after = readWork(target.serialLog);
  const rate = rateAfter(before, after);
  await target.qmp.execute('stop');
  return {
    target,
    isAlive: after.length >= WINDOWS_ALIVE_MIN && (after.at(-1)?.bad ?? 0) === 0,
    trial: {
      ...move,
      degradedMs: rate.degradedMs,
      stallMsMax: rate.stallMsMax,
      faultP50Us: Number.NaN,
      faultP99Us: Number.NaN,
    },
  };
}

function row(name: string, trials: readonly Trial[], badPages: number, guestsLost: number): MigrateRow {
  const of = (pick: (trial: Trial) => number) => sampled(trials.map((trial) => round(pick(trial), 3)));
  const orNull = (sample: Sampled) => (Number.isNaN(sample.median) ? null : round(sample.median, 1));
  const spread = {
    blackoutMs: of((trial) => trial.blackoutMs),
    degradedMs: of((trial) => trial.degradedMs),
    stallMsMax: of((trial) => trial.stallMsMax),
    faultP50Us: of((trial) => trial.faultP50Us),
    faultP99Us: of((trial) => trial.faultP99Us),
    requestMeanUs: of((trial) => trial.requestMeanUs),
    totalMs: of((trial) => trial.totalMs),
    bytes: of((trial) => trial.bytes),
    sourceCpuS: of((trial) => trial.sourceCpuS),
    targetCpuS: of((trial) => trial.targetCpuS),
  };
  return {
    name,
    blackoutMs: round(spread.blackoutMs.median),
    degradedMs: round(spread.degradedMs.median),
    stallMsMax: round(spread.stallMsMax.median),
    faultP50Us: orNull(spread.faultP50Us),
    faultP99Us: orNull(spread.faultP99Us),
    requestMeanUs: orNull(spread.requestMeanUs),
    totalMs: round(spread.totalMs.median, 1),
    bytes: spread.bytes.median,
    sourceCpuS: round(spread.sourceCpuS.median, 3),
    targetCpuS: round(spread.targetCpuS.median, 3),
    badPages,
    guestsLost,
    spread,
  };
}

async function blackoutOf(cluster: Cluster, memoryMiB: number, touchMiB: number, rounds: number): Promise<number[]> {
  const side = await OurSide.start(cluster, `size${memoryMiB}`, memoryMiB, touchMiB);
  const samples: number[] = [];
  for (let n = 0; n < rounds; n++) samples.push((await side.move('tcp')).report.blackoutByEventsMs);
  await cluster.must(cluster.vmctl(side.host, 'stop', side.guest.name));
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
  const cluster = await Cluster.create();
  try {
    const ours = await OurSide.start(cluster, 'ours', GUEST.memoryMiB, GUEST.touchMiB);
    await ours.pause();
    const pair = new QemuPair(cluster, { name: 'baseline', ...GUEST });
    let baseline = await startBaseline(pair);
    const guestsLost: Record<string, number> = {};

    const trials: Record<string, Trial[]> = {
      'ours-tcp': [],
      'ours-shm': [],
      'qemu-precopy': [],
      'qemu-postcopy': [],
      'qemu-postcopy-preempt': [],
    };
    for (let n = 1; n <= rounds; n++) {
      for (const name of Object.keys(trials)) {
        let trial: Trial | undefined;
        if (name === 'ours-tcp' || name === 'ours-shm') {
          await ours.resume();
          ({ trial } = await ours.move(name === 'ours-tcp' ? 'tcp' : 'shm'));
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
            // QEMU's own pre-copy under emulation loses a page now and then; what the guest did afterwards is no measurement.
            guestsLost[name] = (guestsLost[name] ?? 0) + 1;
            options.log(`${name}: the guest did not survive QEMU's own move; a fresh one is started`);
            await pair.endAll();
            baseline = await startBaseline(pair);
          }
        }
        if (trial === undefined) throw new Error(`${name} could not be measured`);
        (trials[name] as Trial[]).push(trial);
        options.log(
          `round ${n}/${rounds} ${name}: blackout ${round(trial.blackoutMs)} ms, degraded ${round(trial.degradedMs)} ms, stall ${round(trial.stallMsMax)} ms, total ${round(trial.totalMs)} ms`,
        );
      }
    }
    await pair.end(baseline);
    await ours.resume();
    const verdict = await ours.guest.verify(ours.host);
    await cluster.must(cluster.vmctl(ours.host, 'stop', ours.guest.name));

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
    const named = (name: string) => rows.find((candidate) => candidate.name === name) as MigrateRow;
    const tcp = named('ours-tcp');
    const postcopies = [named('qemu-postcopy'), named('qemu-postcopy-preempt')];
    const better = (pick: (candidate: MigrateRow) => number) => Math.min(...postcopies.map(pick));
    const ratio = (pick: (candidate: MigrateRow) => number) => round(pick(tcp) / better(pick), 3);
    return {
      scenario: 'migrate',
      machine,
      rounds,
      rows,
      ratios: {
        blackout: ratio((candidate) => candidate.blackoutMs),
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
  const { machine } = result;
  const lines = [
    `${machine.cpu}, ${machine.cores} cores, ${machine.memoryMiB} MiB, Linux ${machine.kernel}; ${result.rounds} rounds, medians (min–max)`,
    '',
    '| row | blackout ms | degraded ms | longest stall ms | fault p50 / p99 µs | total ms | MiB | source CPU s | target CPU s | bad pages | guests lost |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
  ];
  const span = (sample: Sampled | undefined, digits = 1) =>
    sample === undefined
      ? ''
      : `${round(sample.median, digits)} (${round(sample.min, digits)}–${round(sample.max, digits)})`;
  for (const {
    name,
    spread,
    badPages,
    guestsLost,
    faultP50Us,
    faultP99Us,
    requestMeanUs,
    bytes,
    sourceCpuS,
    targetCpuS,
  } of result.rows) {
    const faults =
      faultP50Us === null ? (requestMeanUs === null ? '–' : `mean ${requestMeanUs}`) : `${faultP50Us} / ${faultP99Us}`;
    lines.push(
      `| ${name} | ${span(spread.blackoutMs)} | ${span(spread.degradedMs, 0)} | ${span(spread.stallMsMax)} | ${faults} | ${span(spread.totalMs, 0)} | ${round(bytes / (1 << 20), 0)} | ${sourceCpuS} | ${targetCpuS} | ${badPages} | ${guestsLost} |`,
    );
  }
  lines.push('', '| ratio | value |', '| --- | --- |');
  for (const [name, value] of Object.entries(result.ratios)) lines.push(`| ${name} | ${value} |`);
  lines.push(
    '',
    `finished VM, idle daemon: ${result.finished.daemonRssMiB} MiB RSS, ${result.finished.daemonIdleCpuPercent} % CPU`,
  );
  return lines.join('\n');
}
