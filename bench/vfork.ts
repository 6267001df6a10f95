/**
 * `npm run -s bench -- vfork`: one running guest turned into N, by us with and without waiting QEMU processes, and by QEMU's own means from a state
 * saved beforehand. The baselines' guest has been saved and is gone when they start; our parent runs on, and pays for it in the same two cores.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { VmView } from '../src/domain.js';
import type { ForkReport, ImageView } from '../src/domain-fork.js';
import type { JobView } from '../src/domain-job.js';
import { Cluster, eventually, sleep } from '../test/hosts/cluster.js';
import { Guest } from '../test/hosts/guest.js';
import { describeMachine, type Machine } from './lib/machine.js';
import { cpuSeconds, minorFaults, privateBytes } from './lib/process-cost.js';
import { QemuRestores, type RestoreMode } from './lib/qemu-restore.js';
import { rateAfter, readWork } from './lib/rate.js';
import { median, round } from './lib/stats.js';

const SMALL = { memoryMiB: 256, touchMiB: 96, writePercent: 20 };
const BIG = { memoryMiB: 2048, touchMiB: 1536, writePercent: 20 };
const LATER_MS = 5000;
const SETTLE_MS = 2500;
const MIB = 1 << 20;
const WORK_POLL_MS = 10;
const PROBE_MS = 10;

export interface VforkRow {
  readonly name: string;
  readonly parentMiB: number;
  readonly clones: number;
  /** null: the parent had been saved before. */
  readonly parentPauseMs: number | null;
  readonly parentBackMs: number | null;
  readonly firstMs: number;
  readonly lastMs: number;
  /** Until the first clone has reported work of its own. */
  readonly firstWorkMs: number;
  readonly privateMiBPerClone: number;
  readonly privateMiBPerCloneLater: number;
  /** What all share: image, template; 0 for full restores. */
  readonly sharedMiB: number;
  readonly faultsPerClone: number;
  /** Daemon and QEMU without vCPUs, until the last has resumed. */
  readonly cpuMsPerClone: number;
}

export interface VforkResult {
  readonly scenario: 'vfork';
  readonly machine: Machine;
  readonly rows: readonly VforkRow[];
  readonly ratios: Record<string, number>;
  readonly figures: Record<string, number>;
}

interface Waiting {
  readonly pids: readonly number[];
  readonly serialLogs: readonly string[];
}

/** Polls the clones' consoles for the first line of work; stop() gives the time since `startedAtMs`, or waits for one. */
function firstWork(serialLogs: () => readonly string[]): Promise<number> {
  return eventually('a clone works', 120_000, async () => {
    await sleep(WORK_POLL_MS);
    const has = serialLogs().some((log) => readSafe(log).includes('VMG WORK'));
    return has ? performance.now() : undefined;
  });
}

function readSafe(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}

function memory({ pids }: Waiting): { privateMiB: number; faults: number } {
  const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  return { privateMiB: mean(pids.map(privateBytes)) / MIB, faults: mean(pids.map(minorFaults)) };
}

async function restoreRow(
  restores: QemuRestores,
  mode: RestoreMode,
  parentMiB: number,
  count: number,
): Promise<VforkRow> {
  const run = await restores.run(mode, count);
  const cpuS = cpuSeconds(run.pids);
  const now = memory(run);
  const workAtMs = await firstWork(() => run.serialLogs);
  await sleep(LATER_MS);
  const later = memory(run);
  await restores.endAll();
  return {
    name: `qemu-${mode}`,
    parentMiB,
    clones: count,
    parentPauseMs: null,
    parentBackMs: null,
    firstMs: run.firstMs,
    lastMs: run.lastMs,
    firstWorkMs: workAtMs - run.startedAtMs,
    privateMiBPerClone: now.privateMiB,
    privateMiBPerCloneLater: later.privateMiB,
    sharedMiB: mode === 'full' ? 0 : parentMiB,
    faultsPerClone: now.faults,
    cpuMsPerClone: (cpuS * 1000) / count,
  };
}

/** Watches the private memory of one clone from outside: by the time its fork is reported, a busy guest has written for a while. */
class MemoryProbe {
  readonly #samples: { atMs: number; bytes: number }[] = [];
  readonly #timer: NodeJS.Timeout;
  #pid = 0;

