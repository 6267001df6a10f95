/**
 * One fork on its host, from the waiting QEMUs to the complete image. src/engine/ports/fork.ts defines the order of the
 * calls.
 *
 *   prepared ─ armParent ─► armed ─ forkPoint ─► pointed ─ startClones ─► started ─ commitFork ─► committed ─► complete
 *
 * The commit divides the life of a fork. Before it, `discard` removes everything and the parent continues as if there
 * had been no fork. After it, the clones are VMs and the image only waits for pages.
 */

import type { StateExport } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneFailure } from '../../domain/fork.js';
import type {
  ForkPointReply,
  ForkProgress,
  PrepareForkReply,
  PrepareForkRequest,
  StartClonesReply,
} from '../../engine/ports/fork.js';
import { failureToError } from '../../native/failure.js';
import type { ManagedVm } from '../vm/vms.js';
import { CaptureSession } from './capture-session.js';
import { startLoaded } from './clone-start.js';
import type { ForkContext } from './context.js';
import { ParentDisks } from './parent-disks.js';
import { takeForkPoint } from './point.js';
import { PrivateCopies } from './private-copies.js';
import { progressOf } from './progress.js';
import type { ForkOutcome, ForkRecord } from './record.js';
import { settleCommitted } from './settle.js';
import { resumeParent } from './undo.js';
import { filesChanged, giveUpImage, isPermanent } from './unfillable.js';
import { endClones, firstFailure, type WaitingClone } from './waiting-set.js';

export interface ForkParts {
  readonly record: ForkRecord;
  /** Null if the fork runs an existing image. */
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
  #state: StateExport | null = null;
  #disks: ParentDisks | null = null;
  #copies: PrivateCopies | null = null;
  #arming: Promise<void> | null = null;
  #pointing: Promise<ForkPointReply> | null = null;
  #starting: Promise<StartClonesReply> | null = null;
  #committing: Promise<void> | null = null;
  /** The writes that follow the commit. They are done before the fork is forgotten. */
  #afterCommit: Promise<void> = Promise.resolve();
  /** The work that follows the end of the capture. */
  #afterCapture: Promise<void> = Promise.resolve();
  #outcome: ForkOutcome = { failures: [], parentPauseMs: 0, deviceStateBytes: 0, ready: [] };
  #isOver = false;

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

