/**
 * An incoming VM, from the start of an empty QEMU to the arrival of the last page.
 *
 *   prepared ── connect, acceptState ──► loaded ── resume (owner record, then `cont`) ──► filling ──► complete
 *
 * The owner record in the registry divides the life of a session. Before it names this host, the guest has never run
 * and `discard` removes everything. After it, the VM belongs to this host and only waits for pages.
 */

import type { Duplex, Readable } from 'node:stream';
import type { StateImport } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { MODE_TRAITS, tracksWrites } from '../../domain/migration.js';
import type { VmExit } from '../../domain/vm.js';
import type {
  Legacy,
  PrepareRequest,
  SessionProgress,
  SessionState,
  SourceEndpointInfo,
} from '../../engine/ports/session.js';
import type { FetchedAhead } from '../../engine/ports/target.js';
import { failureToError } from '../../native/failure.js';
import { refuseSpecOfPeer } from '../policy/policy.js';
import type { ManagedVm } from '../vm/vms.js';
import { Arrival, type ArrivalView, pagesOf } from './arrival.js';
import { ArrivedMemory } from './arrived-memory.js';
import type { MigrationContext } from './context.js';
import { endedOf, inheritExitCode } from './ended-vm.js';
import { goneError } from './gone.js';
import { Loading } from './loading.js';
import { withOwnMemory } from './own-memory.js';
import { ownerAfterRestart, refuseOtherEpoch, refuseOtherStart, takeOwnership } from './ownership.js';
import { PageSession } from './page-session.js';
import type { TargetRecord } from './session-store.js';

export class TargetSession {
  readonly #context: MigrationContext;
  readonly #vm: ManagedVm;
  readonly #state: StateImport;
  readonly #pages: PageSession | null;
  readonly #loading: Loading;
  #record: TargetRecord;
  /** True if the owner record names this host and this session. */
  #hasRun = false;
  #resuming: Promise<{ resumedAtUs: number }> | null = null;
  #gone: MigrationError | null = null;
  #isOver = false;
  /** The VM's epoch in this host's registry before the move. It is read in advance to keep it out of the blackout. */
  readonly #epochBefore: number | null;
  readonly #arrival: Arrival;
  readonly memory: ArrivedMemory;

  private constructor(
    context: MigrationContext,
    record: TargetRecord,
    vm: ManagedVm,
    before: { epoch: number | null; isResume: boolean },
  ) {
    this.#context = context;
    this.#record = record;
    this.#vm = vm;
    this.#epochBefore = before.epoch;
    this.memory = new ArrivedMemory(context, vm, record.memoryKey);
    this.#arrival = new Arrival(record, context.clock, record);
    this.#state = vm.process.importState(record.mode, before.isResume);
    this.#pages =
      MODE_TRAITS[record.mode].mover === 'pager' && record.state !== 'complete'
        ? new PageSession(context, vm, {
            session: record.session,
            token: record.token,
            bandwidthBytesPerS: record.bandwidthBytesPerS,
            isResume: before.isResume,
            isAhead: tracksWrites(record.mode),
            ...this.memory.tags,
            onComplete: () => this.#completed(),
          })
        : null;
    this.#loading = new Loading(vm, this.#state, this.#pages, record.mode);
  }

