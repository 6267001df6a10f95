/**
 * A cluster of test hosts, each with a real vmigrated, for end-to-end tests, the demo and the benchmarks. It ends
 * everything that it starts, if necessary by its janitor. Processes are found by this cluster's directory on their
 * command line, so no other process is ended.
 */
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { createWriteStream, existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, readlink, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ApiClient } from '../../src/api/client.js';
import { EVERYTHING_ALLOWED } from '../../src/domain/policy.js';
import { QEMU_USER_CONFIG } from '../support/qemu-user.js';
import type { HostNetwork } from './host-network.js';
import { Janitor } from './janitor.js';
import { Namespaces } from './namespaces.js';
import { inTurns } from './turns.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const API_PORT = 7400;
const DATA_PORT = 7401;
const DAEMON_READY_MS = 60_000;
const STARTS_AT_ONCE = 4;

export interface CommandResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

export type Program = 'vmctl' | 'vmigrate' | 'vfork';

export interface ClusterOptions {
  readonly hosts?: readonly string[];
  readonly hasGuestNetwork?: boolean;
  readonly rackCount?: number;
  readonly isVerbose?: boolean;
  /** Configuration of the daemons beyond their flags. */
  readonly daemonConfig?: Readonly<Record<string, unknown>>;
  /** Configuration of single hosts. Its keys replace those of `daemonConfig`. */
  readonly hostConfigs?: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
}

export class Cluster<Network extends HostNetwork = Namespaces> {
  private readonly daemons = new Map<string, ChildProcess>();
  private readonly janitor: Janitor;

  private constructor(
    readonly id: string,
    /** The name is short, because the path of a unix socket has at most 107 bytes. */
    readonly directory: string,
    readonly network: Network,
    private readonly isVerbose: boolean,
  ) {
    const ramDirectories = network.hosts.map(({ name }) => this.ramDirectory(name));
    this.janitor = new Janitor({ paths: [directory, ...ramDirectories], namespacePrefix: `vmg-${id}-` });
  }

  static async create(options: ClusterOptions = {}): Promise<Cluster> {
    const id = randomId();
    const network = await Namespaces.create({
      id,
      hosts: options.hosts ?? ['A', 'B'],
      hasGuestNetwork: options.hasGuestNetwork ?? false,
      ...(options.rackCount === undefined ? {} : { rackCount: options.rackCount }),
      ...(options.daemonConfig === undefined ? {} : { daemonConfig: options.daemonConfig }),
      ...(options.hostConfigs === undefined ? {} : { hostConfigs: options.hostConfigs }),
    });
    return Cluster.on(network, id, options.isVerbose);
  }

  /** Creates a cluster on existing hosts. */
  static async on<Network extends HostNetwork>(
    network: Network,
    id = randomId(),
    isVerbose = false,
  ): Promise<Cluster<Network>> {
    const directory = await mkdtemp(`/tmp/vmg-${id}-`);
    const cluster = new Cluster(id, directory, network, isVerbose);
    try {
      await cluster.makeCertificates();
      await cluster.writeConfigs();
      await inTurns(network.hosts, network.startsAtOnce ?? STARTS_AT_ONCE, ({ name }) => cluster.startDaemon(name));
      for (const host of network.hosts) await cluster.expectAcquaintance(host.name);
    } catch (error) {
      await cluster.destroy();
      throw error;
    }
    return cluster;
  }

  private get readyMs(): number {
    return this.network.daemonReadyMs ?? DAEMON_READY_MS;
  }

  hostDirectory(host: string): string {
    return join(this.directory, host);
  }

  ramDirectory(host: string): string {
    return `/dev/shm/vmg-${this.id}-${host}`;
  }

  private configPath(host: string): string {
    return join(this.hostDirectory(host), 'daemon.json');
  }

  apiSocket(host: string): string {
    return join(this.hostDirectory(host), 'api.sock');
  }

  private async makeCertificates(): Promise<void> {
    const ca = join(this.directory, 'ca');
    await this.must(this.local('vmctl', 'certs', 'init', ca));
    for (const host of this.network.hosts) {
      await mkdir(this.hostDirectory(host.name), { recursive: true });
      const out = join(this.hostDirectory(host.name), 'tls');
      await this.must(
        this.local('vmctl', 'certs', 'host', host.name, '--address', host.address, '--dir', ca, '--out', out),
      );
    }
  }

