/** vmigrate's side of `vfork`: forks a busy guest on a real daemon again and again, and measures from outside. */
import { readFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import type { ForkReport } from '../../src/domain/fork.js';
import type { ImageView } from '../../src/domain/image.js';
import type { ForkJobView, JobView } from '../../src/domain/job.js';
import type { VmView } from '../../src/domain/vm.js';
import { checkClones } from '../../test/hosts/clone-check.js';
import { type Cluster, eventually, sleep } from '../../test/hosts/cluster.js';
import { Guest } from '../../test/hosts/guest.js';
import type { ForkRow } from './fork-rows.js';
import { cpuSeconds, lookAhead, minorFaults, privateBytes, qemusOf } from './process-cost.js';
import { rateAfter, readWork } from './rate.js';
import { median } from './stats.js';

export const MIB = 1 << 20;
/** How long after a clone's start its private memory is measured a second time. */
export const LATER_MS = 5000;
const SETTLE_MS = 2500;
const WORK_POLL_MS = 10;
const WORK_MS = 120_000;
const PROBE_MS = 20;
const FORK_MS = 180_000;
/** Number of work windows that show the parent's speed beside its clones after the fork. */
const SETTLED_WINDOWS = 15;

export interface GuestShape {
  readonly memoryMiB: number;
  readonly touchMiB: number;
  readonly writePercent: number;
}

export interface Waiting {
  readonly pids: readonly number[];
  readonly serialLogs: readonly string[];
}

/** Returns performance.now() of the moment when the first of these consoles shows work of its own. */
export function firstWork(serialLogs: () => readonly string[]): Promise<number> {
  return eventually('a clone works', WORK_MS, async () => {
    await sleep(WORK_POLL_MS);
    const has = serialLogs().some((log) => readSafe(log).includes('VMG WORK'));
    return has ? performance.now() : undefined;
  });
}

export function readSafe(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return '';
  }
}

export function memoryOf({ pids }: Pick<Waiting, 'pids'>): { privateMiB: number; faults: number } {
  const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;
  return { privateMiB: mean(pids.map(privateBytes)) / MIB, faults: mean(pids.map(minorFaults)) };
}

/**
 * Samples the private memory of one clone from outside. That is necessary because a busy guest has been writing for a
 * while when its fork is reported.
 */
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

  /** Returns the MiB of the first sample after that moment; NaN if there is none. */
  at(atMs: number): number {
    return (this.#samples.find((sample) => sample.atMs >= atMs)?.bytes ?? Number.NaN) / MIB;
  }
}

interface Forked {
  readonly report: ForkReport;
  readonly createdAtMs: number;
  /** CPU seconds used when all clones ran, and nothing else had been done for them. */
  readonly cpuS: number;
}

export class OurParent {
  #forks = 0;

  private constructor(
    private readonly cluster: Cluster,
    private readonly guest: Guest,
    private readonly memoryMiB: number,
  ) {}

  static async start(cluster: Cluster, shape: GuestShape): Promise<OurParent> {
    const guest = await Guest.start(cluster, 'A', { name: `parent${shape.memoryMiB}`, ...shape });
    return new OurParent(cluster, guest, shape.memoryMiB);
  }