  /** `signal` cancels it. If it rejects, it has removed everything it had made. */
  static async prepare(
    context: MigrationContext,
    request: PrepareRequest,
    signal: AbortSignal,
  ): Promise<TargetSession> {
    const { store, vms, registry } = context;
    const { session, accel } = request;
    const isNative = MODE_TRAITS[request.mode].mover === 'backend';
    const spec = withOwnMemory(request.spec);
    await refuseSpecOfPeer(context, spec, request.source);
    if (vms.has(spec.name) && vms.get(spec.name).state !== 'stopped') {
      throw new MigrationError('CONFLICT', `VM ${spec.name} already exists on ${context.host}`);
    }
    const owner = await registry.owner(spec.name);
    refuseOtherStart(owner, request, context.host);
    const before = owner?.epoch ?? null;
    let record: TargetRecord = {
      ...request,
      spec,
      version: 1,
      role: 'target',
      state: 'preparing',
      nativeUri: null,
      endpoint: null,
      preparedAt: context.clock.isoNow(),
    };
    await store.save(record);
    let target: TargetSession | null = null;
    try {
      const vm = await vms.prepareIncoming(spec, { session, accel, epoch: request.epoch + 1, isNative, signal });
      target = new TargetSession(context, record, vm, { epoch: before, isResume: false });
      await target.#state.listen();
      await context.inject.hit('agent:prepared');
      if (signal.aborted)
        throw new MigrationError('CANCELLED', `session ${session} was discarded while it was prepared`);
      record = { ...record, state: 'prepared' };
      target.#record = record;
      await store.save(record);
      return target;
    } catch (error) {
      await target?.close();
      if (vms.has(spec.name) && vms.get(spec.name).session === session) await vms.destroy(spec.name);
      await store.remove(record);
      throw error;
    }
  }