  constructor(recordPath: string) {
    this.#timer = setInterval(() => {
      if (this.#pid === 0) this.#pid = Number(/"pid": (\d+)/.exec(readSafe(recordPath))?.[1] ?? 0);
      if (this.#pid !== 0) this.#samples.push({ atMs: Date.now(), bytes: privateBytes(this.#pid) });
    }, PROBE_MS);
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  /** MiB at the first sample after that moment; NaN if there is none. */
  at(atMs: number): number {
    return (this.#samples.find((sample) => sample.atMs >= atMs)?.bytes ?? Number.NaN) / MIB;
  }
}

class OurParent {
  #forks = 0;

  private constructor(
    private readonly cluster: Cluster,
    private readonly guest: Guest,
    private readonly memoryMiB: number,
  ) {}

  static async start(cluster: Cluster, size: typeof SMALL): Promise<OurParent> {
    const guest = await Guest.start(cluster, 'A', { name: `parent${size.memoryMiB}`, ...size });
    return new OurParent(cluster, guest, size.memoryMiB);
  }

  async row(count: number, isWarm: boolean): Promise<VforkRow> {
    const prefix = `${isWarm ? 'warm' : 'cold'}${this.#forks++}`;
    const options = ['--clones', `${count}`, '--network', 'none', '--name', prefix];
    if (isWarm) await this.cluster.must(this.cluster.vmctl('A', 'pool', 'warm', this.guest.name, ...options));
    await sleep(SETTLE_MS);
    const parent = await this.view(this.guest.name);
    const before = readWork(parent.serialLog ?? '');
    const logs = Array.from({ length: Math.min(count, 8) }, (_, index) =>
      this.#path(`${prefix}-${index}`, 'serial.log'),
    );
    // Waiting processes have used processor time before; the others begin with none.
    const costBefore = cpuSeconds([this.cluster.daemonPid('A'), ...(await this.cluster.qemuPids('A'))]);
    const probed = [...new Set([0, count - 1])];
    const probes = probed.map((index) => new MemoryProbe(this.#path(`${prefix}-${index}`, 'record.json')));
    const work = firstWork(() => logs);
    const askedAt = performance.timeOrigin + performance.now();
    const report = await this.#fork(options);
    const clones = await this.#clones(prefix);
    const pids = clones.map(({ pid }) => pid ?? 0);
    const costAfter = cpuSeconds([this.cluster.daemonPid('A'), ...(await this.cluster.qemuPids('A'))]);
    const now = memory({ pids, serialLogs: logs });
    for (const probe of probes) probe.stop();
    const createdAtMs = await this.#createdAtMs(report, askedAt);
    const atResume = probes.map((probe, n) => probe.at(createdAtMs + (report.clones[probed[n] ?? 0]?.readyMs ?? 0)));
    const firstWorkMs = performance.timeOrigin + (await work) - createdAtMs;
    await sleep(LATER_MS);
    const later = memory({ pids, serialLogs: logs });
    const rate = rateAfter(before, readWork(parent.serialLog ?? '').slice(before.length));
    const image = await this.#image(report.image);
    await this.#remove(report.image);
    return {
      name: isWarm ? 'ours-warm' : 'ours-cold',
      parentMiB: this.memoryMiB,
      clones: count,
      parentPauseMs: report.parentPauseMs,
      parentBackMs: rate.degradedMs,
      firstMs: report.firstReadyMs,
      lastMs: report.lastReadyMs,
      firstWorkMs,
      privateMiBPerClone: atResume.reduce((sum, mib) => sum + mib, 0) / atResume.length,
      privateMiBPerCloneLater: later.privateMiB,
      sharedMiB: image.allocatedBytes / MIB,
      faultsPerClone: now.faults,
      cpuMsPerClone: ((costAfter - costBefore) * 1000) / count,
    };
  }

  async stop(): Promise<void> {
    const { bad } = await this.guest.verify('A');
    if (bad !== 0) throw new Error(`the parent has ${bad} bad pages`);
    await this.cluster.must(this.cluster.vmctl('A', 'stop', this.guest.name));
  }

  async view(name: string): Promise<VmView> {
    const found = (await this.cluster.json<VmView[]>('A', 'vmctl', 'ps')).find((vm) => vm.name === name);
    if (found === undefined) throw new Error(`${name} is not there`);
    return found;
  }

  async #fork(options: readonly string[]): Promise<ForkReport> {
    return this.cluster.json<ForkReport>('A', 'vfork', this.guest.name, ...options);
  }

  async #clones(prefix: string): Promise<VmView[]> {
    const all = await this.cluster.json<VmView[]>('A', 'vmctl', 'ps');
    return all.filter((vm) => vm.name.startsWith(`${prefix}-`));
  }

  async #createdAtMs(report: ForkReport, askedAt: number): Promise<number> {
    const jobs = await this.cluster.json<JobView[]>('A', 'vmctl', 'jobs');
    const job = jobs.find(({ id }) => id === report.job);
    return job === undefined ? askedAt : Date.parse(job.createdAt);
  }

  async #image(id: string): Promise<ImageView> {
    return this.cluster.json<ImageView>('A', 'vmctl', 'image', 'show', id);
  }

  async #remove(image: string): Promise<void> {
    await this.cluster.must(this.cluster.vmctl('A', 'stop', '--force', '--image', image));
    await this.cluster.must(this.cluster.vmctl('A', 'stop', '--force', '--image', image));
    await this.cluster.must(this.cluster.vmctl('A', 'pool', 'drain'));
    await this.cluster.must(this.cluster.vmctl('A', 'image', 'rm', image));
  }

  #path(vm: string, file: string): string {
    return join(this.cluster.hostDirectory('A'), 'state/vms', vm, file);
  }
}

