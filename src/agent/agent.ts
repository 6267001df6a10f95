/**
 * Implements HostPort for this host. It assembles the agents for outgoing VMs, incoming VMs, forks and images, and the
 * inventory that pre-flight asks.
 */
import { randomBytes } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { JobView } from '../domain/job.js';
import type { HostPort } from '../engine/ports/host.js';
import { ForkAgent } from './fork/agent.js';
import { DiskReader } from './fork/bases/disk-reader.js';
import { DiskServer } from './fork/bases/disk-server.js';
import { DiskWaits } from './fork/bases/disk-waits.js';
import type { ForkContext } from './fork/context.js';
import { resumeMerges } from './fork/live-merge.js';
import { FanoutAgent } from './fork/pages/fanout-agent.js';
import { ImageServers } from './fork/pages/image-servers.js';
import { Pool, type PoolConfig } from './fork/pool.js';
import { openForkStore } from './fork/record.js';
import { sealLayers } from './fork/settle.js';
import { HostImages } from './host-images.js';
import { clearBrokenSaves } from './image/file-save.js';
import type { FileSigner } from './image/file-signature.js';
import { holdersHere, type OtherHosts } from './image/layer-holders.js';
import { hasLayerDuty, ImageStore } from './image/store.js';
import { InventoryAgent } from './inventory/agent.js';
import type { HostInfo } from './inventory/inventory.js';
import { CloneMemoryWatch } from './memory/clone-memory.js';
import type { MigrationContext } from './migration/context.js';
import { SessionStore } from './migration/session-store.js';
import { SourceAgent } from './migration/source-agent.js';
import { TargetAgent } from './migration/target-agent.js';
import { OutdatedRecords } from './outdated.js';
import { Markers } from './storage/markers.js';
import { Ties } from './ties.js';
import { UniqueNames } from './unique-names.js';
import { UserVms } from './user-vms.js';
import type { HostContext } from './vm/context.js';
import { type MemoryReading, readMemory } from './vm/memory-pressure.js';
import { VmMoves } from './vm-moves.js';

/** What the agent asks the jobs that this host coordinates. */
export interface JobsHere {
  /** The job that holds the VM, if any. */
  jobOf(vm: string): JobView | undefined;
  /** Ends a committed migration from this host as lost. Throws CONFLICT if that would lose nothing. */
  giveUp(job: string): Promise<void>;
}

export interface LocalAgentOptions extends HostContext {
  readonly stateDir: string;
  readonly hostInfo: HostInfo;
  /** The other hosts, which are asked before a VM starts. Absent: there are none. */
  readonly hosts?: { readonly names: readonly string[]; agent(host: string): HostPort };
  /** Null: this host has no certificate. */
  readonly signer: FileSigner | null;
  readonly imageBudgetBytes?: number | null;
  readonly pool?: Partial<PoolConfig>;
  /** How long nothing may arrive before an incoming job counts as one that needs recovery. */
  readonly recoveryMsMax?: number | undefined;
  /** Absent: this host coordinates no jobs. It is a function because the jobs themselves need the agent. */
  readonly jobs?: () => JobsHere;
  /** The hosts that may need disk layers of this one. Absent: there are none. */
  readonly otherHosts?: OtherHosts;
  /** A test replaces it to simulate a host that is short of memory. */
  readonly readMemory?: () => Promise<MemoryReading>;
}

/** A VM whose QEMU does not answer must not keep the daemon from starting. */
const MERGES_WAIT_MS = 2_000;

const POOL_DEFAULT: PoolConfig = {
  processesMax: 256,
  memoryAvailableBytesMin: 512 * 1024 * 1024,
  memoryStallPercentMax: 20,
};

interface Parts {
  readonly context: ForkContext & MigrationContext;
  readonly inventory: InventoryAgent;
  readonly source: SourceAgent;
  readonly target: TargetAgent;
  readonly forks: ForkAgent;
  readonly fanout: FanoutAgent;
  readonly pool: Pool;
  readonly images: HostImages;
  readonly userVms: UserVms;
  readonly names: UniqueNames;
  readonly ties: Ties;
  readonly outdated: OutdatedRecords;
  readonly diskServer: DiskServer;
  readonly diskReader: DiskReader;
  readonly diskWaits: DiskWaits;
}

export class LocalAgent implements HostPort {
  readonly host: string;
  readonly #options: LocalAgentOptions;
  #parts: Parts | null = null;
  readonly #closing = new AbortController();
  readonly #cloneMemory: CloneMemoryWatch;

