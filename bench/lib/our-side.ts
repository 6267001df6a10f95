import type { MigrationReport } from '../../src/domain/migration.js';
import type { VmView } from '../../src/domain/vm.js';
import { type Cluster, sleep } from '../../test/hosts/cluster.js';
import { Guest, type GuestOptions } from '../../test/hosts/guest.js';
import type { HostNetwork } from '../../test/hosts/host-network.js';
import { CpuMeter, SAMPLE_MS } from './cpu.js';
import { LOST_WORK_AFTER_MS, lostWork, missingWorkMs, usualRate } from './lost-work.js';
import { LeavingLog, rateAfter, readWork } from './rate.js';
import type { Trial } from './rows.js';

/** Waiting times before and after a move, which show the guest's rate before and after. */
export const SETTLE_MS = 2500;
export const AFTER_MS = LOST_WORK_AFTER_MS + 300;
/** For the noise floor: about as long as a move of this guest takes. */
const UNMOVED_MS = 700;

export const other = (host: string): string => (host === 'A' ? 'B' : 'A');

/** vmigrate's side of the benchmark: a VM run by the daemons and moved by `vmigrate`. */
export class OurSide {
  host = 'A';
  private constructor(
    private readonly cluster: Cluster<HostNetwork>,
    readonly guest: Guest,
    private readonly sampleMs: number,
  ) {}

  /** `sampleMs` is the interval of the meters. Sampling itself costs CPU time. */
  static async start(cluster: Cluster<HostNetwork>, options: GuestOptions, sampleMs = SAMPLE_MS): Promise<OurSide> {
    return new OurSide(cluster, await Guest.start(cluster, 'A', options), sampleMs);
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

  /** `flags` name the mode, too. */
  async move(...flags: string[]): Promise<{ trial: Trial; report: MigrationReport }> {
    const source = this.host;
    const target = other(source);
    await sleep(SETTLE_MS);
    const log = new LeavingLog((await this.view(source)).serialLog as string);
    const before = log.work();
    const meters = [source, target].map((host) => new CpuMeter(() => this.processes(host)));
    const sampling = setInterval(() => meters.forEach((meter) => meter.sample()), this.sampleMs);
    const report = await this.cluster.json<MigrationReport>(source, 'vmigrate', this.guest.name, target, ...flags);
    clearInterval(sampling);
    const cpuS = meters.map((meter) => meter.seconds());
    this.host = target;
    await sleep(AFTER_MS);
    const after = readWork((await this.view(target)).serialLog as string);
    const rate = rateAfter(before, after);
    const atSource = log.work().slice(before.length);
    log.close();
    const { push, demand, prefetch, deviceState } = report.bytes;
    const trial: Trial = {
      blackoutMs: report.blackoutByEventsMs,
      lostWorkMs: lostWork({ before, source: atSource, target: after, blackoutMs: report.blackoutByEventsMs }),
      degradedMs: rate.degradedMs,
      stallMsMax: rate.stallMsMax,
      faultP50Us: report.faults.p50Us,
      faultP99Us: report.faults.p99Us,
      requestMeanUs: Number.NaN,
      totalMs: report.totalMs,
      bytes: push + demand + prefetch + deviceState,
      sourceCpuS: cpuS[0] ?? 0,
      targetCpuS: cpuS[1] ?? 0,
    };
    return { trial, report };
  }

  /** Returns how much work the guest loses, in milliseconds, in the time of a move in which it is not moved. */
  async stay(): Promise<number> {
    await sleep(SETTLE_MS);
    const serialLog = (await this.view(this.host)).serialLog as string;
    const before = readWork(serialLog);
    await sleep(UNMOVED_MS + AFTER_MS);
    const after = readWork(serialLog).slice(before.length);
    return missingWorkMs(after, usualRate(before), UNMOVED_MS + LOST_WORK_AFTER_MS);
  }

  /**
   * Returns the processes to measure: only the daemon. With vmigrate, QEMU's threads move only device state, not
   * memory.
   */
  private processes(host: string): { pid: number; vcpuThreads: number[] }[] {
    return [{ pid: this.cluster.daemonPid(host), vcpuThreads: [] }];
  }
}
