/** Implements ForkPort on this host and holds its forks by id. session.ts implements a single fork. */
import type { Duplex, Readable } from 'node:stream';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneIdentity } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Transport } from '../../domain/transport.js';
import type {
  ForkDecision,
  ForkOrigin,
  ForkPointReply,
  ForkPort,
  ForkProgress,
  ForkQuestion,
  ImageDigests,
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
import { FinishedForks } from './decision/finished.js';
import { ForksWithoutRoot, ROOT_IS_REMOVED, removedRootOf } from './decision/removed-root.js';
import { UndecidedForks } from './decision/undecided.js';
import { sendDeviceState } from './device-state.js';
import { forkInventory } from './inventory.js';
import { failedImage } from './pages/failed-image.js';
import type { ImagePages } from './pages/image-server.js';
import type { Pool } from './pool.js';
import { prepareFork } from './prepare.js';
import { type ForkRecord, finishRecord } from './record.js';
import { ReleasedForks } from './released.js';
import { ForkSession } from './session.js';
import { undoFork } from './undo.js';

export class ForkAgent implements ForkPort {
  readonly #context: ForkContext;
  readonly #pool: Pool;
  readonly #locks = new KeyedLocks();
  #hasUnreadable = false;
  #isClosing = false;
  readonly #forks = new Map<string, ForkSession>();
  /** Uncommitted forks of an earlier daemon that could not be undone yet. `discardFork` tries again. */
  readonly #leftover = new Map<string, ForkRecord>();
  readonly #preparing = new Map<string, { readonly request: PrepareForkRequest; readonly cancel: AbortController }>();
  readonly #ended = new EndedSessions();
  readonly #finished: FinishedForks;
  readonly released: ReleasedForks;
  readonly #undecided: UndecidedForks;
  readonly #withoutRoot: ForksWithoutRoot;
  /** Returns the job that is still transferring pages of this VM to this host, or null. */
  readonly #arriving: (vm: string) => Promise<string | null>;

  constructor(context: ForkContext, pool: Pool, arriving: (vm: string) => Promise<string | null>) {
    this.#arriving = arriving;
    this.#context = context;
    this.#pool = pool;
    this.#finished = new FinishedForks(context.forkStore);
    this.released = new ReleasedForks(context.log, (fork) => this.#finished.add(fork));
    this.#undecided = new UndecidedForks({
      log: context.log,
      ask: async (host, fork) => context.peers.agent(host).forks.forkDecision(fork),
      isPeer: (host) => context.peers.isPeer(host),
      isUndecided: (fork) => this.#isOpen(fork),
      discard: (fork) => this.discardFork(fork),
    });
    this.#withoutRoot = new ForksWithoutRoot(context.log, async (fork) => {
      await this.#forks.get(fork)?.endUnrun();
      await this.finishFork(fork);
    });
    context.vms.on('exit', this.#onExit);
  }

  /** Committed forks of an earlier daemon continue, the others are undone. */
  async start(): Promise<void> {
    const { forkStore, log } = this.#context;
    const { records, corrupt } = await forkStore.load();
    for (const err of corrupt) log.error({ err }, 'a fork record cannot be read: its fork is not resumed');
    this.#hasUnreadable = corrupt.length > 0;
    for (const record of records) {
      try {
        await this.#resume(record);
      } catch (error) {
        const { fork, origin } = record.request;
        if (record.state !== 'committed' && origin !== undefined) this.#undecided.watch(fork, origin.host);
        if (record.state !== 'committed') this.#leftover.set(fork, record);
        log.error({ fork, err: toMigrationError(error) }, 'a fork of the earlier daemon cannot be resumed or undone');
      }
    }
  }

  async close(): Promise<void> {
    this.#isClosing = true;
    this.#context.vms.off('exit', this.#onExit);
    for (const { cancel } of this.#preparing.values()) cancel.abort();
    await Promise.all([...this.#preparing.keys()].map((fork) => this.#locks.hold(fork, () => Promise.resolve())));
    this.#undecided.close();
    this.#withoutRoot.close();
    await Promise.all(this.#sessions.map((fork) => fork.close()));
    await this.#context.servers.closeAll();
  }

  /** True if a fork needs this image, or may need it, because a fork's record cannot be read. */
  claims(image: string): boolean {
    if (this.#hasUnreadable) return true;
    const records = [...[...this.#forks.values()].map(({ record }) => record), ...this.#leftover.values()];
    return records.some((record) => record.image === image);
  }

  /** Returns what this host was asked to prepare for a fork that it has, or null. */
  requestOf(fork: string): PrepareForkRequest | null {
    const { record } = this.#forks.get(fork) ?? this.released.fork(fork) ?? { record: this.#leftover.get(fork) };
    return this.#preparing.get(fork)?.request ?? record?.request ?? null;
  }

  /** True if the VM is a clone of a committed fork. It may wait for the go. */
  hasCommitted(vm: ManagedVm): boolean {
    return this.#sessions.some((fork) => fork.isCommitted && fork.has(vm));
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
      this.#undecided.heard(fork);
      if (existing !== undefined) return existing.reply;
      const controller = new AbortController();
      this.#preparing.set(fork, { request, cancel: controller });
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
        if (request.origin !== undefined) this.#undecided.watch(fork, request.origin.host);
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

  async serveImage(image: string, reader: string, transport: Transport): Promise<ImageHolder> {
    checkImageId(image);
    this.#refuseWhenClosing();
    return this.#context.servers.serve(image, reader, transport, this.pagesFor(image, 'all'));
  }

  async imageDigests(image: string, reader: string, region: number, firstPage: number): Promise<ImageDigests> {
    checkImageId(image);
    await this.#context.inject.hit('agent:fork:digests');
    const digests = await this.#context.servers.digests(image, reader, region, firstPage);
    return { digests: digests?.toString('base64') ?? null };
  }

  async endImage(image: string, reader: string): Promise<void> {
    checkImageId(image);
    await this.#context.servers.end(image, reader);
  }

  async connectImage(fork: string, transport: Transport): Promise<void> {
    await this.#fork(fork).connectImage(transport);
  }

  /**
   * After `discarded` no late call can prepare the fork. It is also the answer once a committed fork is over: all hosts
   * that take part have committed by then, so whoever still asks was left out.
   */
  async forkDecision(fork: string): Promise<{ readonly decision: ForkDecision }> {
    checkImageId(fork);
    if (this.#forks.get(fork)?.isCommitted === true) return { decision: 'committed' };
    // A record that cannot be read may be the fork's.
    if (this.#isOpen(fork) || this.#hasUnreadable) return { decision: 'open' };
    this.#ended.add(fork);
    return { decision: 'discarded' };
  }

  async completeImage(image: string): Promise<void> {
    checkImageId(image);
    const { state } = this.#context.images.get(image);
    if (state === 'complete') return;
    const session = this.#sessions.find(({ record, isCommitted }) => isCommitted && record.image === image);
    if (session === undefined || state === 'failed') {
      throw new MigrationError('CONFLICT', `image ${image} is ${state}: it cannot be completed`);
    }
    await session.completeImage();
  }

  async sendForkState(fork: string, host: string): Promise<LoadClonesReply> {
    return sendDeviceState(this.#context, fork, this.#fork(fork).record.image, host);
  }

  /** Takes the device state from the host that has the image, and loads it. */
  async acceptForkState(fork: string, stream: Readable): Promise<LoadClonesReply> {
    let session: ForkSession;
    try {
      session = this.#fork(fork);
    } catch (error) {
      stream.destroy();
      throw error;
    }
    await session.acceptState(stream);
    return session.load();
  }

  openDisk(image: string, disk: string, reader: string): Promise<Duplex> {
    return this.#context.diskServer.open(image, disk, reader);
  }

  async loadClones(fork: string): Promise<LoadClonesReply> {
    return this.#fork(fork).load();
  }

  async commitFork(fork: string): Promise<void> {
    await this.#fork(fork).commit();
    // A rejoin that failed at the start of the daemon had left it to be undone.
    this.#leftover.delete(fork);
    this.#undecided.forget(fork);
  }

  async runClones(fork: string, decision?: 'committed'): Promise<RunClonesReply> {
    const beganAtMs = performance.timeOrigin + performance.now();
    const session = this.#fork(fork);
    // The record of a host that has not joined is decided by its own commit only.
    if (decision === 'committed' && session.request.origin !== undefined) await this.commitFork(fork);
    return session.run(beganAtMs);
  }

  async forkProgress(fork: string): Promise<ForkProgress> {
    return this.#fork(fork).progress();
  }

  async finishFork(fork: string): Promise<void> {
    checkImageId(fork);
    await this.#locks.hold(fork, async () => {
      const session = this.#forks.get(fork);
      if (session === undefined) return;
      const outcome = await session.finish();
      this.#forks.delete(fork);
      this.#ended.add(fork);
      if (outcome === 'released') this.released.add(fork, session);
      else await this.#finished.add(fork);
    });
  }

  async discardFork(fork: string): Promise<void> {
    checkImageId(fork);
    this.#refuseWhenClosing();
    this.#forks.get(fork)?.refuseIfCommitted();
    if (this.#isFinished(fork)) throw new MigrationError('CONFLICT', `fork ${fork} is committed, and over`);
    this.#ended.add(fork);
    // The abort ends a preparation that still waits for QEMUs. The preparation then removes what it has made.
    this.#preparing.get(fork)?.cancel.abort();
    await this.#locks.hold(fork, async () => {
      await this.#undo(fork).catch((cause: unknown) => {
        if (this.#forks.get(fork)?.isCommitted === true) throw cause;
        // CONFLICT would say that the fork is committed, NOT_FOUND that nothing is left of it.
        const { message, remedy } = toMigrationError(cause);
        const advice = remedy === undefined ? {} : { remedy };
        throw new MigrationError('STEP_FAILED', `fork ${fork} cannot be undone: ${message}`, { cause, ...advice });
      });
      this.#context.vms.room.release(fork);
      this.#undecided.forget(fork);
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
    const { vms, images, peers, log } = this.#context;
    const { fork, vm, image, origin } = record.request;
    if (record.isFinished === true) {
      this.#ended.add(fork);
      return this.#finished.add(fork);
    }
    const root = removedRootOf((host) => peers.isPeer(host), origin);
    if (root !== null) log.warn({ fork, image: record.image, host: root }, ROOT_IS_REMOVED);
    const isUndecided = origin !== undefined && record.state === 'prepared' && root === null;
    if (record.state !== 'committed' && !(isUndecided && images.has(record.image))) {
      await undoFork(this.#context, record);
      return;
    }
    if (!images.has(record.image)) {
      await finishRecord(this.#context, record);
      if (record.request.share !== undefined) await this.#finished.add(fork);
      return;
    }
    const parent = origin === undefined && image === null && vm !== null && vms.has(vm) ? vms.get(vm) : null;
    const find = (identity: CloneIdentity): { identity: CloneIdentity; vm: ManagedVm }[] => {
      const found = vms.has(identity.name) ? vms.get(identity.name) : null;
      return found?.image === record.image && found.spec.uuid === identity.uuid ? [{ identity, vm: found }] : [];
    };
    const clones = record.clones.flatMap(find);
    const session = new ForkSession(this.#context, { record, parent, clones, failures: [] });
    if (record.isReleased === true) {
      this.#ended.add(fork);
      await session.resume();
      return this.released.add(fork, session);
    }
    this.#forks.set(fork, session);
    if (!isUndecided) return session.resume().then(() => (root === null ? undefined : this.#withoutRoot.add(fork)));
    this.#undecided.watch(fork, origin.host);
    await this.#holdRoom(record, origin);
    await session.rejoin();
  }

  /** Promises the room of an image that fills only after the commit. It may be taken by now: the fork stays. */
  async #holdRoom({ request, image }: ForkRecord, { allocatedBytes, spec }: ForkOrigin): Promise<void> {
    const { images, vms, log } = this.#context;
    if (images.get(image).state === 'complete') return;
    await vms.room.hold(request.fork, allocatedBytes, spec.memory.pageBytes).catch((error: unknown) => {
      log.warn({ fork: request.fork, image, err: toMigrationError(error) }, 'there may be no room for an image');
    });
  }

  get #sessions(): ForkSession[] {
    return [...this.#forks.values(), ...this.released.all];
  }

  #isFinished(fork: string): boolean {
    return this.#finished.has(fork) || this.released.hasFork(fork);
  }

  /** The fork may still be committed here, or its undo is not durable yet. */
  #isOpen(fork: string): boolean {
    const session = this.#forks.get(fork);
    if (session !== undefined) return !session.isCommitted;
    return this.#preparing.has(fork) || this.#leftover.has(fork);
  }

  /** Where the pages of an image of this host are. Throws CONFLICT as long as nobody can read them. */
  pagesFor(image: string, need: 'all' | 'held'): ImagePages {
    const { images, host } = this.#context;
    const { state } = images.get(image);
    if (state === 'complete') return { filling: null, isFixed: true };
    if (state === 'failed') throw failedImage(image, host);
    if (state === 'unloaded') throw new MigrationError('NOT_FOUND', `the memory of image ${image} is not on ${host}`);
    const session = this.#sessions.find(({ record }) => record.image === image);
    if (session === undefined) throw new MigrationError('CONFLICT', `image ${image} on ${host} is not complete`);
    return session.pagesFor(need);
  }

  /** A refusal by a daemon that closes must not read as an answer about the fork. */
  #refuseWhenClosing(): void {
    if (!this.#isClosing) return;
    throw new MigrationError('UNREACHABLE', `the daemon on ${this.#context.host} is closing`, { isRetryable: true });
  }

  #fork(fork: string): ForkSession {
    this.#refuseWhenClosing();
    this.#undecided.heard(fork);
    const session = this.#forks.get(fork);
    if (session !== undefined) return session;
    checkImageId(fork);
    if (!this.#isFinished(fork)) this.#ended.refuse(fork);
    throw new MigrationError('NOT_FOUND', `no fork ${fork} on ${this.#context.host}`);
  }

  readonly #onExit = (name: string): void => {
    const { vms } = this.#context;
    if (!vms.has(name)) return;
    const vm = vms.get(name);
    for (const fork of this.#sessions) fork.lost(vm);
  };
}
