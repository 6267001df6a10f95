/**
 * The baseline: stock QEMU moves the same guest between the same two namespaces, controlled over QMP as by an
 * operator's script. The processes have the cluster's directory on their command lines, so the cluster's clean-up finds
 * them.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, mkdirSync, openSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { qemuArguments } from '../../src/backends/qemu/command-line.js';
import { QmpClient } from '../../src/backends/qemu/qmp/client.js';
import type { VmSpec } from '../../src/domain/vm.js';
import { parseSpec } from '../../src/schemas/vm-spec.js';
import { type Cluster, eventually, sleep } from '../../test/hosts/cluster.js';
import { type GuestOptions, guestSpec } from '../../test/hosts/guest.js';
import type { HostNetwork } from '../../test/hosts/host-network.js';
import { CpuMeter, SAMPLE_MS } from './cpu.js';

/** The ways in which QEMU moves a guest: the arguments of its command `migrate`. */
const MODES = {
  precopy: { scheme: 'tcp', capabilities: [] },
  postcopy: { scheme: 'tcp', capabilities: ['postcopy-ram'] },
  'postcopy-preempt': { scheme: 'tcp', capabilities: ['postcopy-ram', 'postcopy-preempt'] },
  'rdma-precopy': { scheme: 'rdma', capabilities: [] },
  'rdma-pin-all-precopy': { scheme: 'rdma', capabilities: ['rdma-pin-all'] },
  'rdma-postcopy': { scheme: 'rdma', capabilities: ['postcopy-ram'] },
} as const satisfies Record<string, { scheme: 'tcp' | 'rdma'; capabilities: readonly string[] }>;

export type QemuMode = keyof typeof MODES;

/** Capabilities that are set for each move, so that none remains from an earlier one. */
const CAPABILITIES = ['events', 'postcopy-ram', 'postcopy-preempt', 'postcopy-blocktime', 'rdma-pin-all'];
const MOVE_MS = 120_000;

const PORT_FIRST = 7500;

export interface QemuProcess {
  readonly child: ChildProcess;
  readonly qmp: QmpClient;
  readonly host: string;
  readonly serialLog: string;
  /** File with what QEMU wrote to stderr. */
  readonly errorLog: string;
  readonly pid: number;
  vcpuThreads: number[];
}

export type BaselineGuest = Required<Pick<GuestOptions, 'name' | 'memoryMiB' | 'touchMiB' | 'writePercent'>> &
  Pick<GuestOptions, 'image'>;

export interface QemuMove {
  readonly blackoutMs: number;
  readonly totalMs: number;
  readonly bytes: number;
  /** Blocktime divided by requests; NaN if QEMU counts neither. */
  readonly requestMeanUs: number;
  readonly sourceCpuS: number;
  readonly targetCpuS: number;
}

export class QemuPair {
  private serial = 0;
  private readonly alive = new Set<QemuProcess>();
  private readonly spec: VmSpec;

  constructor(
    private readonly cluster: Cluster<HostNetwork>,
    private readonly guest: BaselineGuest,
    private readonly sampleMs = SAMPLE_MS,
  ) {
    this.spec = parseSpec(guestSpec({ ...guest, backing: 'private', hasPreload: false }));
  }

  async start(host: string, isIncoming: boolean): Promise<QemuProcess> {
    const directory = join(this.cluster.hostDirectory(host), `${this.guest.name}-${this.serial++}`);
    rmSync(directory, { recursive: true, force: true });
    mkdirSync(directory, { recursive: true });
    const socket = join(directory, 'qmp.sock');
    const serialLog = join(directory, 'serial.log');
    const [command = '', ...args] = this.cluster.network.commandOn(host, [
      'qemu-system-x86_64',
      ...this.arguments(directory, isIncoming),
    ]);
    const errorLog = join(directory, 'stderr.log');
    const child = spawn(command, args, { stdio: ['ignore', 'ignore', openSync(errorLog, 'a')] });
    await eventually('QEMU listens', 20_000, () => (existsSync(socket) ? true : undefined));
    const qmp = await QmpClient.connect(socket, { timeoutMs: 20_000 });
    const pid = child.pid as number;
    const cpus = await qmp.execute('query-cpus-fast');
    const started = { child, qmp, host, serialLog, errorLog, pid, vcpuThreads: cpus.map((cpu) => cpu['thread-id']) };
    this.alive.add(started);
    return started;
  }

