/** Implements ForkPort on this host and holds its forks by id. session.ts implements a single fork. */

import type { Duplex, Readable } from 'node:stream';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneIdentity } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Transport } from '../../domain/transport.js';
import type {
  ForkDecision,
  ForkPointReply,
  ForkPort,
  ForkProgress,
  ForkQuestion,
  ImageHolder,
  LoadClonesReply,
  PrepareForkReply,
  PrepareForkRequest,
  RunClonesReply,
} from '../../engine/ports/fork.js';
import { KeyedLocks } from '../../kit/locks.js';
import { checkImageId } from '../image/record.js';
import { EndedSessions } from '../migration/ended-sessions.js';
import type { ManagedVm } from '../vm/vms.js';
import type { ForkContext } from './context.js';
import { sendDeviceState } from './device-state.js';
import { forkInventory } from './inventory.js';
import { refuseOtherDisks } from './join-disks.js';
import type { Pool } from './pool.js';
import { prepareFork } from './prepare.js';
import type { ForkRecord } from './record.js';
import { ForkSession } from './session.js';
import { undoFork } from './undo.js';

export class ForkAgent implements ForkPort {
  readonly #context: ForkContext;
  readonly #pool: Pool;
  readonly #locks = new KeyedLocks();
  #hasUnreadable = false;
  readonly #forks = new Map<string, ForkSession>();
  /** Uncommitted forks of an earlier daemon that could not be undone yet. `discardFork` tries again. */
  readonly #leftover = new Map<string, ForkRecord>();
  readonly #preparing = new Map<string, AbortController>();
  readonly #ended = new EndedSessions();

  /** Returns the job that is still transferring pages of this VM to this host, or null. */
  readonly #arriving: (vm: string) => Promise<string | null>;