  /** Measures one fork, from the request to the last page of its last clone. It leaves nothing behind. */
  async row(count: number, isWarm: boolean): Promise<ForkRow> {
    const prefix = `${isWarm ? 'warm' : 'cold'}${this.#forks++}`;
    const shape = { vm: this.guest.name, cloneCount: count, namePrefix: prefix, network: 'none' } as const;
    if (isWarm) {
      const options = ['--clones', `${count}`, '--network', 'none', '--name', prefix];
      await this.cluster.must(this.cluster.vmctl('A', 'pool', 'warm', this.guest.name, ...options));
    }
    await sleep(SETTLE_MS);
    const before = readWork(await this.#parentLog());
    const logs = Array.from({ length: Math.min(count, 8) }, (_, index) =>
      this.#path(`${prefix}-${index}`, 'serial.log'),
    );
    const probe = new MemoryProbe(this.#path(`${prefix}-${count - 1}`, 'record.json'));
    const work = firstWork(() => logs);
    work.catch(() => undefined);
    const { report, createdAtMs, cpuS } = await this.#fork(shape);
    // Otherwise the pool starts the next set of processes during the measurement.
    await this.cluster.api('A').post('/v1/pool/drain', {});
    probe.stop();
    const clones = await this.#clones(prefix);
    const pids = clones.map(({ pid }) => pid ?? 0);
    const now = memoryOf({ pids });
    const firstWorkMs = performance.timeOrigin + (await work) - createdAtMs;
    await sleep(LATER_MS);
    const later = memoryOf({ pids });
    const parentBackMs = count < cpus().length ? await this.#backMs(before) : null;
    const image = await this.cluster.api('A').get<ImageView>(`/v1/images/${report.image}`);
    const { badPages, distinctCount } = await checkClones(this.cluster, report.clones);
    const parent = await this.guest.verify('A');
    await this.#remove(report.image);
    return {
      name: isWarm ? 'ours-warm' : 'ours-cold',
      parentMiB: this.memoryMiB,
      clones: count,
      parentPauseMs: report.parentPauseMs,
      parentBackMs,
      firstMs: report.firstReadyMs,
      lastMs: report.lastReadyMs,
      firstWorkMs,
      totalMs: report.totalMs,
      privateMiBPerClone: probe.at(createdAtMs + (report.clones.at(-1)?.readyMs ?? 0)),
      privateMiBPerCloneLater: later.privateMiB,
      sharedMiB: image.allocatedBytes / MIB,
      faultsPerClone: now.faults,
      cpuMsPerClone: (cpuS * 1000) / count,
      badPagesParent: parent.bad,
      badPagesClones: badPages,
      distinctClones: distinctCount,
    };
  }

  async stop(): Promise<void> {
    await this.cluster.must(this.cluster.vmctl('A', 'stop', '--force', this.guest.name));
  }

  /** Submits the fork and follows it, so that its cost is read at the moment when its last clone runs. */
  async #fork(shape: object): Promise<Forked> {
    const api = this.cluster.api('A');
    const usedS = () => cpuSeconds([this.cluster.daemonPid('A'), ...qemusOf(`${this.cluster.hostDirectory('A')}/`)]);
    // Waiting processes have used CPU time before the fork; the others start with none.
    const beforeS = usedS();
    const lookNoMore = lookAhead();
    const giveUp = AbortSignal.timeout(FORK_MS);
    const { id, createdAt } = await api.post<ForkJobView>('/v1/forks', shape);
    let cpuS = Number.NaN;
    let last: ForkJobView | null = null;
    const onView = (view: JobView): boolean => {
      if (view.kind !== 'fork') return true;
      last = view;
      const isRunning = view.clones.length > 0;
      if (isRunning && Number.isNaN(cpuS)) cpuS = usedS() - beforeS;
      return view.report !== null || view.error !== null;
    };
    await api.followJob(id, onView, giveUp).finally(lookNoMore);
    const { report, error } = (last as ForkJobView | null) ?? { report: null, error: 'the job sent no view' };
    if (report === null) throw new Error(`the fork has failed: ${JSON.stringify(error)}`);
    return { report, createdAtMs: Date.parse(createdAt), cpuS };
  }

  /**
   * Returns the time until the parent is back at 90 % of its speed: the speed before the fork, or the lasting speed
   * beside its clones if they slow it down.
   */
  async #backMs(before: ReturnType<typeof readWork>): Promise<number> {
    const after = readWork(await this.#parentLog()).slice(before.length);
    const rate = (windows: typeof after) => median(windows.map(({ ops, windowMs }) => ops / windowMs));
    const settled = after.slice(-SETTLED_WINDOWS);
    return rateAfter(rate(settled) < rate(before.slice(-SETTLED_WINDOWS)) ? settled : before, after).degradedMs;
  }

  async #parentLog(): Promise<string> {
    return (await this.guest.view('A'))?.serialLog ?? '';
  }

  async #clones(prefix: string): Promise<VmView[]> {
    const all = await this.cluster.api('A').get<VmView[]>('/v1/vms');
    return all.filter((vm) => vm.name.startsWith(`${prefix}-`));
  }

  async #remove(image: string): Promise<void> {
    // The first call stops the clones, the second removes them.
    for (let n = 0; n < 2; n++) await this.cluster.must(this.cluster.vmctl('A', 'stop', '--force', '--image', image));
    await this.cluster.must(this.cluster.vmctl('A', 'image', 'rm', image));
  }

  #path(vm: string, file: string): string {
    return join(this.cluster.hostDirectory('A'), 'state/vms', vm, file);
  }
}
