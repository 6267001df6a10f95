/**
 * The agent of one host with a fake QEMU and a fake addon that a test controls, for orders of events that cannot be
 * produced with the real ones.
 */
import { EventEmitter } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { LocalAgent, type LocalAgentOptions } from '../../src/agent/agent.js';
import { MemoryRoom } from '../../src/agent/vm/memory-room.js';
import { RamPlace } from '../../src/agent/vm/ram-place.js';
import type { VmManager } from '../../src/agent/vm/vms.js';
import { QemuBackend } from '../../src/backends/qemu/backend.js';
import { QemuConnection } from '../../src/backends/qemu/connection.js';
import { QemuProcess } from '../../src/backends/qemu/process.js';
import type { QmpEvent } from '../../src/backends/qemu/qmp/client.js';
import { FileRegistry } from '../../src/cluster/file.js';
import { MigrationError } from '../../src/domain/errors.js';
import { EVERYTHING_ALLOWED } from '../../src/domain/policy.js';
import type { VmState } from '../../src/domain/vm.js';
import type {
  DataListenerHandle,
  NativeBinding,
  NativeFailure,
  Place,
  TargetSessionState,
} from '../../src/native/types.js';
import { parseSpec } from '../../src/schemas/vm-spec.js';
import { HostTransports } from '../../src/transports/host/host-transports.js';
import { MemoryStore } from '../unit/durable/memory-store.js';
import { NO_RDMA } from '../unit/planner/planner-facts.js';

/** Answers the agent's QMP commands. A migration stops at pre-switchover, as vmigrate's do. */
export class FakeQemu {
  readonly commands: string[] = [];
  readonly events = new EventEmitter();
  migration = 'none';
  isRunning = true;
  #stream: Socket | null = null;
  /** Awaited before the command is answered. */
  onCommand: (command: string) => Promise<void> = async () => undefined;

  on(name: string, listener: (event: QmpEvent) => void): void {
    this.events.on(name, listener);
  }
  off(name: string, listener: (event: QmpEvent) => void): void {
    this.events.off(name, listener);
  }
  onClosed(listener: () => void): () => void {
    this.events.once('closed', listener);
    return () => this.events.off('closed', listener);
  }

  async executeUntyped(command: string): Promise<unknown> {
    this.commands.push(command);
    return command === 'query-named-block-nodes' ? [] : {};
  }

  async execute(command: string, args: { uri?: string } = {}): Promise<unknown> {
    this.commands.push(command);
    await this.onCommand(command);
    switch (command) {
      case 'migrate':
        return this.#migrate(args.uri ?? '');
      case 'migrate-continue':
        this.#stream?.end('state');
        this.#reach('completed');
        return {};
      case 'migrate_cancel':
        this.#reach('cancelled');
        return {};
      case 'query-migrate':
        return this.migration === 'none' ? {} : { status: this.migration };
      case 'query-status':
        return { running: this.isRunning, status: this.isRunning ? 'running' : 'paused' };
      case 'cont':
        this.isRunning = true;
        return {};
      case 'query-memdev':
        return [{ id: 'ram0', share: true }];
      case 'qom-list':
        return [];
      default:
        return {};
    }
  }

  #migrate(uri: string): object {
    if (uri.startsWith('unix:')) {
      this.#stream = connect({ path: uri.slice('unix:'.length) });
      this.#stream.on('error', () => undefined);
    }
    this.isRunning = false;
    this.#emit('STOP', {});
    this.#reach('pre-switchover');
    return {};
  }

  #reach(status: string): void {
    this.migration = status;
    this.#emit('MIGRATION', { status });
  }

  #emit(name: string, data: Record<string, unknown>): void {
    this.events.emit('event', { name, data, timestampUs: 1 } satisfies QmpEvent);
  }
}

/** Listens for one provider. */
export class FakeListener implements DataListenerHandle {
  isLost = false;
  readonly #provider: string;
  readonly #place: Place;

  constructor(provider: string, place: Place) {
    this.#provider = provider;
    this.#place = place;
  }

  address(provider: string): Place | null {
    return provider === this.#provider ? this.#place : null;
  }

  close(): void {}
}

export class FakeHost {
  readonly qemu = new FakeQemu();
  readonly vm: Record<string, unknown>;
  readonly destroyed: string[] = [];
  pages: TargetSessionState = 'filling';
  /** null: this host has no RDMA. */
  rdmaListener: FakeListener | null = null;
  /** The events of source sessions, in order. */
  readonly exposures: ('opened' | 'tracked' | 'scanned' | 'noted' | 'noted last' | 'closed')[] = [];
  /** The failure with which every source session from now on fails to open. */
  sourceFailure: NativeFailure | null = null;
  /** QEMU has written to guest memory after the last round. */
  hasLateWrites = false;
  /** Sends the device state. By default it takes for ever. */
  onSendState: () => Promise<void> = () => new Promise(() => undefined);
  onOpenSource: () => void = () => undefined;
  /** Awaited before a change of the VM's record takes effect. */
  onSetState: (state: VmState) => Promise<void> = async () => undefined;
  readonly registry: FileRegistry;
  readonly agent: LocalAgent;
  readonly #directory: string;
  readonly #place: RamPlace;