  private async writeConfigs(): Promise<void> {
    const { hosts, daemonConfig, hostConfigs = {} } = this.network;
    const open = { security: { allow: EVERYTHING_ALLOWED, qemuUser: QEMU_USER_CONFIG } };
    for (const { name } of hosts)
      await writeFile(this.configPath(name), JSON.stringify({ ...open, ...daemonConfig, ...hostConfigs[name] }));
  }

  daemonArguments(name: string): string[] {
    const host = this.network.host(name);
    const directory = this.hostDirectory(name);
    const peers = this.network.hosts
      .filter((peer) => peer.name !== name)
      .flatMap((peer) => ['--peer', `${peer.name}=https://${peer.address}:${API_PORT}`]);
    return [
      ...['--name', name, '--api', `unix:${this.apiSocket(name)}`, '--api', `https://${host.address}:${API_PORT}`],
      ...[
        '--data',
        `${host.address}:${DATA_PORT}`,
        '--state',
        join(directory, 'state'),
        '--ram-dir',
        this.ramDirectory(name),
      ],
      ...['--tls', join(directory, 'tls'), '--test-faults', ...peers],
      ...['--config', this.configPath(name)],
    ];
  }

  /** Starts the host's daemon and waits until its API answers. `env` may carry VMIGRATE_FAULT. */
  async startDaemon(name: string, env: Record<string, string> = {}): Promise<void> {
    // Run by its first line, as users run it, which sets flags for V8.
    const program = join(ROOT, 'dist/cli/vmigrated.js');
    const [command = '', ...args] = this.network.commandOn(name, [program, ...this.daemonArguments(name)]);
    // The daemon gets its own session, as from a service manager; the janitor ends it with this process.
    const child = spawn(command, args, {
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    });
    const log = createWriteStream(join(this.hostDirectory(name), 'daemon.log'), { flags: 'a' });
    child.stdout.pipe(log, { end: false });
    child.stderr.pipe(log, { end: false });
    if (this.isVerbose) child.stderr.pipe(process.stderr, { end: false });
    this.daemons.set(name, child);
    const deadline = Date.now() + this.readyMs;
    for (;;) {
      if (child.exitCode !== null || child.signalCode !== null)
        throw new Error(`vmigrated on ${name} ended at once:\n${await this.daemonLog(name)}`);
      if (existsSync(this.apiSocket(name)) && (await this.answers(name))) return;
      if (Date.now() > deadline)
        throw new Error(`vmigrated on ${name} does not answer:\n${await this.daemonLog(name)}`);
      await sleep(50);
    }
  }

  /**
   * Waits until the host knows its peers. The first inventory of a host starts QEMU to find out its abilities. If that
   * takes long, a command would not wait for it.
   */
  async expectAcquaintance(name: string): Promise<void> {
    await eventually(`${name} knows its peers`, this.readyMs, async () => {
      const hosts = await this.api(name).get<{ inventory: unknown }[]>('/v1/hosts');
      return hosts.every(({ inventory }) => inventory !== null) ? true : undefined;
    });
  }

  private answers(name: string): Promise<boolean> {
    return this.api(name)
      .get('/v1/vms')
      .then(
        () => true,
        () => false,
      );
  }

  async daemonLog(name: string): Promise<string> {
    return readFile(join(this.hostDirectory(name), 'daemon.log'), 'utf8').catch(() => '');
  }

  /** Returns the daemon's own pid; `ip netns exec` replaces itself by the daemon. */
  daemonPid(name: string): number {
    const pid = this.daemons.get(name)?.pid;
    if (pid === undefined) throw new Error(`no daemon on ${name}`);
    return pid;
  }

  isDaemonRunning(name: string): boolean {
    const child = this.daemons.get(name);
    return child !== undefined && child.exitCode === null && child.signalCode === null;
  }

  async stopDaemon(name: string, signal: NodeJS.Signals = 'SIGKILL'): Promise<void> {
    const child = this.daemons.get(name);
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const ended = new Promise((resolve) => child.once('exit', resolve));
    child.kill(signal);
    await ended;
  }