  /**
   * Resumes a session after a restart of the daemon. The registry decides whether the VM has run. If it is older than
   * the session's record, which says so, it is put right.
   */
  static async resumeSession(context: MigrationContext, record: TargetRecord, vm: ManagedVm): Promise<TargetSession> {
    const owner = await ownerAfterRestart(context.registry, context.host, record);
    const target = new TargetSession(context, record, vm, { epoch: owner?.epoch ?? null, isResume: true });
    target.#hasRun = owner?.owner === context.host && owner.session === record.session;
    if (record.endpoint !== null && target.#pages !== null) {
      target.#pages.connect(record.endpoint).catch((error: unknown) => {
        context.log.warn({ session: record.session, err: error }, 'the source cannot be reached yet');
      });
    }
    if (target.#hasRun) {
      // The earlier daemon may have ended before it could note the time, or was of an earlier build.
      if (record.resumedAt === undefined) target.#inBackground('session record', target.#noteRun(record.state));
      target.#pages?.start();
      if (vm.state === 'incoming') await context.vms.setState(vm.spec.name, 'running', { epoch: owner?.epoch ?? 0 });
    }
    return target;
  }

  get vmName(): string {
    return this.#vm.spec.name;
  }

  get hasRun(): boolean {
    return this.#hasRun;
  }

  async connect(endpoint: SourceEndpointInfo): Promise<void> {
    this.#refuseIfEnded();
    if (this.#pages === null) {
      if (MODE_TRAITS[this.#record.mode].mover === 'pager') return;
      throw new MigrationError('CONFLICT', 'a native migration has no page session to connect');
    }
    if (endpoint.keys.length !== this.#vm.regions.length) {
      const counts = `${endpoint.keys.length} memory regions, this host ${this.#vm.regions.length}`;
      throw new MigrationError('PEER_PROTOCOL', `the source of ${this.vmName} has ${counts}`);
    }
    await this.#pages.connect(endpoint);
    this.#record = { ...this.#record, endpoint };
    await this.#context.store.save(this.#record);
  }

  /** Passes the device state to QEMU. Resolves when QEMU has loaded all of it. The VM does not run yet. */
  async acceptState(body: Readable): Promise<void> {
    const beganAtMs = performance.now();
    await this.#loading.accept(body);
    const ms = performance.now() - beganAtMs;
    this.#context.log.debug({ session: this.#record.session, ms }, 'device state loaded');
  }

  /** Resolves with the connection to the QEMU that waits for QEMU's own migration. Once the VM runs, it waits again. */
  async openStream(): Promise<Duplex> {
    this.#refuseIfEnded();
    return this.#hasRun ? this.#state.reopenStream() : this.#state.openStream();
  }

  async fetchAhead(msMax: number, holds: boolean): Promise<FetchedAhead> {
    this.#refuseIfEnded();
    return this.#loading.fetchAhead(msMax, holds);
  }

  async takeBack(round: number): Promise<{ pages: number }> {
    this.#refuseIfEnded();
    return this.#loading.takeBack(round);
  }

  async awaitLoaded(lastRound?: number): Promise<void> {
    if (!this.#state.isLoaded) this.#refuseIfEnded();
    await this.#loading.awaitLoaded(lastRound);
  }

  async resume(epoch: number): Promise<{ resumedAtUs: number }> {
    refuseOtherEpoch(this.#record, epoch);
    this.#resuming ??= this.#resumeOnce(epoch).catch((error: unknown) => {
      this.#resuming = null;
      throw error;
    });
    return this.#resuming;
  }

  async progress(): Promise<SessionProgress> {
    const state = await this.#sessionState();
    const { pagesTotal, pagesPresent, counters, error } = this.#read(state);
    const { pageBytes } = this.#vm.spec.memory;
    return {
      state,
      hasRun: this.#hasRun,
      error: error?.toJSON() ?? null,
      pagesTotal,
      pagesPresent,
      pageBytes,
      counters,
      ...(this.#gone === null || this.#isReplaced ? {} : endedOf(this.#context.vms.exitOf(this.vmName))),
    };
  }

  /** What this host knows of the move, without asking anybody. */
  arrival(): ArrivalView {
    const state = this.#knownState();
    const { counters, ...read } = this.#read(state);
    const { demandBytes = 0, prefetchBytes = 0, pushBytes = 0, faultCount = 0 } = counters;
    return this.#arrival.view({
      ...read,
      ...{ state, faultCount, hasRun: this.#hasRun, bytesDone: demandBytes + prefetchBytes + pushBytes },
    });
  }

  /** Asks QEMU whether its own post-copy has ended, which nobody else would notice while the coordinator is away. */
  async refresh(): Promise<void> {
    if (this.#pages === null) await this.#sessionState();
  }

  /** Connects to the source again at once, if the connection is lost. */
  hurry(): void {
    this.#pages?.hurry();
  }

  #read(state: SessionState | null) {
    const { failure, ...pages } = pagesOf(this.#pages?.snapshot ?? null, this.#vm.spec, state === 'complete');
    return { ...pages, error: this.#gone ?? (failure === null ? null : failureToError(failure, 'fetching pages')) };
  }

  /** Records the exit code that the guest had written before it moved. Durable when it resolves. */
  async inherit({ exitCode }: Legacy): Promise<void> {
    if (!this.#isReplaced) await inheritExitCode(this.#context.vms, this.vmName, exitCode);
  }

  /** Removes the session and keeps the VM, or what is left of one whose QEMU has ended. */
  async finish(): Promise<void> {
    const state = await this.#sessionState();
    if (state !== 'complete' && state !== 'gone') {
      throw new MigrationError('CONFLICT', `pages of ${this.vmName} are still missing`);
    }
    await this.close();
    if (!this.#isReplaced) await this.memory.removeFiles();
    await this.#context.store.remove(this.#record);
  }

  /** Throws CONFLICT if the VM has been resumed. */
  async discard(): Promise<void> {
    await this.#resuming?.catch(() => undefined);
    if (this.#hasRun) {
      throw new MigrationError('CONFLICT', `${this.vmName} has been resumed, so its session cannot be discarded`);
    }
    await this.close();
    const { vms, store } = this.#context;
    if (!this.#isReplaced) await vms.destroy(this.vmName);
    await store.remove(this.#record);
  }

  /** Called when QEMU has ended. The coordinator learns from the error how. */
  async lost(exit: VmExit): Promise<void> {
    this.#gone ??= goneError(this.vmName, this.#context.host, exit);
    this.#loading.end(this.#gone);
    await this.#pages?.close();
  }

  /** Closes the session's connections. Files and QEMU stay. */
  async close(): Promise<void> {
    this.#isOver = true;
    this.#loading.end(new MigrationError('CANCELLED', `session ${this.#record.session} has ended`));
    await this.#pages?.close();
  }

  /** The part up to RESUME is within the blackout. */
  async #resumeOnce(epoch: number): Promise<{ resumedAtUs: number }> {
    this.#refuseIfEnded();
    // An earlier life of the daemon has resumed the VM already.
    if (this.#hasRun && this.#record.state !== 'prepared') return { resumedAtUs: Date.now() * 1000 };
    await this.#state.attach();
    // The check that the VM can run comes before this host takes the ownership.
    const run = this.#state.readyToRun();
    const calledAtMs = performance.now();
    await this.#takeOwnership(epoch);
    const ownedAtMs = performance.now();
    await this.#context.inject.hit('agent:resume');
    this.#pages?.serveDemand();
    const resumedAtUs = await run();
    // The prefetch starts only now, because it would take the processor from QEMUs that load and resume.
    this.#pages?.start();
    const parts = { ownMs: ownedAtMs - calledAtMs, contMs: performance.now() - ownedAtMs };
    this.#context.log.debug({ session: this.#record.session, ...parts }, 'resumed');
    this.#afterResume(epoch);
    return { resumedAtUs };
  }

  async #takeOwnership(epoch: number): Promise<void> {
    if (this.#hasRun) return;
    const { registry, host } = this.#context;
    const { session, incarnation } = this.#record;
    const next = { vm: this.vmName, owner: host, epoch, session };
    await takeOwnership(registry, incarnation === undefined ? next : { ...next, incarnation }, this.#epochBefore);
    this.#hasRun = true;
  }

  #afterResume(epoch: number): void {
    const { mover, fetches } = MODE_TRAITS[this.#record.mode];
    const isAllHere = mover === 'backend' && !fetches;
    const state = this.#record.state === 'complete' || isAllHere ? 'complete' : 'resumed';
    this.#inBackground('session record', this.#noteRun(state));
    this.#inBackground('VM record', this.#context.vms.setState(this.vmName, 'running', { epoch }));
    this.#inBackground('announcement', this.#vm.process.announce());
  }

  #inBackground(what: string, done: Promise<unknown>): void {
    const { session } = this.#record;
    done.catch((error: unknown) => {
      this.#context.log.warn({ session, err: toMigrationError(error) }, `${what} failed after resume`);
    });
  }

  /** Records since when the VM runs here. Durable when it resolves. */
  #noteRun(state: TargetRecord['state']): Promise<void> {
    this.#record = { ...this.#record, state, resumedAt: this.#arrival.began() };
    return this.#context.store.save(this.#record);
  }

  #completed(): void {
    const { store, log } = this.#context;
    const { session } = this.#record;
    this.#record = { ...this.#record, state: 'complete' };
    const ending = this.#pages?.close() ?? Promise.resolve();
    Promise.all([ending, store.save(this.#record)]).catch((error: unknown) => {
      const err = toMigrationError(error);
      log.error({ session, err }, `the end of the session of ${this.vmName} cannot be recorded`);
    });
  }

  async #sessionState(): Promise<SessionState> {
    return this.#knownState() ?? this.#nativeState();
  }

  /** Null: only QEMU knows. */
  #knownState(): SessionState | null {
    if (this.#record.state === 'complete') return 'complete';
    if (this.#gone !== null) return 'gone';
    if (this.#pages === null) return null;
    const { state } = this.#pages.snapshot;
    if (state === 'complete' || state === 'failed' || state === 'disconnected' || state === 'filling') return state;
    // After a restart of the daemon, faults wait until the coordinator connects the session again.
    if (this.#hasRun) return 'disconnected';
    if (this.#state.isLoaded) return 'loaded';
    return this.#pages.isConnected ? 'connected' : 'prepared';
  }

  async #nativeState(): Promise<SessionState> {
    if (!this.#hasRun) return this.#state.isLoaded ? 'loaded' : 'prepared';
    const arrival = await this.#state.nativeArrival();
    if (arrival === 'complete') this.#completed();
    return arrival;
  }

  /**
   * True if a newer session has the name. A QEMU that has ended frees its name, and calls of the coordinator may come
   * late.
   */
  get #isReplaced(): boolean {
    const { vms } = this.#context;
    return !vms.has(this.vmName) || vms.get(this.vmName).session !== this.#record.session;
  }

  #refuseIfEnded(): void {
    if (this.#gone !== null) throw this.#gone;
    if (this.#isOver) throw new MigrationError('CONFLICT', `session ${this.#record.session} has ended`);
  }
}
