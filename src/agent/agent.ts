/**
 * What one host does in a migration, as AgentPort (see the rules there): the VMs that arrive, the VMs that leave, and
 * what pre-flight asks.
 */
import { randomBytes } from 'node:crypto';
import type { Readable } from 'node:stream';
import type { NativeMoveOrder } from '../backends/backend.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { ForkInventory, HostInventory, TargetChecks, VmInventory } from '../domain/host.js';
import type { RdmaPlace } from '../domain/transport.js';
import type { VmSpec } from '../domain/vm.js';
import type { AgentPort } from '../engine/ports/agent.js';
import type {
  ForkAgentPort,
  ForkPointReply,
  ForkProgress,
  PrepareForkReply,
  PrepareForkRequest,
  StartClonesReply,
} from '../engine/ports/fork.js';
import type {
  Legacy,
  PrepareReply,
  PrepareRequest,
  SessionProgress,
  SourceEndpointInfo,
} from '../engine/ports/session.js';
import { ForkAgent } from './fork/agent.js';
import type { ForkContext } from './fork/context.js';
import { Images } from './fork/image-calls.js';
import type { ForkQuestion } from './fork/inventory.js';
import { Pool, type PoolConfig } from './fork/pool.js';
import { openForkStore } from './fork/record.js';
import { ImageStore } from './image/store.js';
import { checkTarget, type HostInfo, hostInventory, vmInventory } from './inventory/inventory.js';
import type { MigrationContext } from './migration/context.js';
import { SessionStore } from './migration/session-store.js';
import { SourceAgent } from './migration/source-agent.js';
import { TargetAgent } from './migration/target-agent.js';
import type { HostContext } from './vm/context.js';
import { type MemoryReading, readMemory } from './vm/memory-pressure.js';

export interface LocalAgentOptions extends HostContext {
  readonly stateDir: string;
  readonly hostInfo: HostInfo;
  readonly imageBudgetBytes?: number | null;
  readonly pool?: Partial<PoolConfig>;
  /** Where a test says what the host's memory is like. */
  readonly readMemory?: () => Promise<MemoryReading>;
}

const POOL_DEFAULT: PoolConfig = {
  processesMax: 256,
  memoryAvailableBytesMin: 512 * 1024 * 1024,
  memoryStallPercentMax: 20,
};

interface Parts {
  readonly context: ForkContext & MigrationContext;
  readonly target: TargetAgent;
  readonly source: SourceAgent;
  readonly forks: ForkAgent;
  readonly pool: Pool;
  readonly images: Images;
}

export class LocalAgent implements AgentPort, ForkAgentPort {
  readonly host: string;
  readonly #options: LocalAgentOptions;
  #parts: Parts | null = null;

  constructor(options: LocalAgentOptions) {
    this.host = options.host;
    this.#options = options;
  }

