/**
 * Implements TargetPort on this host and holds its incoming sessions by id. target-session.ts implements one of them.
 */
import { access } from 'node:fs/promises';
import type { Duplex, Readable } from 'node:stream';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { VmExit } from '../../domain/vm.js';
import type {
  ArrivedDigests,
  ChunkRange,
  Legacy,
  PrepareReply,
  PrepareRequest,
  SessionProgress,
  SourceEndpointInfo,
} from '../../engine/ports/session.js';
import type { FetchedAhead, TargetPort } from '../../engine/ports/target.js';
import { KeyedLocks } from '../../kit/locks.js';
import type { ArrivalView } from './arrival.js';
import type { MigrationContext } from './context.js';
import { EndedSessions } from './ended-sessions.js';
import { inheritExitCode } from './ended-vm.js';
import { type GoneSession, goneProgress } from './gone.js';
import { IncomingJobs } from './incoming-jobs.js';
import { checkSession, type TargetRecord } from './session-store.js';
import { TargetSession } from './target-session.js';

const PREPARED: PrepareReply = { nativeUri: null };

export class TargetAgent implements TargetPort {
  readonly #context: MigrationContext;
  readonly #locks = new KeyedLocks();
  readonly #targets = new Map<string, TargetSession>();
  /** The job of each session in `#targets`. */
  readonly #jobs = new Map<string, string>();
  /** The sessions whose QEMU had ended when this daemon started. */
  readonly #gone = new Map<string, GoneSession>();
  /** The jobs that bring VMs to this host, as this host sees them. */
  readonly incoming: IncomingJobs;
  /** Aborts the preparation that is in progress, by session. */
  readonly #preparing = new Map<string, { readonly source: string; readonly cancel: AbortController }>();
  readonly #ended = new EndedSessions();

