/**
 * One fork on its host, from the waiting QEMUs to the image that is complete. What a call may be made after, src/engine/fork-ports.ts says.
 *
 *   prepared ── armParent ──► armed ── forkPoint ──► pointed ── startClones ──► started ── commitFork ──► committed ──► complete
 *
 * The record says `committed` or not, and that divides its life: before, discard takes everything away and the parent runs on as if nothing had
 * been; from then on the clones are VMs and the image only waits for pages.
 */
import type { CloneFailure } from '../domain-fork.js';
import type {
  ForkPointReply,
  ForkProgress,
  PrepareForkReply,
  PrepareForkRequest,
  StartClonesReply,
} from '../engine/fork-ports.js';
import { MigrationError, toMigrationError } from '../errors.js';
import { failureToError } from '../native/failure.js';
import { CaptureSession } from './capture-session.js';
import { startLoaded } from './clone-start.js';
import type { ForkContext } from './fork-context.js';
import { takeForkPoint } from './fork-point.js';
import type { ForkRecord } from './fork-record.js';
import { letParentRun } from './fork-undo.js';
import { OutgoingState } from './outgoing-state.js';
import { inParallel } from './parallel.js';
import { ParentDisks } from './parent-disks.js';
import { PrivateCopies } from './private-copies.js';
import type { ManagedVm } from './vms.js';
import { endClones, firstFailure, type WaitingClone } from './waiting-set.js';

const SETTLED_AT_ONCE = 16;

export interface ForkParts {
  readonly record: ForkRecord;
  /** null where an image is run that was there. */
  readonly parent: ManagedVm | null;
  readonly clones: readonly WaitingClone[];
  readonly failures: readonly CloneFailure[];
}

export class ForkSession {
  readonly #context: ForkContext;
  readonly #parent: ManagedVm | null;
  readonly #failures: readonly CloneFailure[];
  #record: ForkRecord;
  #clones: readonly WaitingClone[];
  #capture: CaptureSession | null = null;
  #state: OutgoingState | null = null;
  #disks: ParentDisks | null = null;
  #copies: PrivateCopies | null = null;
  #arming: Promise<void> | null = null;
  #pointing: Promise<ForkPointReply> | null = null;
  #starting: Promise<StartClonesReply> | null = null;
  #committing: Promise<void> | null = null;
  /** What a commit leaves to be written; resolved before the fork is forgotten. */
  #afterCommit: Promise<void> = Promise.resolve();
  #isOver = false;
  #hasFailed = false;

  constructor(context: ForkContext, parts: ForkParts) {
    this.#context = context;
    this.#record = parts.record;
    this.#parent = parts.parent;
    this.#clones = parts.clones;
    this.#failures = parts.failures;
  }

  get record(): ForkRecord {
    return this.#record;
  }

  get request(): PrepareForkRequest {
    return this.#record.request;
  }

  get isCommitted(): boolean {
    return this.#record.state === 'committed';
  }

  /** Nothing but its image needs it any more: that cannot be completed, and its clones have been ended. */
  get hasFailed(): boolean {
    return this.#hasFailed;
  }