  private constructor(directory: string, registry: FileRegistry) {
    this.#directory = directory;
    this.#place = new RamPlace({ host: 'A', ramDir: join(directory, 'ram') });
    this.registry = registry;
    const spec = parseSpec({ name: 'web', memory: { size: '64M' } });
    const regions = [{ path: '/nowhere', lengthBytes: 64n << 20n, pageBytes: 4096 }];
    const fixed = {
      epoch: 1,
      accel: 'tcg',
      job: null,
      session: null,
      image: null,
      qemuVersion: '7.2.22',
      machine: 'q35',
    };
    this.vm = { spec, state: 'running', ...fixed, directory, regions, memory: {}, process: this.#process() };
    const silent = () => undefined;
    const fakes = { vms: this.#vms(), native: this.#native() };
    const noRdma = async () => Promise.reject(new MigrationError('UNSUPPORTED', 'no RDMA here'));
    const rdma = {
      listener: async () => this.rdmaListener ?? noRdma(),
      connection: noRdma,
    };
    this.agent = new LocalAgent({
      ...(fakes as unknown as Pick<LocalAgentOptions, 'vms' | 'native'>),
      host: 'A',
      registry,
      peers: {
        sendState: () => this.onSendState(),
        sendForkState: () => new Promise(() => undefined),
        openDisk: () => new Promise(() => undefined),
        openStream: () => new Promise(() => undefined),
        agent: () => {
          throw new MigrationError('NOT_FOUND', 'there is one host');
        },
        isPeer: () => true,
        warm: async () => undefined,
      },
      dataAddress: '127.0.0.1',
      policy: EVERYTHING_ALLOWED,
      signer: null,
      multicast: { group: null, port: 7403, ttl: 1, bandwidthBytesPerS: 0 },
      transports: new HostTransports({
        host: 'A',
        listener: new FakeListener('tcp', { host: '127.0.0.1', port: 1 }),
        devices: { rdma },
      }),
      rdma: { inventory: async () => NO_RDMA, probe: async () => ({ isReached: false }) },
      stateDir: directory,
      clock: { nowMs: () => performance.now(), isoNow: () => new Date().toISOString(), sleep: (ms) => sleep(ms) },
      log: { debug: silent, info: silent, warn: silent, error: silent },
      inject: { hit: async () => undefined },
      hostInfo: { preloadPath: null, ramDirProblem: null, socketMark: null, certificateExpiresAt: () => null },
    });
  }

  /** Creates a host on which the VM `web` runs in epoch 1. */
  static async make(): Promise<FakeHost> {
    const registry = await FileRegistry.on(new MemoryStore());
    await registry.swapOwner('web', null, { vm: 'web', owner: 'A', epoch: 1, session: null });
    const host = new FakeHost(await mkdtemp(join(tmpdir(), 'vmg-fake-')), registry);
    await (host.vm['process'] as QemuProcess).connect();
    host.qemu.commands.length = 0;
    return host;
  }

  /** As after a restart of the daemon, whose VM answers only then. */
  answerAfter(delayMs: number): void {
    const process = this.#process(delayMs);
    this.vm['process'] = process;
    void process.connect();
  }

  /** As after a restart of the daemon, whose VM has ended meanwhile. */
  neverAnswer(): void {
    this.vm['process'] = this.#process();
  }

  get stateDir(): string {
    return this.#directory;
  }

  presencePath(region: string): string {
    return join(this.#directory, `${region}.presence`);
  }

  async end(): Promise<void> {
    await this.agent.close();
    await this.#place.close();
    await rm(this.#directory, { recursive: true, force: true });
  }

  /** Unconnected; QEMU answers after so long. */
  #process(delayMs = 0): QemuProcess {
    const directory = this.#directory;
    const none = { serialPath: '', serialLogPath: '', exitPath: '', agentPath: '', outputPath: '' };
    const answer = async () => {
      await sleep(delayMs);
      return this.qemu as never;
    };
    return new QemuProcess(
      new QemuConnection({ name: 'web', directory, socketDirectory: directory, ...none }, answer),
      {
        program: 'qemu',
        hasLauncher: false,
      },
    );
  }

  #vms(): Partial<VmManager> {
    const place = this.#place;
    return {
      on: () => undefined,
      off: () => undefined,
      has: (name) => name === 'web',
      isTaken: (name) => name === 'web',
      list: () => [],
      unreadable: () => [],
      get: () => this.vm as never,
      all: () => [this.vm as never],
      backend: new QemuBackend(),
      view: () => ({ identityIssue: null, exitCode: null }) as never,
      exitOf: () => null,
      place,
      room: new MemoryRoom(place),
      clonesWriting: () => [],
      exitCode: async () => null,
      guestEnd: () => null as never,
      destroy: async (name) => void this.destroyed.push(name),
      presencePath: (_, region) => this.presencePath(region),
      setState: async (_, state) => {
        await this.onSetState(state);
        this.vm['state'] = state;
      },
    };
  }

  #native(): Partial<NativeBinding> {
    return {
      allocatedBytes: () => 0n,
      openSourceSession: async ({ tracked }) => {
        this.onOpenSource();
        this.exposures.push('opened', ...(tracked === undefined ? [] : ['tracked' as const]));
        let round = 0;
        return {
          keys: [],
          scan: () => void this.exposures.push('scanned'),
          noteDirty: async (isLast) => {
            this.exposures.push(isLast ? 'noted last' : 'noted');
            return { round: ++round, dirtyPages: 7, againPages: 2 };
          },
          hasChangedSinceLast: async () => this.hasLateWrites,
          digestChunks: async () => Buffer.alloc(0),
          snapshot: () => ({ counters: {} as never, failure: this.sourceFailure }),
          close: async () => void this.exposures.push('closed'),
        };
      },
      openTargetSession: () =>
        ({
          snapshot: () => ({ state: this.pages, failure: null, counters: {} }),
          connect: async () => undefined,
          serveDemand: () => undefined,
          start: () => undefined,
          close: async () => undefined,
        }) as never,
    };
  }
}
