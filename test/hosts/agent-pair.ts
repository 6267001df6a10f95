/**
 * The agents of two hosts in one process, without daemons: real QEMU, real addon, real registries, and peers that call
 * each other directly. `moveByPostcopy` plays the coordinator, in the engine's order.
 */
import { randomBytes } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { LocalAgent } from '../../src/agent/agent.js';
import { NO_OTHER_HOSTS, type OtherHosts } from '../../src/agent/image/layer-holders.js';
import type { MemoryReading } from '../../src/agent/vm/memory-pressure.js';
import type { Peers } from '../../src/agent/vm/peers.js';
import { VmManager } from '../../src/agent/vm/vms.js';
import { QemuBackend } from '../../src/backends/qemu/backend.js';
import { FileRegistry } from '../../src/cluster/file.js';
import { MigrationError } from '../../src/domain/errors.js';
import type { MigrationMode } from '../../src/domain/migration.js';
import { EVERYTHING_ALLOWED } from '../../src/domain/policy.js';
import type { Transport } from '../../src/domain/transport.js';
import type { VmSpec } from '../../src/domain/vm.js';
import type { PrepareRequest, SessionProgress } from '../../src/engine/ports/session.js';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { DataListenerHandle } from '../../src/native/types.js';
import { parseSpec } from '../../src/schemas/vm-spec.js';
import { HostTransports, sharedPlaces } from '../../src/transports/host/host-transports.js';
import { RdmaHost } from '../../src/transports/rdma/host.js';
import { QEMU_USERS } from '../support/qemu-user.js';
import { eventually } from './cluster.js';
import { type GuestOptions, guestSpec, parseWork } from './guest.js';
import { Janitor } from './janitor.js';

const RELEASE = fileURLToPath(new URL('../../build/native/Release', import.meta.url));
const DRAIN_MS = 60_000;
const BOOT_MS = 90_000;
export const AMPLE: MemoryReading = { availableBytes: 2 ** 40, stallPercent: 0 };

export interface LogLine {
  readonly level: string;
  readonly message: string;
  readonly fields: Readonly<Record<string, unknown>>;
}

/** One host. `restart` does what a restart of the daemon does; QEMU keeps running. */
export class AgentHost {
  readonly log: LogLine[] = [];
  /** Names of points of InjectPort that throw; each does so once. */
  readonly failures = new Set<string>();
  /** Functions that are called at such a point before it is passed, by name; each once. */
  readonly atPoint = new Map<string, () => Promise<void>>();
  vms!: VmManager;
  agent!: LocalAgent;
  /** The memory reading that the agent gets, because the tests must not depend on the free memory of this machine. */
  memory: MemoryReading = AMPLE;
  registry!: FileRegistry;
  /** The hosts that may need disk layers of this one. */
  others: OtherHosts = NO_OTHER_HOSTS;
  #listener!: DataListenerHandle;

  constructor(
    readonly name: string,
    readonly directory: string,
    readonly peers: Peers,
  ) {}

  get ramDir(): string {
    return `/dev/shm/vmg-${this.directory.slice(-6)}-${this.name}`;
  }