  /**
   * Returns the arguments with which the daemon starts its QEMUs, so that the device state is the same. Only the memory
   * is QEMU's own.
   */
  private arguments(directory: string, isIncoming: boolean): string[] {
    const args = qemuArguments(this.spec, {
      accel: 'tcg',
      qmpPath: join(directory, 'qmp.sock'),
      monitorPath: join(directory, 'monitor.sock'),
      serialPath: join(directory, 'serial.sock'),
      serialLogPath: join(directory, 'serial.log'),
      agentPath: join(directory, 'agent.sock'),
      ramPaths: [],
      taps: {},
      isIncoming,
    });
    // Without -S the guest runs as soon as it is loaded.
    return args.filter((argument) => argument !== '-S');
  }

  /** Returns what the remaining processes have written to stderr. */
  errorTexts(): string[] {
    return [...this.alive].map(({ errorLog }) => readFileSync(errorLog, 'utf8'));
  }

  async endAll(): Promise<void> {
    for (const process of [...this.alive]) await this.end(process);
  }

  async end(process: QemuProcess): Promise<void> {
    this.alive.delete(process);
    process.qmp.close();
    if (process.child.exitCode !== null || process.child.signalCode !== null) return;
    const ended = new Promise((resolve) => process.child.once('exit', resolve));
    process.child.kill('SIGKILL');
    await ended;
  }

  /**
   * Moves `source` to `host`, and ends the source when it reports `completed`. The total includes the start of the
   * target's QEMU and the end of the source's, as it does for vmigrate.
   */
  async move(
    source: QemuProcess,
    host: string,
    mode: QemuMode,
    moveMsMax = MOVE_MS,
  ): Promise<{ target: QemuProcess; move: QemuMove }> {
    const startedAt = performance.now();
    const target = await this.start(host, true);
    const meters = [source, target].map((side) => new CpuMeter(() => [side]));
    const { scheme, capabilities: own } = MODES[mode];
    const isPostcopy = own.some((name) => name === 'postcopy-ram');
    for (const side of [source, target]) {
      const names: string[] = ['events', ...own, ...(side === target && isPostcopy ? ['postcopy-blocktime'] : [])];
      const capabilities = CAPABILITIES.map((capability) => ({ capability, state: names.includes(capability) }));
      await side.qmp.executeUntyped('migrate-set-capabilities', { capabilities });
      await side.qmp.executeUntyped('migrate-set-parameters', {
        'max-bandwidth': 100 * 2 ** 30,
        'downtime-limit': 300,
      });
    }
    const port = PORT_FIRST + (this.serial % 400);
    const uri = `${scheme}:${this.cluster.host(host).address}:${port}`;
    await target.qmp.executeUntyped('migrate-incoming', { uri });
    const stopped = source.qmp.waitForEvent('STOP', { timeoutMs: moveMsMax });
    const resumed = target.qmp.waitForEvent('RESUME', { timeoutMs: moveMsMax });
    // These are awaited below. Until then a QEMU that dies must not end the whole run.
    for (const event of [stopped, resumed]) event.catch(() => undefined);
    await source.qmp.executeUntyped('migrate', { uri });
    if (isPostcopy) await source.qmp.executeUntyped('migrate-start-postcopy');
    let sampledAt = 0;
    const status = await eventually('QEMU has moved the guest', moveMsMax, async () => {
      if (performance.now() - sampledAt >= this.sampleMs) {
        for (const meter of meters) meter.sample();
        sampledAt = performance.now();
      }
      const answer = (await source.qmp.executeUntyped('query-migrate')) as QemuStatus;
      if (answer.status === 'failed') throw new Error(`QEMU's own migration failed: ${JSON.stringify(answer)}`);
      return answer.status === 'completed' ? answer : undefined;
    });
    const sourceCpuS = meters[0]?.seconds() ?? 0;
    await this.end(source);
    const totalMs = performance.now() - startedAt;
    const [stop, resume] = await Promise.all([stopped, resumed]);
    await sleep(100);
    const incoming = (await target.qmp.executeUntyped('query-migrate')) as QemuStatus;
    const requests = status.ram?.['postcopy-requests'] ?? 0;
    const blockMs = incoming['postcopy-blocktime'] ?? Number.NaN;
    const move: QemuMove = {
      blackoutMs: (resume.timestampUs - stop.timestampUs) / 1000,
      totalMs,
      bytes: status.ram?.transferred ?? 0,
      requestMeanUs: requests > 0 ? (blockMs * 1000) / requests : Number.NaN,
      sourceCpuS,
      targetCpuS: meters[1]?.seconds() ?? 0,
    };
    return { target, move };
  }
}

interface QemuStatus {
  readonly status?: string;
  readonly ram?: { readonly transferred: number; readonly 'postcopy-requests': number };
  readonly 'postcopy-blocktime'?: number;
}