  /** `recoveryMsMax`: how long nothing may arrive before an incoming job counts as one that needs recovery. */
  constructor(context: MigrationContext, recoveryMsMax?: number) {
    this.#context = context;
    this.incoming = new IncomingJobs(context, recoveryMsMax);
    context.vms.on('exit', this.#onExit);
  }

  /** Resumes a session of an earlier daemon. */
  async resumeSession(record: TargetRecord): Promise<void> {
    const { vms, store, registry } = this.#context;
    const { session, spec } = record;
    const vm = vms.has(spec.name) ? vms.get(spec.name) : null;
    // The VM's record is damaged. Its session is kept for the time when it is repaired.
    if (vm === null && vms.isTaken(spec.name)) return;
    const isOurs = vm !== null && vm.session === session;
    if (!isOurs && (record.state === 'resumed' || record.state === 'complete')) {
      // A user has removed the VM. The coordinator, which may be away, still has to hear of it.
      this.#gone.set(session, { record, hasRun: true, exit: null });
      return;
    }
    if (!isOurs || record.state === 'preparing') {
      // The QEMU of a preparation may have ended with the earlier daemon. The VM has never run, so nobody misses it.
      if (isOurs && (vm.state === 'incoming' || vm.state === 'stopped')) await vms.destroy(spec.name);
      await store.remove(record);
      return;
    }
    if (vm.state === 'stopped') {
      const owner = await registry.owner(spec.name);
      this.#gone.set(session, {
        record,
        hasRun: owner?.session === session || record.state !== 'prepared',
        exit: vms.exitOf(spec.name),
      });
      return;
    }
    this.#add(record, await TargetSession.resumeSession(this.#context, record, vm));
  }

  /** Returns what this host knows of the move that brings the VM, or null if no page of the VM is missing. */
  arrivalOf(name: string): ArrivalView | null {
    for (const target of this.#targets.values()) {
      if (target.vmName !== name) continue;
      const arrival = target.arrival();
      return arrival.state === 'complete' || arrival.state === 'gone' ? null : arrival;
    }
    return null;
  }

  /**
   * Returns the job that is still transferring pages of the VM to this host, or null. A missing page is a hole in the
   * region file, and another migration would send zeros for it. Nor may memory go on that is not proven yet. The
   * session's record may be damaged. Then the VM's presence map shows that a session has not ended, and the session's
   * id is returned.
   */
  async arriving(name: string): Promise<string | null> {
    const { vms } = this.#context;
    const { session, spec } = vms.get(name);
    if (session === null) return null;
    const target = this.#targets.get(session);
    if (target !== undefined) {
      const isHere = (await target.progress()).state === 'complete' && !target.memory.isUnproven;
      return isHere ? null : (this.#jobs.get(session) ?? session);
    }
    for (const { id } of spec.memory.regions) {
      const isThere = await access(vms.presencePath(name, id)).then(
        () => true,
        () => false,
      );
      if (isThere) return session;
    }
    return null;
  }

  /** Returns the host that the session's VM comes from, or null if this host has no such session. */
  sourceOf(session: string): string | null {
    const preparing = this.#preparing.get(session)?.source;
    if (preparing !== undefined) return preparing;
    return (this.#targets.get(session)?.arrival().request ?? this.#gone.get(session)?.record)?.source ?? null;
  }

  /** True if this host has the session, so that an incoming VM may belong to it. */
  claims(session: string | null): boolean {
    return session !== null && (this.#targets.has(session) || this.#gone.has(session));
  }

  async close(): Promise<void> {
    this.#context.vms.off('exit', this.#onExit);
    this.incoming.close();
    await Promise.all([...this.#targets.values()].map((target) => target.close()));
  }

  async prepare(request: PrepareRequest): Promise<PrepareReply> {
    const { session } = request;
    checkSession(session);
    return this.#locks.hold(session, async () => {
      this.#ended.refuse(session);
      const existing = this.#targets.get(session);
      if (existing !== undefined) return PREPARED;
      const cancel = new AbortController();
      this.#preparing.set(session, { source: request.source, cancel });
      try {
        const target = await TargetSession.prepare(this.#context, request, cancel.signal);
        this.#add(request, target);
        return PREPARED;
      } finally {
        this.#preparing.delete(session);
      }
    });
  }

  async connect(session: string, source: SourceEndpointInfo): Promise<void> {
    await this.#target(session).connect(source);
  }

  /** Loads the device state of a session, which comes from the source. Resolves when QEMU has loaded it. */
  async acceptState(session: string, stream: Readable): Promise<void> {
    let target: TargetSession;
    try {
      target = this.#target(session);
    } catch (error) {
      stream.destroy();
      throw error;
    }
    await target.acceptState(stream);
  }

  /** Connects the source's QEMU to the one that waits for its stream, or waits again after a loss. */
  async openStream(session: string): Promise<Duplex> {
    return this.#target(session).openStream();
  }

  async fetchAhead(session: string, msMax: number, holds: boolean): Promise<FetchedAhead> {
    return this.#target(session).fetchAhead(msMax, holds);
  }

  async takeBack(session: string, round: number): Promise<{ readonly pages: number }> {
    return this.#target(session).takeBack(round);
  }

  async awaitLoaded(session: string, lastRound?: number): Promise<void> {
    await this.#target(session).awaitLoaded(lastRound);
  }

  async resume(session: string, epoch: number): Promise<{ readonly resumedAtUs: number }> {
    return this.#target(session).resume(epoch);
  }

  async progress(session: string): Promise<SessionProgress> {
    const gone = this.#gone.get(session);
    if (gone === undefined) return this.#target(session).progress();
    return goneProgress({ ...gone, exit: this.#exitOf(gone.record) ?? gone.exit }, this.#context.host);
  }

  async reconnect(session: string, source: SourceEndpointInfo): Promise<void> {
    await this.#target(session).connect(source);
  }

  async inherit(session: string, legacy: Legacy): Promise<void> {
    const gone = this.#gone.get(session);
    if (gone === undefined) await this.#target(session).inherit(legacy);
    else if (this.#exitOf(gone.record) !== null) {
      await inheritExitCode(this.#context.vms, gone.record.spec.name, legacy.exitCode);
    }
  }

  async digestArrived(session: string, range: ChunkRange): Promise<ArrivedDigests> {
    if (this.#gone.has(session)) return { digests: null, reason: `the VM has ended on ${this.#context.host}` };
    const target = this.#target(session);
    if ((await target.progress()).state === 'complete') return target.memory.digest(range);
    throw new MigrationError('CONFLICT', `pages of ${target.vmName} are still missing`);
  }

  async condemn(session: string, damage: string): Promise<void> {
    await this.#target(session).memory.condemn(damage);
  }

  async finish(session: string): Promise<void> {
    await this.#locks.hold(session, async () => {
      const target = this.#targets.get(session);
      await target?.finish();
      const gone = this.#gone.get(session);
      if (gone !== undefined) await this.#context.store.remove(gone.record);
      this.#gone.delete(session);
      if (target !== undefined) this.incoming.end(target, null);
      this.#targets.delete(session);
      this.#jobs.delete(session);
      this.#ended.add(session);
    });
  }

  async discard(session: string): Promise<void> {
    checkSession(session);
    const { vms, store } = this.#context;
    const gone = this.#gone.get(session);
    if (gone?.hasRun === true || this.#targets.get(session)?.hasRun === true) {
      throw new MigrationError('CONFLICT', `session ${session} has resumed its VM and cannot be discarded`, {
        session,
      });
    }
    this.#ended.add(session);
    // The abort ends a preparation that still waits for QEMU, and prepare removes what it has made. Discard itself
    // removes nothing during a preparation: one that was just ending would keep a dead QEMU that nobody removes.
    this.#preparing.get(session)?.cancel.abort();
    await this.#locks.hold(session, async () => {
      const target = this.#targets.get(session);
      await target?.discard();
      if (target !== undefined) this.incoming.end(target, this.#undone(target));
      this.#targets.delete(session);
      this.#jobs.delete(session);
      if (gone === undefined) return;
      // A newer session may have the name by now. Undo calls are repeated until they succeed, so this one may come
      // late.
      const { name: vm } = gone.record.spec;
      if (vms.has(vm) && vms.get(vm).session === session) await vms.destroy(vm);
      await store.remove(gone.record);
      this.#gone.delete(session);
    });
  }

  /** Returns null if a newer session has the name. */
  #exitOf({ session, spec }: TargetRecord): VmExit | null {
    const { vms } = this.#context;
    return vms.has(spec.name) && vms.get(spec.name).session === session ? vms.exitOf(spec.name) : null;
  }

  #add({ session, job }: PrepareRequest, target: TargetSession): void {
    this.#targets.set(session, target);
    this.#jobs.set(session, job);
    this.incoming.begin(target);
  }

  #undone(target: TargetSession): MigrationError {
    const { request } = target.arrival();
    return new MigrationError('STEP_FAILED', `${request.source} has undone the move of ${target.vmName}`, {
      remedy: `the job's own host says why: "vmctl job ${request.job}" on ${request.source}`,
    });
  }

  #target(session: string): TargetSession {
    const target = this.#targets.get(session);
    if (target !== undefined) return target;
    this.#ended.refuse(session);
    throw new MigrationError('NOT_FOUND', `no incoming session ${session.slice(0, 32)} on ${this.#context.host}`);
  }

  readonly #onExit = (name: string, exit: VmExit): void => {
    for (const target of this.#targets.values()) {
      if (target.vmName !== name) continue;
      target.lost(exit).catch((error: unknown) => {
        this.#context.log.error(
          { vm: name, err: toMigrationError(error) },
          'the session of a VM whose QEMU has ended cannot be closed',
        );
      });
    }
  };
}