  /** Returns a client of the host's API, for frequent calls, which would take long as commands. */
  api(host: string): ApiClient {
    return new ApiClient({ host: `unix:${this.apiSocket(host)}`, tls: null });
  }

  vmctl(host: string, ...args: string[]): Promise<CommandResult> {
    return this.command(host, 'vmctl', args);
  }

  vmigrate(host: string, ...args: string[]): Promise<CommandResult> {
    return this.command(host, 'vmigrate', args);
  }

  vfork(host: string, ...args: string[]): Promise<CommandResult> {
    return this.command(host, 'vfork', args);
  }

  /** Runs one of vmigrate's commands with the host's daemon over its unix socket. */
  command(host: string, program: Program, args: readonly string[]): Promise<CommandResult> {
    return this.local(program, '--host', `unix:${this.apiSocket(host)}`, ...args);
  }

  /** Runs a command that must succeed, and returns its JSON. */
  async json<T>(host: string, program: Program, ...args: string[]): Promise<T> {
    const { stdout } = await this.must(this.command(host, program, [...args, '--json']));
    return JSON.parse(stdout) as T;
  }

  local(program: Program, ...args: string[]): Promise<CommandResult> {
    return runCommand(process.execPath, [join(ROOT, `dist/cli/${program}.js`), ...args]);
  }

  inNamespace(namespace: string, command: string, ...args: string[]): Promise<CommandResult> {
    return runCommand('ip', ['netns', 'exec', namespace, command, ...args]);
  }

  async must(result: Promise<CommandResult>): Promise<CommandResult> {
    const { code, stdout, stderr } = await result;
    if (code !== 0) throw new Error(`command ended with ${code}\n${stdout}\n${stderr}`);
    return { code, stdout, stderr };
  }

  host(name: string): Network['hosts'][number] {
    return this.network.host(name);
  }

  /** Finds the QEMU processes of one host of this cluster (or of all) by their command line. */
  async qemuPids(host?: string): Promise<number[]> {
    const needle =
      host === undefined ? [`vmg-${this.id}-`] : [`${this.hostDirectory(host)}/`, `${this.ramDirectory(host)}/`];
    const pids: number[] = [];
    for (const entry of await readdir('/proc')) {
      if (!/^\d+$/.test(entry)) continue;
      const program = await readlink(`/proc/${entry}/exe`).catch(() => '');
      if (!program.includes('qemu-system')) continue;
      const commandLine = await readFile(`/proc/${entry}/cmdline`, 'utf8').catch(() => '');
      if (needle.some((text) => commandLine.includes(text))) pids.push(Number(entry));
    }
    return pids;
  }

  async destroy(): Promise<void> {
    for (const name of this.daemons.keys()) await this.stopDaemon(name);
    for (const pid of await this.qemuPids()) {
      try {
        process.kill(pid, 'SIGKILL');
      } catch {
        // The process has ended by itself.
      }
    }
    await this.network.destroy();
    for (const host of this.network.hosts) await rm(this.ramDirectory(host.name), { recursive: true, force: true });
    if (process.env.VMIGRATE_KEEP_LOGS === undefined) await rm(this.directory, { recursive: true, force: true });
    this.janitor.dismiss();
  }
}

function randomId(): string {
  return randomBytes(3).toString('hex');
}

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Calls `probe` until it returns something other than undefined. Throws an error with `what` after the timeout. */
export async function eventually<T>(
  what: string,
  timeoutMs: number,
  probe: () => Promise<T | undefined> | T | undefined,
): Promise<T> {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const value = await probe();
    if (value !== undefined) return value;
    if (Date.now() > deadline) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    await sleep(20);
  }
}

export function runCommand(command: string, args: readonly string[], timeoutMs = 120_000): Promise<CommandResult> {
  return new Promise((resolve) => {
    execFile(command, [...args], { timeout: timeoutMs, maxBuffer: 64 << 20 }, (error, stdout, stderr) => {
      const code = error === null ? 0 : typeof error.code === 'number' ? error.code : 128;
      resolve({ code, stdout, stderr });
    });
  });
}
