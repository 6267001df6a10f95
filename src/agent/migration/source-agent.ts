/**
 * Implements SourcePort on this host and holds its outgoing sessions by id. source-session.ts implements one of them.
 */

import type { OpenStream } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import { guestEndText } from '../../domain/guest-end.js';
import type { ChunkRange, DirtyRound, FrozenDigests, SourceEndpointInfo } from '../../engine/ports/session.js';
import type { ExposeRequest, NativeMigrateOptions, SourcePort, StopReply } from '../../engine/ports/source.js';
import { KeyedLocks } from '../../kit/locks.js';
import type { ManagedVm } from '../vm/vms.js';
import type { MigrationContext } from './context.js';
import { EndedSessions } from './ended-sessions.js';
import { checkSession, type SourceRecord } from './session-store.js';
import { SourceSession } from './source-session.js';

export class SourceAgent implements SourcePort {
  readonly #context: MigrationContext;
  /** Returns the reason why memory of a VM is still missing on this host, or null. */
  readonly #missingMemory: (vm: string) => Promise<string | null>;
  readonly #locks = new KeyedLocks();
  readonly #sources = new Map<string, SourceSession>();
  /** The native migrations that run or are done, by session. */
  readonly #moves = new Map<string, { readonly done: Promise<void>; readonly cancel: AbortController }>();
  /** Those whose stream is being connected again. */
  readonly #recoveries = new Map<string, Promise<void>>();
  readonly #ended = new EndedSessions();
  /**
   * VM → the session that has stopped it last, or is about to. The undo of an older session may come late, because it
   * is repeated until it succeeds. It must not resume the VM while this session may be committed.
   */
  readonly #stoppers = new Map<string, string>();
  /**
   * VM → the continueVm in progress. A stop waits for it, so that its `cont` cannot fall into the new session's
   * blackout.
   */
  readonly #continuing = new Map<string, Promise<void>>();

  constructor(context: MigrationContext, missingMemory: (vm: string) => Promise<string | null>) {
    this.#context = context;
    this.#missingMemory = missingMemory;
  }