  get reply(): PrepareForkReply {
    const { image, isWarm, clones } = this.#record;
    return { image, isWarm, clones, failures: this.#failures.map(inJson) };
  }

  /** Continues a committed fork of an earlier daemon. Its clones run, and its image may still be filling. */
  async resume(): Promise<void> {
    const { failure } = this.#record;
    const hasFailed = failure !== null || this.#context.images.get(this.#record.image).state === 'failed';
    if (hasFailed) {
      await this.#fail(failure === null ? filesChanged() : MigrationError.fromJSON(failure, 'the fork record'));
      return;
    }
    try {
      await this.#resumeCapture();
    } catch (thrown) {
      const error = toMigrationError(thrown);
      if (!isPermanent(error)) throw error;
      await this.#fail(error);
      return;
    }
    const copying = this.#isPrivate ? this.#openCopies(true) : Promise.resolve();
    this.#afterCommit = copying.then(() => this.#settleCommitted());
    this.#afterCommit.catch(() => undefined);
  }

  async #resumeCapture(): Promise<void> {
    const image = this.#context.images.get(this.#record.image);
    if (!this.#isCopied || image.state === 'complete') return;
    const capture = await CaptureSession.open(this.#context, image, { parent: this.#parent, isResume: true });
    this.#capture = capture;
    if (!this.#isPrivate) for (const { vm } of this.#clones) capture.addClone(vm);
    this.#followCapture(capture);
    await capture.resume();
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
      throw new MigrationError('NOT_FOUND', `image ${this.#record.image} is no longer on ${host}`);
    }
    const image = images.get(this.#record.image);
    return progressOf({
      ...{ record: this.#record, image, isCopied: this.#isCopied, capture: this.#capture, copies: this.#copies },
      failure: this.#record.failure ?? this.#captureFailure?.toJSON() ?? null,
    });
  }

  /** Throws CONFLICT while pages are still being copied. */
  async finish(): Promise<void> {
    const { state } = await this.progress();
    if (!this.isCommitted || state === 'filling') {
      throw new MigrationError('CONFLICT', `pages of image ${this.#record.image} are still being copied`);
    }
    await this.#afterCommit;
    await this.#afterCapture;
    await this.#capture?.finish();
    await this.#copies?.finish();
    for (const { vm } of this.#clones) await this.#context.vms.unreserve(vm.spec.name, this.request.job);
    await this.#context.forkStore.remove(this.request.fork);
    this.#isOver = true;
  }

  /** Throws CONFLICT after the commit. */
  async discard(): Promise<void> {
    await this.#committing?.catch(() => undefined);
    if (this.isCommitted) {
      const { fork } = this.request;
      throw new MigrationError('CONFLICT', `fork ${fork} is committed: its clones run and cannot be discarded`);
    }
    this.#isOver = true;
    // Steps in progress fail, or find that #isOver is set.
    this.#state?.end();
    const { images, forkStore } = this.#context;
    // Clones that have loaded the state must not run on without their missing pages, so they end first. If no clone has
    // started, the parent is released first.
    if (this.#starting !== null) await this.#endClones();
    await Promise.allSettled([this.#arming, this.#pointing, this.#starting]);
    await this.#capture?.abandon();
    await this.#state?.close();
    if (this.#parent !== null) await resumeParent(this.#context, this.#parent);
    await this.#endClones();
    await this.#disks?.undo();
    if (this.request.image === null) await images.delete(this.#record.image);
    await forkStore.remove(this.request.fork);
  }

  /** Called when a QEMU has ended by itself, before the handle on its memory is closed. */
  lost(vm: ManagedVm): void {
    if (!this.#clones.some((clone) => clone.vm === vm)) return;
    if (!this.#isPrivate) this.#capture?.removeClone(vm);
    this.#copies?.drop(vm).catch((error: unknown) => {
      this.#context.log.error(
        { vm: vm.spec.name, err: toMigrationError(error) },
        'the page session of a clone that has ended cannot be closed',
      );
    });
  }

  /** Called when the daemon exits. Everything stays as it is for the next daemon. */
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

  /** The error that stopped the capture, or null. */
  get #captureFailure(): MigrationError | null {
    const snapshot = this.#capture?.snapshot;
    if (snapshot?.state !== 'failed') return null;
    if (snapshot.failure !== null) return failureToError(snapshot.failure, 'filling the image');
    return new MigrationError('NATIVE_FAILED', 'the image of the clones cannot be filled');
  }

  /** Rejects if the capture fails. Otherwise it never settles. */
  async #rejectOnFailure(): Promise<never> {
    await this.#capture?.over;
    if (this.#captureFailure !== null) throw this.#captureFailure;
    return new Promise(() => undefined);
  }

  /** Waits for the complete image first: pages that have not been copied yet would be zeros in its files. */
  async #openCopies(isResume: boolean): Promise<void> {
    await this.#capture?.over;
    if (this.#captureFailure !== null) throw this.#captureFailure;
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

  /** True if the parent continues to run, so that its pages are copied. */
  get #isCopied(): boolean {
    return this.request.image === null && this.request.parentMode === 'continue';
  }

  async #armOnce(): Promise<void> {
    this.#refuseIfEnded();
    const parent = this.#parent;
    if (parent === null) return;
    const { images, inject } = this.#context;
    const image = images.get(this.#record.image);
    await inject.hit('agent:fork:arm');
    this.#disks ??= new ParentDisks(this.#context, parent, image.id);
    await this.#disks.prepare(this.request.parentMode);
    this.#state ??= await parent.process.exportState();
    if (!this.#isCopied) return;
    if (this.#capture === null) {
      this.#capture = await CaptureSession.open(this.#context, image, { parent, isResume: false });
      if (!this.#isPrivate) for (const { vm } of this.#clones) this.#capture.addClone(vm);
    }
    await this.#capture.arm();
  }

  async #pointOnce(): Promise<ForkPointReply> {
    this.#refuseIfEnded();
    const { images, inject, log } = this.#context;
    const { image: id, request } = this.#record;
    if (this.#parent === null)
      return { parentPauseMs: 0, deviceStateBytes: images.get(id).deviceStateBytes, parts: [] };
    const [state, disks] = [this.#state, this.#disks];
    if (state === null || disks === null) throw new MigrationError('CONFLICT', 'the parent has not been armed');
    await inject.hit('agent:fork:point');
    const reply = await takeForkPoint({
      state,
      capture: this.#capture?.handle ?? null,
      // Private clones start only when the image is complete, so the sweep must not wait for them.
      isSweepLater: !this.#isPrivate,
      statePath: images.statePath(id),
      snapshotDisks: () => disks.snapshot(),
      inject,
    });
    log.debug({ fork: request.fork, ...reply }, 'fork point');
    await inject.hit('agent:fork:pointed');
    await disks.settle();
    const { parentPauseMs, deviceStateBytes } = reply;
    this.#outcome = { ...this.#outcome, parentPauseMs, deviceStateBytes };
    await images.update(id, { deviceStateBytes });
    return reply;
  }

  async #startOnce(): Promise<StartClonesReply> {
    this.#refuseIfEnded();
    const beganAtMs = performance.now();
    const beganAt = Date.now();
    await this.#context.inject.hit('agent:fork:start');
    if (this.#isPrivate) await this.#openCopies(false);
    const { isPartialAllowed } = this.request;
    const starting = startLoaded(this.#clones, { isPartialAllowed });
    // Clones wait for pages while they load. If the image cannot be filled, these pages never come.
    const { running, failures } = await Promise.race([starting, this.#rejectOnFailure()]);
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
    await this.#context.inject.hit('agent:fork:started');
    const ready = running.map(({ identity, resumedAtMs }) => ({
      index: identity.index,
      atMs: resumedAtMs - beganAtMs,
    }));
    this.#outcome = {
      ...this.#outcome,
      failures: [...this.#failures, ...failures].map(inJson),
      ready: ready.map(({ index, atMs }) => ({ index, at: new Date(beganAt + atMs).toISOString() })),
    };
    return { ready, failures: failures.map(inJson) };
  }

  async #commitOnce(): Promise<void> {
    if (this.isCommitted) return;
    this.#refuseIfEnded();
    if (this.#starting === null) throw new MigrationError('CONFLICT', 'the clones have not been started');
    await this.#starting;
    const { forkStore, inject } = this.#context;
    await inject.hit('agent:fork:commit');
    const clones = this.#clones.map(({ identity }) => identity);
    const committed: ForkRecord = { ...this.#record, state: 'committed', clones, outcome: this.#outcome };
    await forkStore.save(committed);
    this.#record = committed;
    await inject.hit('agent:fork:committed');
    if (this.#capture !== null) this.#followCapture(this.#capture);
    this.#afterCommit = this.#settleCommitted();
    this.#afterCommit.catch(() => undefined);
  }

  async #settleCommitted(): Promise<void> {
    const parts = { record: this.#record, parent: this.#parent, clones: this.#clones, isCopied: this.#isCopied };
    await settleCommitted(this.#context, parts);
    await this.#state?.close();
  }

  #followCapture(capture: CaptureSession): void {
    this.#afterCapture = capture.over
      .then((outcome) => this.#captureOver(outcome))
      .catch((error: unknown) => {
        const err = toMigrationError(error);
        this.#context.log.error({ fork: this.request.fork, err }, 'the end of the capture cannot be recorded');
      });
  }

  async #captureOver(outcome: 'complete' | 'failed'): Promise<void> {
    if (this.#isOver) return;
    await this.#afterCommit;
    const failure = this.#captureFailure;
    if (outcome === 'failed' && failure !== null) return this.#fail(failure);
    await this.#context.images.update(this.#record.image, { state: outcome });
  }

  /** Gives up the image, which can never be complete. */
  async #fail(failure: MigrationError): Promise<void> {
    this.#record = { ...this.#record, failure: failure.toJSON() };
    const clones = this.#clones.map(({ vm }) => vm);
    await giveUpImage(this.#context, { record: this.#record, clones, capture: this.#capture, parent: this.#parent });
  }

  #refuseIfEnded(): void {
    if (this.#isOver) throw new MigrationError('CONFLICT', `fork ${this.request.fork} has ended`);
  }
}

function inJson({ index, name, error }: CloneFailure): CloneFailure {
  return { index, name, error: toMigrationError(error).toJSON() };
}