  async start(): Promise<void> {
    const native = loadNativeBinding();
    const stateDir = join(this.directory, this.name);
    this.registry = await FileRegistry.open(join(stateDir, 'registry'));
    this.#listener = native.openDataListener({
      listen: sharedPlaces({ address: '127.0.0.1', port: 0 }, join(stateDir, 'shm.sock')),
    });
    const note = (level: string) => (fields: object, message: string) => {
      this.log.push({ level, message, fields: fields as Record<string, unknown> });
    };
    const log = { debug: note('debug'), info: note('info'), warn: note('warn'), error: note('error') };
    const preloadPath = join(RELEASE, 'libvmigrate-preload.so');
    const { name: host, ramDir, registry } = this;
    const backend = new QemuBackend();
    this.vms = new VmManager({
      host,
      stateDir,
      ramDir,
      accel: 'tcg',
      preloadPath,
      native,
      registry,
      backend,
      log,
      qemuUsers: QEMU_USERS,
    });
    await this.vms.start();
    const rdma = new RdmaHost({
      native,
      config: { address: null, port: 0, ackTimeoutExponent: 18, retryCount: 7 },
      dataAddress: '127.0.0.1',
      log,
    });
    this.agent = new LocalAgent({
      host,
      vms: this.vms,
      native,
      registry,
      peers: this.peers,
      transports: new HostTransports({ host, listener: this.#listener, devices: { rdma } }),
      rdma,
      dataAddress: '127.0.0.1',
      policy: EVERYTHING_ALLOWED,
      signer: null,
      multicast: { group: null, port: 7403, ttl: 1, bandwidthBytesPerS: 0 },
      stateDir,
      clock: {
        nowMs: () => performance.now(),
        isoNow: () => new Date().toISOString(),
        sleep: (ms, signal) => sleep(ms, undefined, signal === undefined ? {} : { signal }),
      },
      log,
      inject: {
        hit: async (point) => {
          const act = this.atPoint.get(point);
          this.atPoint.delete(point);
          await act?.();
          if (this.failures.delete(point))
            throw new MigrationError('CANCELLED', `a test ordered a failure at ${point}`);
        },
      },
      hostInfo: { preloadPath, ramDirProblem: null, socketMark: null, certificateExpiresAt: () => null },
      readMemory: async () => this.memory,
      otherHosts: this.others,
    });
    await this.agent.start();
  }

  async stop(): Promise<void> {
    await this.agent.close();
    this.#listener.close();
    await this.vms.close();
    await this.registry.close();
  }

  async restart(): Promise<void> {
    await this.stop();
    await this.start();
  }

  /** Removes all VMs, sessions, images and forks. */
  async clear(): Promise<void> {
    await this.agent.close();
    for (const { name } of this.vms.list()) await this.vms.destroy(name);
    for (const kind of ['images', 'forks'])
      await rm(join(this.directory, this.name, kind), { recursive: true, force: true });
    await this.restart();
  }

  /** Returns what forks have left on this host: image files and records. */
  forkTraces(): string[] {
    const state = join(this.directory, this.name);
    const files = (path: string) => (existsSync(path) ? readdirSync(path).map((name) => join(path, name)) : []);
    return [...files(join(this.ramDir, '.images')), ...files(join(state, 'images')), ...files(join(state, 'forks'))];
  }

  /** Returns the names of the files that a VM has on this host. */
  traces(vm: string): string[] {
    return [join(this.directory, this.name, 'vms', vm), join(this.ramDir, vm)].filter((path) => existsSync(path));
  }

  async serial(vm: string): Promise<string> {
    return readFile(this.vms.serialPaths(vm).log, 'utf8');
  }

  /** Asks the guest to check every word of every page. */
  async verify(vm: string): Promise<{ pages: number; bad: number }> {
    const before = (await this.serial(vm)).length;
    const socket = connect({ path: this.vms.serialPaths(vm).socket });
    socket.on('error', () => undefined);
    socket.resume();
    const asking = setInterval(() => socket.write('\nverify\n'), 3000);
    socket.write('verify\n');
    try {
      return await eventually(`verdict of ${vm}`, BOOT_MS, async () => {
        const match = /VERIFY pages (\d+) bad (\d+)/.exec((await this.serial(vm)).slice(before));
        return match === null ? undefined : { pages: Number(match[1]), bad: Number(match[2]) };
      });
    } finally {
      clearInterval(asking);
      socket.destroy();
    }
  }

  async goesOn(vm: string, windows = 3): Promise<void> {
    const before = parseWork(await this.serial(vm)).length;
    await eventually(`${vm} works on ${this.name}`, BOOT_MS, async () =>
      parseWork(await this.serial(vm)).length >= before + windows ? true : undefined,
    );
  }
}

export interface Move {
  readonly vm: string;
  readonly session: string;
  readonly job: string;
  readonly token: string;
  readonly from: AgentHost;
  readonly to: AgentHost;
  readonly transport: Transport;
  readonly mode: MigrationMode;
}

export class AgentPair {
  readonly a: AgentHost;
  readonly b: AgentHost;
  readonly #janitor: Janitor;
  /** Awaited before the device state is passed on; a test may park or break it. */
  onSendState: () => Promise<void> = async () => undefined;

  /** Called before a connection to a disk of this host; a test may throw. */
  onOpenDisk: (host: string) => void = () => undefined;
  /** Called with the way of QEMU's own migration to its target; a test may break it or make it slow. */
  onStream: (stream: Duplex) => Duplex = (stream) => stream;
  /** Hosts that are no peers of the other one any more. */
  readonly removed = new Set<string>();

  private constructor(readonly directory: string) {
    const hosts = () => [this.a, this.b];
    const find = (name: string) => {
      const host = hosts().find((candidate) => candidate.name === name);
      if (host === undefined) throw new MigrationError('NOT_FOUND', `no host ${name}`);
      return host;
    };
    const peers: Peers = {
      agent: (name) => find(name).agent,
      isPeer: (name) => !this.removed.has(name),
      sendState: async (name, session, body) => {
        await this.onSendState();
        await find(name).agent.target.acceptState(session, body);
      },
      sendForkState: async (name, fork, body) => find(name).agent.forks.acceptForkState(fork, body),
      openDisk: (name, image, disk) => {
        this.onOpenDisk(name);
        return find(name).agent.forks.openDisk(image, disk, name === 'A' ? 'B' : 'A');
      },
      openStream: async (name, session) => this.onStream(await find(name).agent.target.openStream(session)),
      warm: async () => undefined,
    };
    this.a = new AgentHost('A', directory, peers);
    this.b = new AgentHost('B', directory, peers);
    this.a.others = { names: ['B'], agent: (name) => find(name).agent };
    this.b.others = { names: ['A'], agent: (name) => find(name).agent };
    this.#janitor = new Janitor({ paths: [directory, this.a.ramDir, this.b.ramDir] });
  }