  /** Resumes a session of an earlier daemon. */
  async resumeSession(record: SourceRecord): Promise<void> {
    const { vms, store, registry, host } = this.#context;
    if (!vms.isTaken(record.vm)) return store.remove(record);
    // The VM's record is damaged. Its session is kept for the time when it is repaired.
    if (!vms.has(record.vm)) return;
    const owner = await registry.owner(record.vm);
    const hasDeparted = owner !== null && owner.owner !== host;
    const source = await SourceSession.resumeSession(this.#context, record, vms.get(record.vm), hasDeparted);
    this.#sources.set(record.session, source);
  }

  async close(): Promise<void> {
    await Promise.all([...this.#sources.values()].map((source) => source.close()));
  }

  async reserve(vm: string, job: string): Promise<void> {
    const { vms } = this.#context;
    await vms.reserve(vm, job);
    try {
      await refuseDiskJobs(vms.get(vm));
    } catch (error) {
      await vms.unreserve(vm, job);
      throw error;
    }
  }

  async unreserve(vm: string, job: string): Promise<void> {
    await this.#context.vms.unreserve(vm, job);
  }

  async expose(request: ExposeRequest): Promise<SourceEndpointInfo> {
    const { session, vm: name } = request;
    const missing = await this.#missingMemory(name);
    if (missing !== null)
      throw new MigrationError('VM_BUSY', `memory of ${name} is still missing on this host: ${missing}`);
    checkSession(session);
    return this.#locks.hold(session, async () => {
      this.#ended.refuse(session);
      const existing = this.#sources.get(session);
      if (existing !== undefined) {
        const owner = await this.#context.registry.owner(name);
        await existing.renew(owner !== null && owner.owner !== this.#context.host && owner.session === session);
        return existing.endpoint;
      }
      const vm = this.#context.vms.get(name);
      await this.#checkOwner(name);
      if (vm.state !== 'running') throw new MigrationError('CONFLICT', `${name} is ${vm.state}`);
      const source = await SourceSession.expose(this.#context, { ...request, version: 1, role: 'source' }, vm);
      this.#sources.set(session, source);
      return source.endpoint;
    });
  }

  async unexpose(session: string): Promise<void> {
    checkSession(session);
    this.#ended.add(session);
    await this.#locks.hold(session, async () => {
      await this.#sources.get(session)?.unexpose();
      this.#sources.delete(session);
      this.#forgetStopper(session);
    });
  }

  async noteDirty(vm: string, session: string): Promise<DirtyRound> {
    return this.#sayingGuestEnd(vm, () => this.#source(session).noteDirty());
  }

  async stop(_vm: string, session: string): Promise<StopReply> {
    const source = this.#source(session);
    await this.#becomeStopper(source.record.vm, session);
    return this.#sayingGuestEnd(source.record.vm, () => source.stop());
  }

  /** Does nothing if the VM is not on this host or runs. Throws CONFLICT if another session has stopped it since. */
  async continueVm(vm: string, session: string): Promise<void> {
    if (!this.#context.vms.has(vm)) return;
    await this.#checkOwner(vm);
    if (this.#isStoppedByOther(vm, session))
      throw new MigrationError('CONFLICT', `${vm} is stopped for another session`);
    const continuing = this.#continueNow(vm, session);
    this.#continuing.set(vm, continuing);
    try {
      await continuing;
      this.#forgetStopper(session);
    } finally {
      if (this.#continuing.get(vm) === continuing) this.#continuing.delete(vm);
    }
  }

  async #continueNow(vm: string, session: string): Promise<void> {
    const { vms } = this.#context;
    this.#sources.get(session)?.endBeforeRun();
    const managed = vms.get(vm);
    try {
      await managed.process.cancelAndRun();
    } catch (error) {
      const guestEnd = await vms.guestEnd(vm);
      // QEMU has ended and this host still owns the VM, so what is left of the VM may be removed.
      if (managed.state === 'departed' && vms.exitOf(vm) !== null) await vms.setState(vm, 'stopped');
      // A guest that has ended by itself has nothing to continue.
      if (guestEnd !== null) return;
      throw error;
    }
    await vms.setState(vm, 'running');
  }

  async transferState(vm: string, session: string, target: string): Promise<{ readonly deviceStateBytes: number }> {
    return this.#sayingGuestEnd(vm, () => this.#source(session).transferState(target));
  }

  /** If the guest has ended by itself, that is the reason why QEMU has failed a call. */
  async #sayingGuestEnd<T>(vm: string, call: () => Promise<T>): Promise<T> {
    try {
      return await call();
    } catch (error) {
      const { vms, host } = this.#context;
      const end = vms.has(vm) ? await vms.guestEnd(vm) : null;
      if (end === null) throw error;
      throw new MigrationError('QEMU_GONE', `${guestEndText(vm, end)} on ${host} before it was moved`, {
        remedy: `there is nothing left to move; "vmctl stop ${vm}" removes it from the list`,
        cause: error,
      });
    }
  }

  async nativeMigrate(name: string, session: string, options: NativeMigrateOptions): Promise<void> {
    await this.#checkOwner(name);
    this.#ended.refuse(session);
    await this.#becomeStopper(name, session);
    this.#ended.refuse(session);
    const { vms } = this.#context;
    const move = this.#moves.get(session) ?? this.#beginMove(vms.get(name), session, options);
    this.#moves.set(session, move);
    try {
      await this.#sayingGuestEnd(name, () => move.done);
    } catch (error) {
      this.#moves.delete(session);
      throw error;
    }
    await vms.setState(name, 'departed');
  }

  #beginMove({ process }: ManagedVm, session: string, { target, ...order }: NativeMigrateOptions) {
    const cancel = new AbortController();
    const { signal } = cancel;
    return { done: process.nativeMove({ ...order, signal, open: this.#streamTo(target, session, signal) }), cancel };
  }

  /** Callers share an attempt that is under way. */
  async nativeRecover(name: string, session: string, target: string): Promise<void> {
    this.#ended.refuse(session);
    const { process } = this.#context.vms.get(name);
    const recovery = this.#recoveries.get(session) ?? process.nativeRecover(this.#streamTo(target, session));
    this.#recoveries.set(session, recovery);
    try {
      await recovery;
    } finally {
      this.#recoveries.delete(session);
    }
  }

  /** A connection that comes after `signal` is destroyed. */
  #streamTo(target: string, session: string, signal?: AbortSignal): OpenStream {
    return async () => {
      const opening = this.#context.peers.openStream(target, session);
      const cancelled = new Promise<never>((_, reject) => {
        signal?.addEventListener('abort', () => reject(new MigrationError('CANCELLED', 'the move was cancelled')));
      });
      try {
        return await Promise.race([opening, cancelled]);
      } catch (error) {
        opening.then((stream) => stream.destroy()).catch(() => undefined);
        throw error;
      }
    };
  }

  async nativeProgress(vm: string): Promise<Readonly<Record<string, number | string>>> {
    return this.#context.vms.get(vm).process.nativeReading();
  }

  async nativeCancel(vm: string, session: string): Promise<void> {
    this.#ended.add(session);
    const { vms } = this.#context;
    const move = this.#moves.get(session);
    move?.cancel.abort(new MigrationError('CANCELLED', `the move of ${vm} was cancelled`));
    if (vms.has(vm) && !this.#isStoppedByOther(vm, session)) await vms.get(vm).process.cancelMove();
    await move?.done.catch(() => undefined);
    this.#moves.delete(session);
  }

  async digestFrozen(session: string, key: string, range: ChunkRange): Promise<FrozenDigests> {
    return this.#source(session).digest(key, range);
  }

  async sourceCounters(session: string): Promise<Readonly<Record<string, number>>> {
    return this.#sources.get(session)?.counters() ?? {};
  }

  async release(vm: string, session: string): Promise<void> {
    checkSession(session);
    const { vms, registry } = this.#context;
    await this.#locks.hold(session, async () => {
      const owner = await registry.owner(vm);
      if (owner === null || owner.owner === this.#context.host || owner.session !== session) {
        // This session has been released before. The VM has come back since, is about to, or has left again. Then
        // another session fetches the memory on this host.
        if (!this.#sources.has(session) && !this.#moves.has(session)) return;
        throw new MigrationError('CONFLICT', `${vm} has not left ${this.#context.host} by this session`);
      }
      this.#ended.add(session);
      await this.#sources.get(session)?.unexpose();
      this.#sources.delete(session);
      this.#moves.delete(session);
      this.#forgetStopper(session);
      // A VM in state `incoming` belongs to another session, which brings it back.
      if (vms.has(vm) && vms.get(vm).state !== 'incoming') await vms.destroy(vm);
    });
  }

  #source(session: string): SourceSession {
    const source = this.#sources.get(session);
    if (source !== undefined) return source;
    this.#ended.refuse(session);
    throw new MigrationError('NOT_FOUND', `no outgoing session ${session.slice(0, 32)} on ${this.#context.host}`);
  }

  /** Makes the session the last one that stops the VM, and waits for a continueVm in progress. */
  async #becomeStopper(vm: string, session: string): Promise<void> {
    this.#stoppers.set(vm, session);
    await this.#continuing.get(vm)?.catch(() => undefined);
  }

  #isStoppedByOther(vm: string, session: string): boolean {
    return (this.#stoppers.get(vm) ?? session) !== session;
  }

  #forgetStopper(session: string): void {
    for (const [vm, stopper] of this.#stoppers) if (stopper === session) this.#stoppers.delete(vm);
  }

  async #checkOwner(vm: string): Promise<void> {
    const owner = await this.#context.registry.owner(vm);
    if (owner?.owner === this.#context.host) return;
    if (owner !== null)
      throw new MigrationError('OWNER_CHANGED', `${vm} belongs to ${owner.owner} since epoch ${owner.epoch}`);
    // A VM of this host has a record. Without it the VM may belong to any host.
    throw new MigrationError('OWNER_CHANGED', `the owner record of ${vm} is missing, so it may run on another host`, {
      remedy: 'stop vmigrated, then: vmctl state repair DIR',
    });
  }
}

/** A job of QEMU on a disk, such as a backup, would go on at the source when the target writes to the same disk. */
async function refuseDiskJobs({ process, spec }: ManagedVm): Promise<void> {
  if (spec.disks.length === 0) return;
  const [job] = await process.disks.jobs();
  if (job === undefined) return;
  throw new MigrationError('VM_BUSY', `QEMU of ${spec.name} has a job on a disk: ${job}`, {
    remedy: 'wait until that job has ended, or cancel it with the program that began it',
  });
}