export async function benchVfork(options: { isQuick: boolean; log: (line: string) => void }): Promise<VforkResult> {
  const counts = options.isQuick ? [1, 8] : [1, 8, 64];
  const machine = describeMachine();
  const rows: VforkRow[] = [];
  const add = async (row: Promise<VforkRow>): Promise<void> => {
    const done = await row;
    rows.push(done);
    options.log(rowText(done));
  };
  const cluster = await Cluster.create({ hosts: ['A'] });
  try {
    for (const size of [SMALL, BIG]) {
      const parent = await OurParent.start(cluster, size);
      const wanted = size === SMALL ? counts : [8];
      for (const count of wanted) {
        for (const isWarm of [false, true]) await add(parent.row(count, isWarm));
      }
      await parent.stop();
    }
    const restores = new QemuRestores(cluster, SMALL);
    await restores.save();
    for (const count of counts) {
      for (const mode of ['full', 'template'] as const) await add(restoreRow(restores, mode, SMALL.memoryMiB, count));
    }
  } finally {
    await cluster.destroy();
  }
  return { scenario: 'vfork', machine, rows, ...summary(rows) };
}

function summary(rows: readonly VforkRow[]): Pick<VforkResult, 'ratios' | 'figures'> {
  const most = Math.max(...rows.map(({ clones }) => clones));
  const row = (name: string, parentMiB = SMALL.memoryMiB, clones = most): VforkRow | undefined =>
    rows.find((one) => one.name === name && one.parentMiB === parentMiB && one.clones === clones);
  const total = (one: VforkRow | undefined) =>
    one === undefined ? Number.NaN : one.privateMiBPerClone * one.clones + one.sharedMiB;
  const pauses = (parentMiB: number) =>
    median(rows.filter((one) => one.parentMiB === parentMiB).flatMap(({ parentPauseMs }) => parentPauseMs ?? []));
  const [full, warm, cold] = [row('qemu-full'), row('ours-warm'), row('ours-cold')];
  const of = (value: number | null | undefined, digits = 2) => round(value ?? Number.NaN, digits);
  return {
    ratios: {
      pause2GOver256M: of(pauses(BIG.memoryMiB) / pauses(SMALL.memoryMiB)),
      [`timeOverFullRestore${most}`]: of((warm?.lastMs ?? Number.NaN) / (full?.lastMs ?? Number.NaN), 3),
      [`memoryOverFullRestore${most}`]: of(total(warm) / total(full), 3),
    },
    figures: {
      parentPauseMs: of(pauses(SMALL.memoryMiB)),
      parentPause2GMs: of(pauses(BIG.memoryMiB)),
      parentBackMs: of(
        median(rows.filter((one) => one.parentMiB === SMALL.memoryMiB).flatMap((one) => one.parentBackMs ?? [])),
      ),
      parentBack2GMs: of(
        median(rows.filter((one) => one.parentMiB === BIG.memoryMiB).flatMap((one) => one.parentBackMs ?? [])),
      ),
      [`warm${most}Ms`]: of(warm?.lastMs, 0),
      [`cold${most}Ms`]: of(cold?.lastMs, 0),
      privateMiBPerClone: of(warm?.privateMiBPerClone),
      cpuMsPerClone: of(warm?.cpuMsPerClone),
    },
  };
}

export function printVfork(result: VforkResult): string {
  const { machine } = result;
  const lines = [
    `${machine.cpu}, ${machine.cores} cores, ${machine.memoryMiB} MiB, Linux ${machine.kernel}; one run`,
    '',
    '| row | parent MiB | clones | parent pause ms | parent back ms | first / last resumed ms | first work ms | private MiB each, at resume / 5 s later | shared MiB | page faults each | CPU ms each |',
    '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
  ];
  for (const one of result.rows) lines.push(rowText(one));
  lines.push('', '| ratio or figure | value |', '| --- | --- |');
  for (const [name, value] of Object.entries({ ...result.ratios, ...result.figures }))
    lines.push(`| ${name} | ${value} |`);
  return lines.join('\n');
}

function rowText(one: VforkRow): string {
  const orDash = (value: number | null, digits: number) => (value === null ? '–' : `${round(value, digits)}`);
  const cells = [
    one.name,
    one.parentMiB,
    one.clones,
    orDash(one.parentPauseMs, 1),
    orDash(one.parentBackMs, 0),
    `${round(one.firstMs, 0)} / ${round(one.lastMs, 0)}`,
    round(one.firstWorkMs, 0),
    `${round(one.privateMiBPerClone, 1)} / ${round(one.privateMiBPerCloneLater, 1)}`,
    round(one.sharedMiB, 0),
    round(one.faultsPerClone, 0),
    round(one.cpuMsPerClone, 1),
  ];
  return `| ${cells.join(' | ')} |`;
}