  /** Takes the sessions of an earlier daemon up again. After VmManager.start, before any call. */
  async start(): Promise<void> {
    const store = await SessionStore.open(this.#options.stateDir);
    const { imageBudgetBytes: budgetBytes = null, pool: poolConfig, readMemory: read, ...options } = this.#options;
    const images = await ImageStore.open({ ...options, budgetBytes });
    const forkStore = await openForkStore(options.stateDir);
    const context: Parts['context'] = { ...options, store, images, forkStore };
    const target = new TargetAgent(context);
    const source = new SourceAgent(context);
    const pool = new Pool(context, {
      stateDir: options.stateDir,
      config: { ...POOL_DEFAULT, ...poolConfig },
      randomId: () => randomBytes(8).toString('hex'),
      readMemory: read ?? readMemory,
    });
    const forks = new ForkAgent(context, pool, (vm) => target.arriving(vm));
    const ofUsers = new Images(context, (image) => forks.claims(image) || pool.has(image));
    this.#parts = { context, target, source, forks, pool, images: ofUsers };
    const { records, corrupt } = await store.load();
    for (const error of corrupt) context.log.error({ err: error }, 'a session cannot be taken up again');
    for (const record of records) {
      try {
        await (record.role === 'target' ? target.takeUp(record) : source.takeUp(record));
      } catch (error) {
        const err = toMigrationError(error);
        context.log.error({ session: record.session, err }, 'a session cannot be taken up again');
      }
    }
    await forks.start();
    await this.#settleVms(this.#parts);
    await pool.start();
  }

  /** Sessions and QEMUs stay as they are for a next daemon. Before VmManager.close. */
  async close(): Promise<void> {
    await this.#parts?.source.close();
    await this.#parts?.target.close();
    await this.#parts?.pool.close();
    await this.#parts?.forks.close();
  }

  inventory(): Promise<HostInventory> {
    return hostInventory(this.#ready.context, this.#options.hostInfo);
  }

  async vmInventory(vm: string): Promise<VmInventory> {
    const { context, target } = this.#ready;
    const inventory = await vmInventory(context, vm);
    return { ...inventory, job: inventory.job ?? (await target.arriving(vm)) };
  }

  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks> {
    return checkTarget(this.#ready.context, spec, source);
  }

  prepare(request: PrepareRequest): Promise<PrepareReply> {
    return this.#ready.target.prepare(request);
  }

  async connect(session: string, source: SourceEndpointInfo): Promise<void> {
    await this.#ready.target.connect(session, source);
  }

  /** The device state of a session, from the source. Resolves when QEMU has loaded it. */
  async acceptState(session: string, stream: Readable): Promise<void> {
    await this.#ready.target.acceptState(session, stream);
  }

  async awaitLoaded(session: string): Promise<void> {
    await this.#ready.target.awaitLoaded(session);
  }

  async resume(session: string, epoch: number): ReturnType<AgentPort['resume']> {
    return this.#ready.target.resume(session, epoch);
  }

  async progress(session: string): Promise<SessionProgress> {
    return this.#ready.target.progress(session);
  }

  async reconnect(session: string, source: SourceEndpointInfo): Promise<void> {
    await this.#ready.target.connect(session, source);
  }

  async inherit(session: string, legacy: Legacy): Promise<void> {
    await this.#ready.target.inherit(session, legacy);
  }

  async finish(session: string): Promise<void> {
    await this.#ready.target.finish(session);
  }

  async discard(session: string): Promise<void> {
    await this.#ready.target.discard(session);
  }

  async reserve(vm: string, job: string): Promise<void> {
    await this.#ready.context.vms.reserve(vm, job);
  }

  async unreserve(vm: string, job: string): Promise<void> {
    await this.#ready.context.vms.unreserve(vm, job);
  }

  async expose(request: Parameters<AgentPort['expose']>[0]): Promise<SourceEndpointInfo> {
    const { context, source, target } = this.#ready;
    const { vms, images } = context;
    const { vm: name } = request;
    const job = vms.has(name) ? await target.arriving(name) : null;
    if (job !== null) {
      throw new MigrationError('VM_BUSY', `memory of ${name} is still missing here: it arrives by job ${job}`);
    }
    const image = vms.has(name) ? vms.get(name).image : null;
    if (image !== null && images.get(image).state !== 'complete') {
      throw new MigrationError('VM_BUSY', `memory of ${name} is still missing here: its image is being filled`);
    }
    return source.expose(request);
  }

  async unexpose(session: string): Promise<void> {
    await this.#ready.source.unexpose(session);
  }

  async stop(_vm: string, session: string): ReturnType<AgentPort['stop']> {
    return this.#ready.source.stop(session);
  }

  async continueVm(vm: string, session: string): Promise<void> {
    await this.#ready.source.continueVm(vm, session);
  }

  async transferState(_vm: string, session: string, target: string): ReturnType<AgentPort['transferState']> {
    return this.#ready.source.transferState(session, target);
  }

  async nativeMigrate(vm: string, session: string, options: NativeMoveOrder): Promise<void> {
    await this.#ready.source.nativeMigrate(vm, session, options);
  }

  async nativeProgress(vm: string): ReturnType<AgentPort['nativeProgress']> {
    return this.#ready.source.nativeProgress(vm);
  }

  async nativeCancel(vm: string, session: string): Promise<void> {
    await this.#ready.source.nativeCancel(vm, session);
  }

  async sourceCounters(session: string): ReturnType<AgentPort['sourceCounters']> {
    return this.#ready.source.counters(session);
  }

  async release(vm: string, session: string): Promise<void> {
    await this.#ready.source.release(vm, session);
  }

  async forkInventory(request: ForkQuestion): Promise<ForkInventory> {
    return this.#ready.forks.forkInventory(request);
  }

  async prepareClones(request: PrepareForkRequest): Promise<PrepareForkReply> {
    return this.#ready.forks.prepareClones(request);
  }

  async armParent(fork: string): Promise<void> {
    await this.#ready.forks.armParent(fork);
  }

  async forkPoint(fork: string): Promise<ForkPointReply> {
    return this.#ready.forks.forkPoint(fork);
  }

  async startClones(fork: string): Promise<StartClonesReply> {
    return this.#ready.forks.startClones(fork);
  }

  async commitFork(fork: string): Promise<void> {
    await this.#ready.forks.commitFork(fork);
  }

  async forkProgress(fork: string): Promise<ForkProgress> {
    return this.#ready.forks.forkProgress(fork);
  }

  async finishFork(fork: string): Promise<void> {
    await this.#ready.forks.finishFork(fork);
  }

  async discardFork(fork: string): Promise<void> {
    await this.#ready.forks.discardFork(fork);
  }

  /** After `start`. */
  get images(): Images {
    return this.#ready.images;
  }

  /** After `start`. */
  get pool(): Pool {
    return this.#ready.pool;
  }

  get #ready(): Parts {
    if (this.#parts === null) throw new MigrationError('INTERNAL', 'the agent has not been started');
    return this.#parts;
  }

  /**
   * An incoming VM that no session claims is nobody's; one that the registry gives to another host does not run here
   * any more. An image that no fork has committed is nobody's either: of a set of waiting QEMUs of the daemon before.
   */
  async #settleVms({ context, target, forks }: Parts): Promise<void> {
    const { vms, images, registry, host } = context;
    for (const vm of vms.all()) {
      const { name } = vm.spec;
      const owner = await registry.owner(name);
      const isForeign = owner !== null && owner.owner !== host;
      const isClaimed = vm.image === null ? target.claims(vm.session) : forks.claims(vm.image);
      if (vm.state === 'incoming' && !isClaimed) await vms.destroy(name);
      else if (isForeign && (vm.state === 'running' || vm.state === 'paused')) await vms.setState(name, 'departed');
    }
    for (const { id, state } of images.all()) if (state === 'capturing' && !forks.claims(id)) await images.delete(id);
  }
}