  get reply(): PrepareForkReply {
    const { image, isWarm, clones } = this.#record;
    return { image, isWarm, clones, failures: this.#failures };
  }

  /** Of an earlier daemon, committed: its clones run, its image may still be filling. */
  async takeUp(): Promise<void> {
    const { images } = this.#context;
    const image = images.get(this.#record.image);
    if (this.#isCopied && image.state !== 'complete' && image.state !== 'failed') {
      const capture = await CaptureSession.open(this.#context, image, { parent: this.#parent, isResume: true });
      this.#capture = capture;
      if (!this.#isPrivate) for (const { vm } of this.#clones) capture.addClone(vm);
      this.#followCapture(capture);
      await capture.resume();
    }
    const copying = this.#isPrivate ? this.#openCopies(true) : Promise.resolve();
    this.#afterCommit = copying.then(() => this.#settleCommitted());
    this.#afterCommit.catch(() => undefined);
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

  start(): Promise<StartClonesReply> {
    this.#starting ??= this.#startOnce();
    return this.#starting;
  }

  commit(): Promise<void> {
    this.#committing ??= this.#commitOnce().catch((error: unknown) => {
      this.#committing = null;
      throw error;
    });
    return this.#committing;
  }

  async progress(): Promise<ForkProgress> {
    const { images, host } = this.#context;
    if (!images.has(this.#record.image)) {
      throw new MigrationError('NOT_FOUND', `image ${this.#record.image} is not on ${host} any more`);
    }
    const image = images.get(this.#record.image);
    const { memory } = image.spec;
    const pagesTotal = memory.sizeBytes / memory.pageBytes;
    const snapshot = this.#capture?.snapshot ?? null;
    const isCapturing = snapshot !== null && snapshot.state !== 'complete';
    const isCopying = isCapturing || (this.#isPrivate && this.#copies?.isComplete !== true);
    const hasFailed = image.state === 'failed' || snapshot?.state === 'failed';
    const failure = snapshot?.failure ?? null;
    return {
      state: hasFailed ? 'failed' : isCopying || !this.isCommitted ? 'filling' : 'complete',
      error: failure === null ? null : failureToError(failure, 'filling the image').toJSON(),
      pagesTotal: pagesTotal + (this.#copies?.pagesTotal ?? 0),
      pagesDone: (isCapturing ? (this.#capture?.pagesDone ?? 0) : pagesTotal) + (this.#copies?.pagesDone ?? 0),
      pageBytes: memory.pageBytes,
      counters: this.#capture?.counters ?? {},
    };
  }

  /** CONFLICT while pages are still being copied. */
  async finish(): Promise<void> {
    const { state } = await this.progress();
    if (!this.isCommitted || state === 'filling') {
      throw new MigrationError('CONFLICT', 'pages of the image are still being copied');
    }
    await this.#afterCommit;
    await this.#capture?.finish();
    await this.#copies?.finish();
    for (const { vm } of this.#clones) await this.#context.vms.unreserve(vm.spec.name, this.request.job);
    await this.#context.forkStore.remove(this.request.fork);
    this.#isOver = true;
  }

  /** CONFLICT after the commit. */
  async discard(): Promise<void> {
    await this.#committing?.catch(() => undefined);
    if (this.isCommitted)
      throw new MigrationError('CONFLICT', 'the clones of the fork run: they are not taken away any more');
    this.#isOver = true;
    // What is under way fails, or finds that it is over.
    this.#state?.end();
    const { images, forkStore } = this.#context;
    // Clones that have loaded must not go on without the pages they lack; while there are none, the parent comes first.
    if (this.#starting !== null) await this.#endClones();
    await Promise.allSettled([this.#arming, this.#pointing, this.#starting]);
    await this.#capture?.abandon();
    await this.#state?.close();
    if (this.#parent !== null) await letParentRun(this.#context, this.#parent);
    await this.#endClones();
    await this.#disks?.undo();
    if (this.request.image === null) await images.delete(this.#record.image);
    await forkStore.remove(this.request.fork);
  }

  /** QEMU has ended by itself; before the handle on its memory is closed. */
  lost(vm: ManagedVm): void {
    if (!this.#clones.some((clone) => clone.vm === vm)) return;
    if (!this.#isPrivate) this.#capture?.removeClone(vm);
    this.#copies?.drop(vm).catch((error: unknown) => {
      this.#context.log.error(
        { vm: vm.spec.name, err: toMigrationError(error) },
        'the pages of a dead clone do not close',
      );
    });
  }

  /** The daemon goes: everything stays as it is for the next one. */
  async close(): Promise<void> {
    this.#isOver = true;
    await this.#copies?.close();
    await this.#capture?.leave();
    await this.#state?.close();
    await this.#afterCommit.catch(() => undefined);
  }

  async #endClones(clones: readonly WaitingClone[] = this.#clones): Promise<void> {
    for (const { vm } of clones) {
      if (!this.#isPrivate) this.#capture?.removeClone(vm);
      await this.#copies?.drop(vm);
    }
    await endClones(this.#context, clones);
  }

  /** Rejects if the image fails; else for ever pending. */
  async #unfillable(): Promise<never> {
    if ((await this.#capture?.over) !== 'failed') return new Promise(() => undefined);
    const failure = this.#capture?.snapshot.failure ?? null;
    if (failure !== null) throw failureToError(failure, 'filling the image');
    throw new MigrationError('NATIVE_FAILED', 'the image of the clones cannot be filled');
  }

  /** Filled from the image's files, in which what has not been copied yet would be zeros: the image comes first. */
  async #openCopies(isResume: boolean): Promise<void> {
    const outcome = await this.#capture?.over;
    if (outcome === 'failed') throw new MigrationError('NO_SPACE', 'the image of the clones cannot be filled');
    const { images } = this.#context;
    this.#copies ??= new PrivateCopies(this.#context, images.get(this.#record.image));
    await this.#copies.open(
      this.#clones.map(({ vm }) => vm),
      isResume,
    );
    if (isResume) this.#copies.fill();
  }

  get #isPrivate(): boolean {
    return this.request.memory === 'private';
  }

  /** The parent runs on, and so its pages are copied. */
  get #isCopied(): boolean {
    return this.request.image === null && this.request.parentMode === 'continue';
  }

  async #armOnce(): Promise<void> {
    this.#mustLive();
    const parent = this.#parent;
    if (parent === null) return;
    const { images, faults } = this.#context;
    const image = images.get(this.#record.image);
    await faults.hit('agent:fork:arm');
    this.#disks ??= new ParentDisks(this.#context, parent, image.id);
    await this.#disks.prepare(this.request.parentMode);
    this.#state ??= await OutgoingState.listen(parent);
    if (!this.#isCopied) return;
    if (this.#capture === null) {
      this.#capture = await CaptureSession.open(this.#context, image, { parent, isResume: false });
      if (!this.#isPrivate) for (const { vm } of this.#clones) this.#capture.addClone(vm);
    }
    await this.#capture.arm();
  }

  async #pointOnce(): Promise<ForkPointReply> {
    this.#mustLive();
    const { images, faults, log } = this.#context;
    const { image: id, request } = this.#record;
    if (this.#parent === null)
      return { parentPauseMs: 0, deviceStateBytes: images.get(id).deviceStateBytes, parts: [] };
    const [state, disks] = [this.#state, this.#disks];
    if (state === null || disks === null) throw new MigrationError('CONFLICT', 'the parent has not been armed');
    await faults.hit('agent:fork:point');
    const reply = await takeForkPoint(this.#parent, {
      state,
      capture: this.#capture?.handle ?? null,
      // A clone's own memory is copied out of the image: there the image comes first.
      isSweepLater: !this.#isPrivate,
      statePath: images.statePath(id),
      snapshotDisks: () => disks.snapshot(),
    });
    log.debug({ fork: request.fork, ...reply }, 'fork point');
    await faults.hit('agent:fork:pointed');
    await disks.settle();
    await images.update(id, { deviceStateBytes: reply.deviceStateBytes });
    return reply;
  }

  async #startOnce(): Promise<StartClonesReply> {
    this.#mustLive();
    const beganAtMs = performance.now();
    await this.#context.faults.hit('agent:fork:start');
    if (this.#isPrivate) await this.#openCopies(false);
    const { isPartialAllowed } = this.request;
    const starting = startLoaded(this.#clones, { isPartialAllowed });
    // Clones wait for pages while they load, and those of an image that cannot be filled never come.
    const { running, failures } = await Promise.race([starting, this.#unfillable()]);
    await this.#capture?.sweep();
    this.#context.log.debug(
      { fork: this.request.fork, clones: running.length, ms: performance.now() - beganAtMs },
      'clones resumed',
    );
    if (running.length === 0 || (failures.length > 0 && !isPartialAllowed)) throw firstFailure(failures);
    const failed = this.#clones.filter(({ identity }) => failures.some(({ index }) => index === identity.index));
    await this.#endClones(failed);
    this.#clones = running;
    this.#copies?.fill();
    await this.#context.faults.hit('agent:fork:started');
    const ready = running.map(({ identity, resumedAtMs }) => ({
      index: identity.index,
      atMs: resumedAtMs - beganAtMs,
    }));
    return { ready, failures };
  }

  async #commitOnce(): Promise<void> {
    if (this.isCommitted) return;
    this.#mustLive();
    if (this.#starting === null) throw new MigrationError('CONFLICT', 'the clones have not been started');
    await this.#starting;
    const { forkStore, faults } = this.#context;
    await faults.hit('agent:fork:commit');
    const clones = this.#clones.map(({ identity }) => identity);
    const committed: ForkRecord = { ...this.#record, state: 'committed', clones };
    await forkStore.save(committed);
    this.#record = committed;
    await faults.hit('agent:fork:committed');
    if (this.#capture !== null) this.#followCapture(this.#capture);
    this.#afterCommit = this.#settleCommitted();
    this.#afterCommit.catch(() => undefined);
  }

  /** The records that follow from the one that has been written: a restart does the same again. */
  async #settleCommitted(): Promise<void> {
    const { images, vms } = this.#context;
    const { image: id, request } = this.#record;
    if (images.get(id).state === 'capturing') {
      await images.update(id, { state: this.#isCopied ? 'filling' : 'complete' });
    }
    // Together: beside guests that have just woken up, each of the daemon's steps waits for a processor.
    const settled = await inParallel(this.#clones, SETTLED_AT_ONCE, async ({ vm }) => {
      const { name } = vm.spec;
      if (!vms.has(name) || vms.get(name) !== vm) return;
      if (vm.state === 'incoming') await vms.setState(name, 'running');
      // Pages are missing: nobody may move it on before it has them.
      if (this.#isPrivate && vm.state !== 'stopped') await vms.reserve(name, request.job);
    });
    for (const outcome of settled) if ('error' in outcome) throw outcome.error;
    await this.#state?.close();
    if (request.parentMode !== 'stop' || this.#parent === null) return;
    const { name } = this.#parent.spec;
    if (vms.has(name) && vms.get(name) === this.#parent && this.#parent.state !== 'stopped') {
      await vms.stop(name, { isForced: true });
    }
  }

  #followCapture(capture: CaptureSession): void {
    capture.over
      .then((outcome) => this.#captureOver(outcome))
      .catch((error: unknown) => {
        const err = toMigrationError(error);
        this.#context.log.error({ fork: this.request.fork, err }, 'the end of a fork cannot be written down');
      });
  }

  async #captureOver(outcome: 'complete' | 'failed'): Promise<void> {
    if (this.#isOver) return;
    const { images, vms, log, forkStore } = this.#context;
    const { image } = this.#record;
    await this.#afterCommit;
    this.#hasFailed = outcome === 'failed';
    await images.update(image, { state: outcome });
    if (outcome === 'complete') return;
    log.error({ image, failure: this.#capture?.snapshot.failure }, 'an image cannot be filled: its clones are ended');
    for (const { vm } of this.#clones) {
      const { name } = vm.spec;
      if (vms.has(name) && vms.get(name) === vm && vm.state !== 'stopped') await vms.stop(name, { isForced: true });
    }
    await this.#capture?.finish();
    await images.dropMemory(image);
    await forkStore.remove(this.request.fork);
  }

  #mustLive(): void {
    if (this.#isOver) throw new MigrationError('CONFLICT', 'the fork has ended');
  }
}