  constructor(context: ForkContext, pool: Pool, arriving: (vm: string) => Promise<string | null>) {
    this.#arriving = arriving;
    this.#context = context;
    this.#pool = pool;
    context.vms.on('exit', this.#onExit);
  }

  /** Loads the forks of an earlier daemon. Committed forks continue, the others are undone. */
  async start(): Promise<void> {
    const { forkStore, log } = this.#context;
    const { records, corrupt } = await forkStore.load();
    for (const err of corrupt) log.error({ err }, 'a fork record cannot be read: its fork is not resumed');
    this.#hasUnreadable = corrupt.length > 0;
    for (const record of records) {
      try {
        await this.#resume(record);
      } catch (error) {
        const { fork } = record.request;
        if (record.state !== 'committed') this.#leftover.set(fork, record);
        log.error({ fork, err: toMigrationError(error) }, 'a fork of the earlier daemon cannot be resumed or undone');
      }
    }
  }

  async close(): Promise<void> {
    this.#context.vms.off('exit', this.#onExit);
    for (const controller of this.#preparing.values()) controller.abort();
    await Promise.all([...this.#preparing.keys()].map((fork) => this.#locks.hold(fork, () => Promise.resolve())));
    await Promise.all([...this.#forks.values()].map((fork) => fork.close()));
  }

  /** True if a fork needs this image, or may need it, because a fork's record cannot be read. */
  claims(image: string): boolean {
    if (this.#hasUnreadable) return true;
    const records = [...[...this.#forks.values()].map(({ record }) => record), ...this.#leftover.values()];
    return records.some((record) => record.image === image);
  }

  /** True if the VM is a clone of a committed fork. It may wait for the go. */
  hasCommitted(vm: ManagedVm): boolean {
    return [...this.#forks.values()].some((fork) => fork.isCommitted && fork.has(vm));
  }

  /** True while clones start whose image no fork claims yet. */
  get isPreparing(): boolean {
    return this.#preparing.size > 0;
  }

  forkInventory(question: ForkQuestion): Promise<ForkInventory> {
    return forkInventory(this.#context, question, this.#pool, this.#arriving);
  }

  async prepareClones(request: PrepareForkRequest): Promise<PrepareForkReply> {
    const { fork } = request;
    checkImageId(fork);
    return this.#locks.hold(fork, async () => {
      this.#ended.refuse(fork);
      if (this.#leftover.has(fork)) throw new MigrationError('CONFLICT', `fork ${fork} is to be undone`);
      const existing = this.#forks.get(fork);
      if (existing !== undefined) return existing.reply;
      const controller = new AbortController();
      this.#preparing.set(fork, controller);
      try {
        const job = request.vm === null ? null : await this.#arriving(request.vm);
        if (job !== null) throw new MigrationError('VM_BUSY', `pages of ${request.vm} are still missing: job ${job}`);
        const preparing = () => prepareFork(this.#context, request, this.#pool, controller.signal);
        // Two forks may bring the same image here.
        const parts = await (request.origin === undefined
          ? preparing()
          : this.#locks.hold(`image ${request.origin.image}`, preparing));
        const session = new ForkSession(this.#context, parts);
        this.#forks.set(fork, session);
        return session.reply;
      } finally {
        this.#preparing.delete(fork);
      }
    });
  }

  async armParent(fork: string): Promise<void> {
    await this.#fork(fork).arm();
  }

  async forkPoint(fork: string): Promise<ForkPointReply> {
    return this.#fork(fork).point();
  }

  async serveImage(image: string, _reader: string, transport: Transport): Promise<ImageHolder> {
    const session = [...this.#forks.values()].find(({ record }) => record.image === image);
    if (session === undefined) throw new MigrationError('NOT_FOUND', `no fork serves image ${image}`);
    return session.serveImage(transport);
  }

  async endImage(): Promise<void> {}

  async connectImage(fork: string, transport: Transport): Promise<void> {
    const session = this.#fork(fork);
    const { origin } = session.request;
    if (origin === undefined) throw new MigrationError('CONFLICT', `fork ${fork} does not read another host`);
    const { peers, images, host } = this.#context;
    const holder = await peers.agent(origin.host).forks.serveImage(origin.image, host, transport);
    refuseOtherDisks(images.get(origin.image), holder.disks);
    await session.connectImage(holder);
  }

  async forkDecision(fork: string): Promise<{ readonly decision: ForkDecision }> {
    const session = this.#forks.get(fork);
    if (session?.isCommitted === true) return { decision: 'committed' };
    return { decision: session === undefined ? 'discarded' : 'open' };
  }

  async sendForkState(fork: string, host: string): Promise<void> {
    await sendDeviceState(this.#context, fork, this.#fork(fork).record.image, host);
  }

  /** Takes the device state from the host that has the image. */
  async acceptForkState(fork: string, stream: Readable): Promise<void> {
    let session: ForkSession;
    try {
      session = this.#fork(fork);
    } catch (error) {
      stream.destroy();
      throw error;
    }
    await session.acceptState(stream);
  }

  /** Connects another host to a disk of an image of this one. */
  openDisk(image: string, disk: string, reader: string): Promise<Duplex> {
    return this.#context.diskServer.open(image, disk, reader);
  }

  async loadClones(fork: string): Promise<LoadClonesReply> {
    return this.#fork(fork).load();
  }

  async commitFork(fork: string): Promise<void> {
    await this.#fork(fork).commit();
  }

  async runClones(fork: string): Promise<RunClonesReply> {
    return this.#fork(fork).run();
  }

  async forkProgress(fork: string): Promise<ForkProgress> {
    return this.#fork(fork).progress();
  }

  async finishFork(fork: string): Promise<void> {
    checkImageId(fork);
    await this.#locks.hold(fork, async () => {
      const session = this.#forks.get(fork);
      if (session === undefined) return;
      await session.finish();
      this.#forks.delete(fork);
      this.#ended.add(fork);
    });
  }

  async discardFork(fork: string): Promise<void> {
    checkImageId(fork);
    this.#forks.get(fork)?.refuseIfCommitted();
    this.#ended.add(fork);
    // The abort ends a preparation that still waits for QEMUs. The preparation then removes what it has made.
    this.#preparing.get(fork)?.abort();
    await this.#locks.hold(fork, async () => {
      await this.#undo(fork).catch((cause: unknown) => {
        if (this.#forks.get(fork)?.isCommitted === true) throw cause;
        // CONFLICT would say that the fork is committed, NOT_FOUND that nothing is left of it.
        const { message, remedy } = toMigrationError(cause);
        const advice = remedy === undefined ? {} : { remedy };
        throw new MigrationError('STEP_FAILED', `fork ${fork} cannot be undone: ${message}`, { cause, ...advice });
      });
      this.#context.vms.room.release(fork);
    });
  }

  async #undo(fork: string): Promise<void> {
    const leftover = this.#leftover.get(fork);
    if (leftover !== undefined) await undoFork(this.#context, leftover);
    this.#leftover.delete(fork);
    await this.#forks.get(fork)?.discard();
    this.#forks.delete(fork);
  }

  async #resume(record: ForkRecord): Promise<void> {
    const { vms, images, forkStore } = this.#context;
    const { fork, vm, image } = record.request;
    const isUndecided = record.request.origin !== undefined && record.state === 'prepared';
    if (record.state !== 'committed' && !(isUndecided && images.has(record.image))) {
      await undoFork(this.#context, record);
      return;
    }
    if (!images.has(record.image)) {
      await forkStore.remove(fork);
      return;
    }
    const parent = vm !== null && image === null && vms.has(vm) ? vms.get(vm) : null;
    const find = (identity: CloneIdentity): { identity: CloneIdentity; vm: ManagedVm }[] => {
      const found = vms.has(identity.name) ? vms.get(identity.name) : null;
      return found?.image === record.image && found.spec.uuid === identity.uuid ? [{ identity, vm: found }] : [];
    };
    const clones = record.clones.flatMap(find);
    const session = new ForkSession(this.#context, { record, parent, clones, failures: [] });
    this.#forks.set(fork, session);
    await (isUndecided ? session.rejoin() : session.resume());
  }

  #fork(fork: string): ForkSession {
    const session = this.#forks.get(fork);
    if (session !== undefined) return session;
    checkImageId(fork);
    this.#ended.refuse(fork);
    throw new MigrationError('NOT_FOUND', `no fork ${fork} on ${this.#context.host}`);
  }

  readonly #onExit = (name: string): void => {
    const { vms } = this.#context;
    if (!vms.has(name)) return;
    const vm = vms.get(name);
    for (const fork of this.#forks.values()) fork.lost(vm);
  };
}
