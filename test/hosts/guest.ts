/**
 * The guest that checks its own memory, for tests and benchmarks: creates its spec, reads its console, and asks for its
 * verdict. guest/memtouch.c documents the lines on the console.
 */
import { readFile } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import type { VmView } from '../../src/domain/vm.js';
import { type Cluster, eventually } from './cluster.js';
import type { HostNetwork } from './host-network.js';

const BOOT_MS = 90_000;
const VERIFY_MS = 120_000;

export interface GuestOptions {
  readonly name: string;
  readonly memoryMiB?: number;
  readonly touchMiB?: number;
  readonly writePercent?: number;
  readonly cpus?: number;
  /**
   * linux: Linux with a workload such as memtouch. nano: guest/nano.c, for emulators inside emulators, with memory of
   * one region and its own workload.
   */
  readonly image?: 'linux' | 'nano';
  readonly workload?: string;
  /** Sizes of the memory regions (NUMA nodes), if there are several; their sum is the memory size. */
  readonly regionsMiB?: readonly number[];
  readonly backing?: 'shared' | 'private';
  /**
   * Percentage of time in which the workload rests; 0 by default. It saves CPU time in tests in which guests need not
   * be busy.
   */
  readonly restPercent?: number;
  readonly hasPreload?: boolean;
  /** Address of the guest's NIC in the cluster's guest network. */
  readonly address?: string;
  /** The guest shuts down when its power button is pressed. By default it has nobody who listens. */
  readonly hasButton?: boolean;
  readonly extra?: Record<string, unknown>;
}

export interface WorkWindow {
  /** The guest's monotonic clock, seconds. */
  readonly timeS: number;
  readonly windowMs: number;
  readonly ops: number;
  readonly gapMs: number;
  readonly bad: number;
}

const imageFile = (name: string): string =>
  join(process.env.VMIGRATE_CACHE ?? join(homedir(), '.cache/vmigrate'), 'guest', name);

export function guestImage(): { kernel: string; initrd: string } {
  return { kernel: imageFile('vmlinuz'), initrd: imageFile('initramfs.gz') };
}

export function nanoImage(): { kernel: string } {
  return { kernel: imageFile('nano') };
}

/** Returns the path of the initramfs with a guest agent. */
export function agentInitrd(): string {
  return guestImage().initrd.replace(/\.gz$/, '-agent.gz');
}

/** Parses the lines of guest/clone.c: returns the fields of each such line, in order. */
export function parseIdentity(log: string, kind: 'IDENTITY' | 'FORK'): Record<string, string>[] {
  return [...log.matchAll(new RegExp(`^VMG ${kind} (.*)$`, 'gm'))].map(([, fields = '']) =>
    Object.fromEntries(
      fields
        .trim()
        .split(' ')
        .map((field) => [field.slice(0, field.indexOf('=')), field.slice(field.indexOf('=') + 1)]),
    ),
  );
}

export function guestSpec(options: GuestOptions): Record<string, unknown> {
  const memoryMiB = options.memoryMiB ?? options.regionsMiB?.reduce((sum, size) => sum + size, 0) ?? 192;
  const cpus = options.cpus ?? 1;
  const workload = options.workload ?? 'memtouch';
  const append = [
    // At boot Linux checks that timer interrupts arrive, and panics if they do not. On busy processors an emulated
    // machine may deliver them too late.
    'console=ttyS0 quiet no_timer_check',
    `vmg.workload=${workload} vmg.mb=${options.touchMiB ?? 64} vmg.writepct=${options.writePercent ?? 20}`,
    `vmg.threads=${cpus} vmg.restpct=${options.restPercent ?? 0}`,
    ...(options.address === undefined ? [] : [`vmg.ip=${options.address}/24`]),
    ...(options.hasButton === true ? ['vmg.button=poweroff'] : []),
  ].join(' ');
  return {
    name: options.name,
    accel: 'tcg',
    cpus,
    memory: {
      size: `${memoryMiB}M`,
      ...(options.regionsMiB === undefined
        ? {}
        : { regions: options.regionsMiB.map((size) => ({ size: `${size}M` })) }),
      ...(options.backing === undefined ? {} : { backing: options.backing }),
    },
    ...(options.image === 'nano' ? nanoImage() : guestImage()),
    append,
    ...(options.address === undefined ? {} : { nics: [{ type: 'tap', bridge: 'br-guest' }] }),
    ...(options.hasPreload === undefined ? {} : { preload: options.hasPreload }),
    ...options.extra,
  };
}

