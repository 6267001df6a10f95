/**
 * One fork on its host, from the waiting QEMUs to the complete image. src/engine/ports/fork.ts defines the order of the
 * calls.
 *
 *   prepared ─ armParent ─► armed ─ forkPoint ─► pointed ─ loadClones ─► loaded ─ commitFork ─► committed
 *   committed ─ runClones ─► running ─► complete
 *
 * The commit divides the life of a fork. Before it, `discard` removes everything and the parent continues as if there
 * had been no fork. No clone has run then. After it, the clones wait for `run`, and the image waits for pages.
 */

import type { Readable } from 'node:stream';
import type { StateExport } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { CloneFailure } from '../../domain/fork.js';
import type { Transport } from '../../domain/transport.js';
import type {
  ForkPointReply,
  ForkProgress,
  LoadClonesReply,
  PrepareForkReply,
  PrepareForkRequest,
  RunClonesReply,
} from '../../engine/ports/fork.js';
import type { ManagedVm } from '../vm/vms.js';
import { ForkBook } from './book.js';
import { failureInJson } from './clones/start.js';
import type { ForkContext } from './context.js';
import { acceptDeviceState } from './device-state.js';
import { ForkFilling } from './filling.js';
import { ForkClones } from './fork-clones.js';
import { ROOT_REMOVED } from './pages/failed-image.js';
import type { ImagePages } from './pages/image-server.js';
import { ForkPages } from './pages.js';
import { ParentDisks } from './parent-disks.js';
import { takeForkPointOf } from './point.js';
import type { ForkParts } from './prepare.js';
import { type ForkRecord, finishRecord } from './record.js';
import { settleRun } from './settle.js';
import { isOwnImage, resumeParent } from './undo.js';
import { filesChanged } from './unfillable.js';
import { firstFailure } from './waiting-set.js';

export class ForkSession {
  readonly #context: ForkContext;
  readonly #parent: ManagedVm | null;
  readonly #failures: readonly CloneFailure[];
  readonly #book: ForkBook;
  readonly #clones: ForkClones;
  readonly #filling: ForkFilling;
  readonly #pages: ForkPages;
  #state: StateExport | null = null;
  #disks: ParentDisks | null = null;
  #arming: Promise<void> | null = null;
  #pointing: Promise<ForkPointReply> | null = null;
  #loading: Promise<LoadClonesReply> | null = null;
  #committing: Promise<void> | null = null;
  #running: Promise<readonly CloneFailure[]> | null = null;
  /** Opens again what serves the pages of private clones of an earlier daemon. Null in the daemon that made them. */
  #reopening: Promise<void> | null = null;
  #afterCommit: Promise<void> = Promise.resolve();
  #isRejoined = false;
  #isOver = false;