  static async start(): Promise<AgentPair> {
    const pair = new AgentPair(await mkdtemp(join(tmpdir(), 'vmg-')));
    await pair.a.start();
    await pair.b.start();
    return pair;
  }

  async end(): Promise<void> {
    await this.clear();
    for (const host of [this.a, this.b]) {
      await host.stop();
      await rm(host.ramDir, { recursive: true, force: true });
    }
    await rm(this.directory, { recursive: true, force: true });
    this.#janitor.dismiss();
  }

  /** Removes all VMs, sessions, images and forks, first from the host that may read from the other. */
  async clear(): Promise<void> {
    for (const host of [this.b, this.a]) await host.clear();
  }

  /** Boots a guest on A and waits until its workload reports. */
  async boot(options: GuestOptions): Promise<VmSpec> {
    await this.a.vms.run(parseSpec(guestSpec(options)));
    await eventually(`${options.name} works`, BOOT_MS, async () =>
      parseWork(await this.a.serial(options.name)).length >= 5 ? true : undefined,
    );
    return this.a.vms.get(options.name).spec;
  }

  move(vm: string, options: Partial<Move> = {}): Move {
    return {
      vm,
      session: randomBytes(16).toString('hex'),
      job: `job-${randomBytes(4).toString('hex')}`,
      token: randomBytes(32).toString('hex'),
      from: this.a,
      to: this.b,
      transport: 'tcp',
      mode: 'postcopy',
      ...options,
    };
  }
}

export async function prepareRequest(move: Move): Promise<PrepareRequest> {
  const { session, job, token, mode, from, vm } = move;
  const { spec, epoch, accel } = await from.agent.inventory.vmInventory(vm);
  return { session, job, token, mode, spec, epoch, accel, source: from.name, bandwidthBytesPerS: 0 };
}

/** Runs the steps from reserve to connectTarget. */
export async function upToConnect(move: Move): Promise<void> {
  const { from, to, session, vm, token, transport, job } = move;
  await from.agent.source.reserve(vm, job);
  await to.agent.target.prepare(await prepareRequest(move));
  await to.agent.target.connect(
    session,
    await from.agent.source.expose({ session, vm, token, transport, target: to.name }),
  );
}

export async function stopAndTransfer(move: Move): Promise<{ stoppedAtUs: number; deviceStateBytes: number }> {
  const { from, to, session, vm } = move;
  const { stoppedAtUs } = await from.agent.source.stop(vm, session);
  const [{ deviceStateBytes }] = await Promise.all([
    from.agent.source.transferState(vm, session, to.name),
    to.agent.target.awaitLoaded(session),
  ]);
  return { stoppedAtUs, deviceStateBytes };
}

/** Commits the move: from here on A's record names B. */
export async function commit({ from, to, session, vm }: Move): Promise<number> {
  const owner = await from.registry.owner(vm);
  const epoch = owner?.epoch ?? 0;
  await from.registry.swapOwner(vm, epoch, { vm, owner: to.name, epoch: epoch + 1, session });
  return epoch + 1;
}

export function drained({ to, session }: Move): Promise<SessionProgress> {
  return eventually('every page has arrived', DRAIN_MS, async () => {
    const progress = await to.agent.target.progress(session);
    if (progress.state === 'gone' || progress.state === 'failed') throw new Error(JSON.stringify(progress));
    return progress.state === 'complete' ? progress : undefined;
  });
}

export async function moveByPostcopy(
  move: Move,
): Promise<{ blackoutMs: number; deviceStateBytes: number; progress: SessionProgress }> {
  const { from, to, session, vm } = move;
  await upToConnect(move);
  const { stoppedAtUs, deviceStateBytes } = await stopAndTransfer(move);
  const epoch = await commit(move);
  const { resumedAtUs } = await to.agent.target.resume(session, epoch);
  const progress = await drained(move);
  await from.agent.source.release(vm, session);
  await to.agent.target.finish(session);
  return { blackoutMs: (resumedAtUs - stoppedAtUs) / 1000, deviceStateBytes, progress };
}