export function parseWork(log: string): WorkWindow[] {
  return [
    ...log.matchAll(/^VMG WORK t=([\d.]+) window_ms=([\d.]+) ops=(\d+) gap_ms=([\d.]+) total=\d+ bad=(\d+)/gm),
  ].map(([, timeS, windowMs, ops, gapMs, bad]) => ({
    timeS: Number(timeS),
    windowMs: Number(windowMs),
    ops: Number(ops),
    gapMs: Number(gapMs),
    bad: Number(bad),
  }));
}

export class Guest {
  constructor(
    private readonly cluster: Cluster<HostNetwork>,
    readonly name: string,
  ) {}

  /** Starts a guest on `host` and waits until its workload reports. */
  static async start(cluster: Cluster<HostNetwork>, host: string, options: GuestOptions): Promise<Guest> {
    const { writeFile } = await import('node:fs/promises');
    const file = join(cluster.directory, `${options.name}.json`);
    await writeFile(file, JSON.stringify(guestSpec(options)));
    await cluster.must(cluster.vmctl(host, 'run', file));
    const guest = new Guest(cluster, options.name);
    const works = async () => ((await guest.work(host)).length >= 5 ? true : undefined);
    await eventually(`guest ${options.name} works`, BOOT_MS, works).catch(async (error: Error) => {
      throw new Error(`${error.message}; its console:\n${(await guest.serialLog(host)).slice(-2000)}`);
    });
    return guest;
  }

  async view(host: string): Promise<VmView | undefined> {
    const list = await this.cluster.api(host).get<VmView[]>('/v1/vms');
    return list.find((vm) => vm.name === this.name);
  }

  async serialLog(host: string): Promise<string> {
    const path = (await this.view(host))?.serialLog;
    return path === undefined || path === null ? '' : readFile(path, 'utf8').catch(() => '');
  }

  async work(host: string): Promise<WorkWindow[]> {
    return parseWork(await this.serialLog(host));
  }

  /** Waits for `count` new work windows on this host, which show that the guest runs here. */
  async expectProgress(host: string, count = 3, timeoutMs = 60_000): Promise<WorkWindow[]> {
    const before = (await this.work(host)).length;
    return eventually(`${this.name} keeps working on ${host}`, timeoutMs, async () => {
      const windows = await this.work(host);
      return windows.length >= before + count ? windows.slice(before) : undefined;
    });
  }

  /** Returns whether no new work window appears for a while, which shows that the guest does not run here. */
  async isSilent(host: string, forMs = 1500): Promise<boolean> {
    const before = (await this.work(host)).length;
    await new Promise((resolve) => setTimeout(resolve, forMs));
    return (await this.work(host)).length === before;
  }

  /** Asks the guest over its console to check every word of every page. */
  async verify(host: string): Promise<{ pages: number; bad: number }> {
    const line = await this.cluster.api(host).console(this.name, 0);
    let output = '';
    line.on('data', (data: Buffer) => (output += data.toString()));
    line.on('error', () => undefined);
    // A serial line may lose input that nobody reads, so the question is repeated until there is an answer.
    const asking = setInterval(() => line.write('\nverify\n'), 5000);
    line.write('verify\n');
    try {
      return await eventually(`${this.name} gives its verdict`, VERIFY_MS, () => {
        const match = /VERIFY pages (\d+) bad (\d+)/.exec(output);
        if (match) return { pages: Number(match[1]), bad: Number(match[2]) };
        if (line.destroyed) throw new Error(`the console of ${this.name} ended:\n${output.slice(-2000)}`);
        return undefined;
      });
    } finally {
      clearInterval(asking);
      line.destroy();
    }
  }

  /** Expects no bad page, neither seen by the workload nor in a full check. */
  async expectClean(host: string): Promise<void> {
    const { pages, bad } = await this.verify(host);
    const log = await this.serialLog(host);
    const seen = /^VMG BAD .*$/m.exec(log);
    if (pages === 0 || bad !== 0 || seen)
      throw new Error(`${this.name}: ${bad} bad of ${pages} pages; ${seen?.[0] ?? ''}`);
  }
}