  constructor(context: ForkContext, parts: ForkParts) {
    this.#context = context;
    this.#book = new ForkBook(context.forkStore, parts.record);
    this.#parent = parts.parent;
    this.#failures = parts.failures;
    this.#pages = new ForkPages(context, parts.record, parts.parent);
    const { ready } = this.#book.outcome;
    const isClosing = () => this.#isOver;
    this.#clones = new ForkClones(context, { clones: parts.clones, pages: this.#pages, ready, isClosing });
    this.#filling = new ForkFilling(context, {
      ...{ book: this.#book, pages: this.#pages, clones: this.#clones, parent: parts.parent, isClosing },
      settling: () => this.#afterCommit,
    });
  }

  get record(): ForkRecord {
    return this.#book.record;
  }

  get request(): PrepareForkRequest {
    return this.record.request;
  }

  get isCommitted(): boolean {
    return this.#book.isCommitted;
  }

  has(vm: ManagedVm): boolean {
    return this.#clones.has(vm);
  }

  get reply(): PrepareForkReply {
    const { image, isWarm, clones } = this.record;
    return { image, isWarm, clones, failures: this.#failures.map(failureInJson) };
  }

  /**
   * Continues a committed fork of an earlier daemon. Its image may still be filling. Clones that have not run stay
   * stopped until `run`.
   */
  async resume(): Promise<void> {
    const { failure } = this.record;
    const hasFailed = failure !== null || this.#context.images.get(this.record.image).state === 'failed';
    if (hasFailed) {
      await this.#filling.fail(failure === null ? filesChanged() : MigrationError.fromJSON(failure, 'the fork record'));
      return;
    }
    if (!(await this.#filling.resume())) return;
    this.#reopening = this.#pages.openCopies(this.#clones.vms, true);
    this.#afterCommit = this.#reopening.then(() => this.#settleCommitted());
    this.#afterCommit.catch(() => undefined);
  }

  /** Takes up a joined fork of an earlier daemon. Its clones stay stopped until `commit` or `discard`. */
  async rejoin(): Promise<void> {
    this.#isRejoined = true;
    await this.#pages.resume(this.#clones.vms, () => undefined);
  }

  arm(): Promise<void> {
    this.#arming ??= this.#armOnce().catch((error: unknown) => {
      this.#arming = null;
      throw error;
    });
    return this.#arming;
  }

  point(): Promise<ForkPointReply> {
    this.#pointing ??= this.#pointOnce();
    return this.#pointing;
  }

  /** The pages of the image for other hosts. `held`: for one that gets elsewhere what is not here. */
  pagesFor(need: 'all' | 'held'): ImagePages {
    this.#refuseIfEnded();
    return need === 'all' ? this.#pages.served : this.#pages.held;
  }

  async connectImage(transport: Transport): Promise<void> {
    // A record that is written now must not take the place of the committed one.
    while (this.#committing !== null && !this.isCommitted) await this.#committing.catch(() => undefined);
    this.#refuseIfEnded();
    await this.#book.want(transport);
    await this.#pages.connect(transport, this.#clones.vms);
  }

  async acceptState(stream: Readable): Promise<void> {
    this.#refuseIfEnded();
    const isWanted = this.#pages.isJoined && this.#loading === null;
    if (!isWanted) throw new MigrationError('CONFLICT', `fork ${this.request.fork} takes no device state`);
    this.#book.note({ deviceStateBytes: await acceptDeviceState(this.#context, this.record.image, stream) });
  }

  async load(): Promise<LoadClonesReply> {
    await this.#lookForLoads();
    this.#loading ??= this.#loadOnce();
    return this.#loading;
  }

  /** An earlier daemon may have loaded the clones. Their QEMUs say so as soon as all of them answer. */
  async #lookForLoads(): Promise<void> {
    if (!this.#isRejoined || this.#loading !== null) return;
    if (this.#clones.vms.length === 0 && this.#context.images.get(this.record.image).deviceStateBytes === 0) return;
    if (await this.#clones.haveLoaded()) this.#loading ??= Promise.resolve({ failures: [] });
  }

  commit(): Promise<void> {
    this.#committing ??= this.#commitOnce().catch((error: unknown) => {
      this.#committing = null;
      throw error;
    });
    return this.#committing;
  }

  /** `beganAtMs`: the beginning of the call, in ms since 1970. */
  async run(beganAtMs = performance.timeOrigin + performance.now()): Promise<RunClonesReply> {
    this.#running ??= this.#runOnce().catch((error: unknown) => {
      this.#running = null;
      throw error;
    });
    const failures = await this.#running;
    const ready = [...this.#clones.readyAtMs].map(([index, atMs]) => ({ index, atMs: atMs - beganAtMs }));
    return { ready, failures: failures.map(failureInJson) };
  }

  async progress(): Promise<ForkProgress> {
    return this.#pages.progress(this.record);
  }

  /** A user wants all of the image on this host. Without a fork that reads on demand it comes anyway. */
  async completeImage(): Promise<void> {
    this.#refuseIfEnded();
    if (this.record.isCompleting !== true) await this.#book.mark({ isCompleting: true });
    await this.#pages.fillAll();
  }

  /**
   * Throws CONFLICT while pages are still being copied, or clones have not run. `released`: the pages that the clones
   * touch go on coming, until `untilFilled` or `removed`.
   */
  async finish(): Promise<'over' | 'released'> {
    const { state } = await this.progress();
    if (!this.isCommitted || state === 'filling') {
      throw new MigrationError('CONFLICT', `pages of image ${this.record.image} are still being copied`);
    }
    await this.#afterCommit.catch(() => this.#settleCommitted());
    if (this.#clones.isAnyWaiting) await this.#settleCommitted();
    if (this.#clones.isAnyWaiting)
      throw new MigrationError('CONFLICT', `clones of fork ${this.request.fork} have not run`);
    await this.#clones.unreserve(this.request.job);
    if (state === 'lazy') {
      await this.#book.mark({ isReleased: true });
      return 'released';
    }
    await this.#filling.over;
    await this.#filling.record();
    await this.#end();
    return 'over';
  }

  /** Ends the clones that have not run, because the coordinator of this committed fork never calls again. */
  endUnrun(): Promise<void> {
    return this.#clones.endUnrun(ROOT_REMOVED);
  }

  /** A fork that is released is over when its image is complete or has failed. False: the daemon or the image ends. */
  async untilFilled(): Promise<boolean> {
    await this.#filling.over;
    const { images } = this.#context;
    if (this.#isOver || !images.has(this.record.image)) return false;
    const { state } = images.get(this.record.image);
    if (state !== 'complete' && state !== 'failed') return false;
    await this.#end();
    return true;
  }

  /** `remove` removes the image of a fork that is released. Its record goes last, so that the next daemon goes on. */
  async without<T>(remove: () => Promise<T>): Promise<T> {
    this.#isOver = true;
    await this.#pages.abandon();
    const removal = await remove();
    await this.#context.forkStore.remove(this.request.fork);
    return removal;
  }

  async #end(): Promise<void> {
    await this.#pages.finish();
    await finishRecord(this.#context, this.record);
    this.#isOver = true;
  }

  refuseIfCommitted(): void {
    if (this.isCommitted) throw new MigrationError('CONFLICT', `fork ${this.request.fork} is committed: it stays`);
  }

  /** Throws CONFLICT after the commit. */
  async discard(): Promise<void> {
    await this.#committing?.catch(() => undefined);
    this.refuseIfCommitted();
    this.#clones.refuseIfRun();
    this.#isOver = true;
    // Steps in progress fail, or find that #isOver is set.
    this.#state?.end();
    const { images, forkStore } = this.#context;
    // A QEMU that loads the state waits for missing pages, so the clones end first. If none loads, the parent is
    // released first.
    if (this.#loading !== null) await this.#clones.end();
    if (this.#pages.isJoined) await this.#pages.abandon();
    await Promise.allSettled([this.#arming, this.#pointing, this.#loading]);
    this.#clones.endLoads();
    await this.#pages.abandon();
    await this.#state?.close();
    if (this.#parent !== null) await resumeParent(this.#context, this.#parent, this.request.job);
    await this.#clones.end();
    await this.#disks?.undo();
    if (isOwnImage(this.#context, this.record)) await images.delete(this.record.image);
    await forkStore.remove(this.request.fork);
  }

  /** Called when a QEMU has ended by itself, before the handle on its memory is closed. */
  lost(vm: ManagedVm): void {
    if (!this.has(vm)) return;
    this.#pages.forget(vm);
  }

  /** Called when the daemon exits. Everything stays as it is for the next daemon. */
  async close(): Promise<void> {
    this.#isOver = true;
    this.#clones.endLoads();
    await this.#pages.leave();
    await this.#state?.close();
    await this.#afterCommit.catch(() => undefined);
  }

  async #armOnce(): Promise<void> {
    this.#refuseIfEnded();
    const parent = this.#parent;
    if (parent === null) return;
    const { images, inject } = this.#context;
    const image = images.get(this.record.image);
    await inject.hit('agent:fork:arm');
    this.#disks ??= new ParentDisks(this.#context, parent, image.id);
    await this.#disks.prepare(this.request.parentMode);
    this.#state ??= await parent.process.exportState();
    await this.#pages.arm(this.#clones.vms);
  }

  async #pointOnce(): Promise<ForkPointReply> {
    this.#refuseIfEnded();
    if (this.#parent === null) {
      const { deviceStateBytes } = this.#context.images.get(this.record.image);
      return { parentPauseMs: 0, deviceStateBytes, parts: [] };
    }
    const [state, disks] = [this.#state, this.#disks];
    if (state === null || disks === null) throw new MigrationError('CONFLICT', 'the parent has not been armed');
    const reply = await takeForkPointOf(this.#context, this.record, { state, disks, pages: this.#pages });
    const { parentPauseMs, deviceStateBytes } = reply;
    this.#book.note({ parentPauseMs, deviceStateBytes });
    return reply;
  }

  async #loadOnce(): Promise<LoadClonesReply> {
    this.#refuseIfEnded();
    await this.#context.inject.hit('agent:fork:load');
    await this.#pages.beginServing();
    await this.#pages.openCopies(this.#clones.vms, false);
    const { isPartialAllowed } = this.request;
    const loading = this.#clones.load({ isPartialAllowed });
    // Clones wait for pages while they load. If the image cannot be filled, these pages never come.
    const { loaded, failures } = await Promise.race([loading, this.#pages.captured().then(() => loading)]);
    if (failures.length > 0 && (loaded.length === 0 || !isPartialAllowed)) throw firstFailure(failures);
    await this.#clones.keep(loaded);
    await this.#context.inject.hit('agent:fork:loaded');
    this.#book.note({ failures: [...this.#failures, ...failures].map(failureInJson) });
    return { failures: failures.map(failureInJson) };
  }

  async #commitOnce(): Promise<void> {
    if (this.isCommitted) return;
    this.#refuseIfEnded();
    await this.#lookForLoads();
    if (this.#loading === null) throw new MigrationError('CONFLICT', 'the clones have not been loaded');
    await this.#loading;
    const { inject } = this.#context;
    await inject.hit('agent:fork:commit');
    await this.#book.commit(this.#clones.identities);
    await inject.hit('agent:fork:committed');
  }

  async #runOnce(): Promise<readonly CloneFailure[]> {
    if (!this.isCommitted) throw new MigrationError('CONFLICT', `fork ${this.request.fork} is not committed`);
    this.#refuseIfEnded();
    const { inject } = this.#context;
    await inject.hit('agent:fork:run');
    // The daemon that has taken up the fork before its commit may have found no files to read the image into.
    if (this.#isRejoined) await this.#filling.resume();
    await this.#reopening?.catch(() => {
      this.#reopening = this.#pages.openCopies(this.#clones.vms, true);
      return this.#reopening;
    });
    await this.#filling.failIfDue();
    const running = this.#clones.run();
    await Promise.allSettled([running]);
    this.#pages.fillSoon();
    const failures = await running;
    await inject.hit('agent:fork:running');
    const before = this.#book.outcome.failures;
    const known = new Set(before.map(({ index }) => index));
    const others = failures.filter(({ index }) => !known.has(index)).map(failureInJson);
    this.#book.note({ failures: [...before, ...others] });
    this.#afterCommit = this.#afterCommit.catch(() => undefined).then(() => this.#settleCommitted());
    this.#afterCommit.catch(() => undefined);
    this.#filling.follow();
    return failures;
  }

  /** Records what has happened since the commit. It may be called again, when more clones have run. */
  async #settleCommitted(): Promise<void> {
    this.#book.settle({ ready: await this.#clones.ready() });
    const clones = this.#clones.running;
    const parts = { record: this.record, parent: this.#parent, clones, isFilled: this.#pages.isFilled };
    await settleRun(this.#context, parts);
    await this.#state?.close();
  }

  #refuseIfEnded(): void {
    if (this.#isOver) throw new MigrationError('CONFLICT', `fork ${this.request.fork} has ended`);
  }
}