  constructor(options: LocalAgentOptions) {
    this.host = options.host;
    this.#options = options;
    this.#cloneMemory = new CloneMemoryWatch(options);
  }

  /** Resumes the sessions of an earlier daemon. To be called after VmManager.start and before any other call. */
  async start(): Promise<void> {
    const store = await SessionStore.open(this.#options.stateDir);
    const {
      imageBudgetBytes: budgetBytes = null,
      pool: poolConfig,
      readMemory: read,
      hostInfo,
      hosts,
      recoveryMsMax,
      otherHosts,
      jobs,
      ...options
    } = this.#options;
    const images = await ImageStore.open({ ...options, budgetBytes });
    const forkStore = await openForkStore(options.stateDir);
    const peers = {
      peerNames: () => hosts?.names ?? [],
      peer: (host: string) => hosts?.agent(host) ?? unknownHost(host),
    };
    const names = new UniqueNames({ ...options, ...peers });
    const servers = new ImageServers({ ...options, images });
    const diskServer = new DiskServer({ ...options, images }, options.stateDir);
    const diskReader = new DiskReader({ ...options, images }, options.stateDir);
    const context: Parts['context'] = {
      ...{ ...options, store, images, forkStore, names, servers, diskServer, diskReader },
      closing: this.#closing.signal,
    };
    const target = new TargetAgent(context, recoveryMsMax);
    const arriving = (vm: string): Promise<string | null> => target.arriving(vm);
    const outdated = new OutdatedRecords({ ...options, ...peers });
    const diskWaits = new DiskWaits(context, diskReader);
    const moves = new VmMoves({
      ...options,
      arrivalOf: (vm) => target.arrivalOf(vm),
      noticeOf: (vm) => outdated.noticeOf(vm) ?? diskWaits.noticeOf(vm),
      jobOf: (vm) => jobs?.().jobOf(vm),
      giveUp: async (job) => jobs?.().giveUp(job),
    });
    const userVms = new UserVms(options.vms, moves, (vm) => this.isUnclaimed(vm));
    const markers = await Markers.open(options.stateDir, options.log);
    const inventory = new InventoryAgent(context, {
      ...{ markers, hostInfo, arriving },
      arrivingFrom: (vm) => target.arrivalOf(vm)?.request.source ?? null,
      claims: (asked) => names.claims(asked),
      holders: (paths, flattened) => holdersHere(context, paths, flattened),
      views: () => userVms.list(),
    });
    const source = new SourceAgent(context, (vm) => missingMemory(context, arriving, vm));
    const pool = new Pool(context, {
      stateDir: options.stateDir,
      config: { ...POOL_DEFAULT, ...poolConfig },
      randomId: () => randomBytes(8).toString('hex'),
      readMemory: read ?? readMemory,
    });
    const forks = new ForkAgent(context, pool, arriving);
    const fanout = new FanoutAgent(context, { servers, held: (image) => forks.pagesFor(image, 'held') });
    const isClaimed = (image: string): boolean => forks.claims(image) || pool.has(image);
    const ofUsers = new HostImages(userVms, context, isClaimed, otherHosts, forks.released);
    this.#parts = {
      ...{ context, inventory, source, target, forks, fanout, pool, images: ofUsers, userVms, names, outdated },
      ...{ diskServer, diskReader, diskWaits },
      ties: new Ties({ ...options, images, target, forks }),
    };
    await diskServer.start();
    await diskReader.start();
    const { records, corrupt } = await store.load();
    for (const error of corrupt) {
      context.log.error({ err: error }, 'a session record cannot be read: its session is not resumed');
    }
    for (const record of records) {
      try {
        await (record.role === 'target' ? target.resumeSession(record) : source.resumeSession(record));
      } catch (error) {
        const err = toMigrationError(error);
        context.log.error({ session: record.session, err }, 'the session cannot be resumed');
      }
    }
    await clearBrokenSaves(context);
    await forks.start();
    await this.#settleVms(this.#parts, corrupt.length > 0);
    await Promise.race([resumeMerges(context), sleep(MERGES_WAIT_MS, undefined, { ref: false })]);
    await pool.start();
    this.#cloneMemory.start();
    outdated.start();
    diskWaits.start();
  }

  /** Leaves sessions and QEMUs as they are for the next daemon. To be called before VmManager.close. */
  async close(): Promise<void> {
    this.#closing.abort();
    await this.#cloneMemory.close();
    this.#parts?.outdated.close();
    await this.#parts?.inventory.close();
    await this.#parts?.source.close();
    await this.#parts?.target.close();
    await this.#parts?.pool.close();
    await this.#parts?.forks.close();
    this.#parts?.diskWaits.close();
    await this.#parts?.diskReader.close();
    await this.#parts?.diskServer.close();
  }

  /**
   * True if an incoming VM may be ended by force: no session, fork or waiting set needs it. A committed fork goes on
   * without a clone that a user has ended, and so does one whose clone runs although it should not.
   */
  isUnclaimed(name: string): boolean {
    const { context, target, forks, pool } = this.#ready;
    const vm = context.vms.get(name);
    const { session, image } = vm;
    if (image === null) return !target.claims(session);
    if (vm.hasRun || forks.hasCommitted(vm)) return true;
    return !forks.isPreparing && !forks.claims(image) && !pool.has(image);
  }

  /** This getter and those below may be used only after `start`. */
  get inventory(): InventoryAgent {
    return this.#ready.inventory;
  }

  get source(): SourceAgent {
    return this.#ready.source;
  }

  get target(): TargetAgent {
    return this.#ready.target;
  }

  get forks(): ForkAgent {
    return this.#ready.forks;
  }

  get fanout(): FanoutAgent {
    return this.#ready.fanout;
  }

  get userVms(): UserVms {
    return this.#ready.userVms;
  }

  get images(): HostImages {
    return this.#ready.images;
  }

  get pool(): Pool {
    return this.#ready.pool;
  }

  get ties(): Ties {
    return this.#ready.ties;
  }

  get names(): UniqueNames {
    return this.#ready.names;
  }

  get #ready(): Parts {
    if (this.#parts === null) throw new MigrationError('INTERNAL', 'the agent has not been started');
    return this.#parts;
  }

  /**
   * Destroys incoming VMs that no session or fork claims, but none that has run here by its owner record, and none
   * while the record of a session cannot be read, which may be the VM's. Marks VMs that the registry gives to another
   * host as departed.
   * Deletes images that no fork has committed, which are left from waiting sets of the earlier daemon.
   */
  async #settleVms({ context, target, forks }: Parts, hasUnreadableSessions: boolean): Promise<void> {
    const { vms, images, registry, host } = context;
    for (const vm of vms.all()) {
      const { name } = vm.spec;
      const owner = await registry.owner(name);
      const isForeign = owner !== null && owner.owner !== host;
      const hasRun = vm.session !== null && owner?.owner === host && owner.session === vm.session;
      const isClaimed =
        vm.image === null ? hasUnreadableSessions || hasRun || target.claims(vm.session) : forks.claims(vm.image);
      await this.#attempt({ vm: name }, async () => {
        if (vm.state === 'incoming' && !isClaimed) await vms.destroy(name);
        else if (isForeign && (vm.state === 'running' || vm.state === 'paused')) await vms.setState(name, 'departed');
      });
    }
    for (const record of images.all()) {
      const { id, state } = record;
      if (state !== 'capturing' || forks.claims(id)) continue;
      // Its fork's record is lost. What a parent has written to an overlay must not be.
      await this.#attempt({ image: id }, () => (hasLayerDuty(record) ? images.unload(id) : images.delete(id)));
    }
    // Images of build 0.1.0: their disks have been kept from writes, so they still are what they were.
    for (const { id, state } of images.all()) if (state === 'complete') await sealLayers(context, id);
  }

  /** One VM or image that cannot be settled must not keep the daemon from the others. */
  async #attempt(subject: object, work: () => Promise<void>): Promise<void> {
    await work().catch((error: unknown) => {
      const fields = { ...subject, err: toMigrationError(error) };
      this.#options.log.error(fields, 'what the earlier daemon has left cannot be settled');
    });
  }
}

function unknownHost(host: string): never {
  throw new MigrationError('NOT_FOUND', `no host ${host}`);
}

/**
 * Returns the reason why memory of a VM is still missing on this host, or null. A missing page is a hole in the VM's
 * files, and another migration would send zeros for it.
 */
async function missingMemory(
  { vms, images }: ForkContext,
  arriving: (vm: string) => Promise<string | null>,
  name: string,
): Promise<string | null> {
  if (!vms.has(name)) return null;
  const job = await arriving(name);
  if (job !== null) return `job ${job} is still transferring it to this host`;
  const image = vms.has(name) ? vms.get(name).image : null;
  return image === null || images.get(image).state === 'complete' ? null : 'its image is being filled';
}
