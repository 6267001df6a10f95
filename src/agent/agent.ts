/**
 * What one host does in a migration, as AgentPort (see the rules there). Sessions are found by their id here; what they do is in
 * target-session.ts and source-session.ts.
 */
import type { Readable } from 'node:stream';
import type { HostInventory, TargetChecks, Transport, VmInventory, VmSpec } from '../domain.js';
import type { AgentPort, PrepareReply, PrepareRequest, SessionProgress, SourceEndpointInfo } from '../engine/ports.js';
import { MigrationError, toMigrationError } from '../errors.js';
import type { AgentContext } from './context.js';
import { EndedSessions } from './ended-sessions.js';
import { checkTarget, type HostInfo, hostInventory, vmInventory } from './inventory.js';
import { KeyedLocks } from './locks.js';
import { cancelMigration, type NativeMoveOptions, nativeMove, nativeReading, runAgain } from './native-migration.js';
import { checkSession, SessionStore, type SourceRecord, type TargetRecord } from './session-store.js';
import { SourceSession } from './source-session.js';
import { TargetSession } from './target-session.js';

export interface LocalAgentOptions extends Omit<AgentContext, 'store'> {
  readonly stateDir: string;
  readonly hostInfo: HostInfo;
}

export class LocalAgent implements AgentPort {
  readonly host: string;
  readonly #options: LocalAgentOptions;
  readonly #locks = new KeyedLocks();
  readonly #targets = new Map<string, TargetSession>();
  readonly #sources = new Map<string, SourceSession>();
  /** QEMU's own migrations under way or done, by session. */
  readonly #moves = new Map<string, Promise<void>>();
  /** Targets whose QEMU had ended when this daemon started. */
  readonly #gone = new Map<string, { record: TargetRecord; hasRun: boolean }>();
  /** Names of VMs being prepared, by session. */
  readonly #preparing = new Map<string, string>();
  readonly #ended = new EndedSessions();
  #context: AgentContext | null = null;

  constructor(options: LocalAgentOptions) {
    this.host = options.host;
    this.#options = options;
  }

  /** Takes the sessions of an earlier daemon up again. After VmManager.start, before any call. */
  async start(): Promise<void> {
    const context: AgentContext = { ...this.#options, store: await SessionStore.open(this.#options.stateDir) };
    this.#context = context;
    const { vms, registry, store, log, host } = context;
    vms.on('exit', this.#onExit);
    const { records, corrupt } = await store.load();
    for (const error of corrupt) log.error({ err: error }, 'a session cannot be taken up again');
    for (const record of records) {
      try {
        await (record.role === 'target' ? this.#takeUpTarget(record) : this.#takeUpSource(record));
      } catch (error) {
        log.error({ session: record.session, err: toMigrationError(error) }, 'a session cannot be taken up again');
      }
    }
    const claimed = new Set([...this.#targets.keys(), ...this.#gone.keys()]);
    for (const vm of vms.all()) {
      const { name } = vm.spec;
      const owner = await registry.owner(name);
      const isForeign = owner !== null && owner.owner !== host;
      if (vm.state === 'incoming' && !claimed.has(vm.session ?? '')) await vms.destroy(name);
      else if (isForeign && (vm.state === 'running' || vm.state === 'paused')) await vms.setState(name, 'departed');
    }
  }

  /** Sessions and QEMUs stay as they are for a next daemon. Before VmManager.close. */
  async close(): Promise<void> {
    this.#context?.vms.off('exit', this.#onExit as (...args: never[]) => void);
    for (const source of this.#sources.values()) source.close();
    await Promise.all([...this.#targets.values()].map((target) => target.close()));
  }

  inventory(): Promise<HostInventory> {
    return hostInventory(this.#ready, this.#options.hostInfo);
  }

  vmInventory(vm: string): Promise<VmInventory> {
    return vmInventory(this.#ready, vm);
  }

  checkTarget(spec: VmSpec): Promise<TargetChecks> {
    return checkTarget(spec);
  }

  // ---- target ---------------------------------------------------------------------------------------------------------------------------

  prepare(request: PrepareRequest): Promise<PrepareReply> {
    const { session, spec } = request;
    checkSession(session);
    return this.#locks.hold(session, async () => {
      this.#ended.refuse(session);
      const existing = this.#targets.get(session);
      if (existing !== undefined) return existing.reply;
      this.#preparing.set(session, spec.name);
      try {
        const target = await TargetSession.prepare(this.#ready, request);
        this.#targets.set(session, target);
        return target.reply;
      } finally {
        this.#preparing.delete(session);
      }
    });
  }

  connect(session: string, source: SourceEndpointInfo): Promise<void> {
    return this.#target(session).connect(source);
  }

  /** The device state of a session, from the source. Resolves when QEMU has loaded it. */
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

  async awaitLoaded(session: string): Promise<void> {
    await this.#target(session).awaitLoaded();
  }

  resume(session: string, epoch: number): Promise<{ readonly resumedAtUs: number }> {
    return this.#target(session).resume(epoch);
  }

  async progress(session: string): Promise<SessionProgress> {
    const gone = this.#gone.get(session);
    return gone === undefined ? this.#target(session).progress() : goneProgress(gone);
  }

  reconnect(session: string, source: SourceEndpointInfo): Promise<void> {
    return this.#target(session).connect(source);
  }

  finish(session: string): Promise<void> {
    return this.#locks.hold(session, async () => {
      const target = this.#targets.get(session);
      await target?.finish();
      this.#targets.delete(session);
      this.#ended.add(session);
    });
  }

  async discard(session: string): Promise<void> {
    checkSession(session);
    const { vms, store } = this.#ready;
    const gone = this.#gone.get(session);
    if (gone?.hasRun === true || this.#targets.get(session)?.hasRun === true) {
      throw new MigrationError('CONFLICT', 'the VM has been resumed: it is not taken away any more', { session });
    }
    this.#ended.add(session);
    // A QEMU that does not come up is not waited for: the start is given up, and prepare cleans up behind itself.
    const name = this.#preparing.get(session);
    if (name !== undefined && vms.has(name) && vms.get(name).session === session) await vms.destroy(name);
    await this.#locks.hold(session, async () => {
      await this.#targets.get(session)?.discard();
      this.#targets.delete(session);
      if (gone === undefined) return;
      await vms.destroy(gone.record.spec.name);
      await store.remove(gone.record);
      this.#gone.delete(session);
    });
  }

  // ---- source ---------------------------------------------------------------------------------------------------------------------------

  reserve(vm: string, job: string): Promise<void> {
    return this.#ready.vms.reserve(vm, job);
  }

  unreserve(vm: string, job: string): Promise<void> {
    return this.#ready.vms.unreserve(vm, job);
  }

  expose(request: {
    session: string;
    vm: string;
    token: string;
    transport: Transport;
    target: string;
  }): Promise<SourceEndpointInfo> {
    const { session, vm: name } = request;
    checkSession(session);
    return this.#locks.hold(session, async () => {
      this.#ended.refuse(session);
      const existing = this.#sources.get(session);
      if (existing !== undefined) return existing.endpoint;
      const vm = this.#ready.vms.get(name);
      await this.#mustOwn(name);
      if (vm.state !== 'running') throw new MigrationError('CONFLICT', `${name} is ${vm.state}`);
      const source = await SourceSession.expose(this.#ready, { ...request, version: 1, role: 'source' }, vm);
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
    });
  }

  stop(_vm: string, session: string): Promise<{ readonly stoppedAtUs: number; readonly stoppedForMs: number }> {
    return this.#source(session).stop();
  }

  /** Nothing to do for a VM that is not here or runs. */
  async continueVm(vm: string, session: string): Promise<void> {
    const { vms } = this.#ready;
    if (!vms.has(vm)) return;
    await this.#mustOwn(vm);
    this.#sources.get(session)?.thaw();
    const managed = vms.get(vm);
    try {
      await runAgain(managed.qmp);
    } catch (error) {
      // Nobody else has it, and it cannot run here: what is left of it may go.
      if (toMigrationError(error).code === 'QEMU_GONE' && managed.state === 'departed')
        await vms.setState(vm, 'stopped');
      throw error;
    }
    await vms.setState(vm, 'running');
  }

  transferState(_vm: string, session: string, target: string): Promise<{ readonly deviceStateBytes: number }> {
    return this.#source(session).transferState(target);
  }

  async nativeMigrate(name: string, session: string, options: NativeMoveOptions): Promise<void> {
    await this.#mustOwn(name);
    this.#ended.refuse(session);
    const { vms } = this.#ready;
    const move = this.#moves.get(session) ?? nativeMove(vms.get(name), options);
    this.#moves.set(session, move);
    try {
      await move;
    } catch (error) {
      this.#moves.delete(session);
      throw error;
    }
    await vms.setState(name, 'departed');
  }

  nativeProgress(vm: string): Promise<Readonly<Record<string, number | string>>> {
    return nativeReading(this.#ready.vms.get(vm));
  }

  async nativeCancel(vm: string, session: string): Promise<void> {
    this.#ended.add(session);
    const { vms } = this.#ready;
    if (vms.has(vm)) await cancelMigration(vms.get(vm).qmp);
    await this.#moves.get(session)?.catch(() => undefined);
    this.#moves.delete(session);
  }

  async sourceCounters(session: string): Promise<Readonly<Record<string, number>>> {
    return this.#sources.get(session)?.counters() ?? {};
  }

  async release(vm: string, session: string): Promise<void> {
    checkSession(session);
    const { vms, registry } = this.#ready;
    await this.#locks.hold(session, async () => {
      const owner = await registry.owner(vm);
      if (owner === null || owner.owner === this.host) {
        // Released before, and it has come back since or is about to.
        if (!this.#sources.has(session) && !this.#moves.has(session)) return;
        throw new MigrationError('CONFLICT', `${vm} belongs to ${this.host}`);
      }
      this.#ended.add(session);
      await this.#sources.get(session)?.unexpose();
      this.#sources.delete(session);
      this.#moves.delete(session);
      // One that is incoming is another session's: the VM is on its way back.
      if (vms.has(vm) && vms.get(vm).state !== 'incoming') await vms.destroy(vm);
    });
  }

  // ---------------------------------------------------------------------------------------------------------------------------------------

  get #ready(): AgentContext {
    if (this.#context === null) throw new MigrationError('INTERNAL', 'the agent has not been started');
    return this.#context;
  }

  #target(session: string): TargetSession {
    const target = this.#targets.get(session);
    if (target !== undefined) return target;
    this.#ended.refuse(session);
    throw new MigrationError('NOT_FOUND', `no arriving session ${session.slice(0, 32)} on ${this.host}`);
  }

  #source(session: string): SourceSession {
    const source = this.#sources.get(session);
    if (source !== undefined) return source;
    this.#ended.refuse(session);
    throw new MigrationError('NOT_FOUND', `no leaving session ${session.slice(0, 32)} on ${this.host}`);
  }

  async #mustOwn(vm: string): Promise<void> {
    const owner = await this.#ready.registry.owner(vm);
    if (owner !== null && owner.owner !== this.host) {
      throw new MigrationError('OWNER_CHANGED', `${vm} belongs to ${owner.owner} since epoch ${owner.epoch}`);
    }
  }

  readonly #onExit = (name: string): void => {
    for (const target of this.#targets.values()) {
      if (target.vmName !== name) continue;
      target.lost().catch((error: unknown) => {
        this.#ready.log.error({ vm: name, err: toMigrationError(error) }, 'the session of a dead QEMU does not close');
      });
    }
  };

  async #takeUpTarget(record: TargetRecord): Promise<void> {
    const { vms, store, registry } = this.#ready;
    const { session, spec } = record;
    const vm = vms.has(spec.name) ? vms.get(spec.name) : null;
    const isOurs = vm !== null && vm.session === session;
    if (!isOurs || record.state === 'preparing') {
      if (isOurs && vm.state === 'incoming') await vms.destroy(spec.name);
      await store.remove(record);
      return;
    }
    if (vm.state === 'stopped') {
      const owner = await registry.owner(spec.name);
      this.#gone.set(session, { record, hasRun: owner?.session === session });
      return;
    }
    this.#targets.set(session, await TargetSession.takeUp(this.#ready, record, vm));
  }

  async #takeUpSource(record: SourceRecord): Promise<void> {
    const { vms, store, registry, host } = this.#ready;
    if (!vms.has(record.vm)) {
      await store.remove(record);
      return;
    }
    const owner = await registry.owner(record.vm);
    const hasDeparted = owner !== null && owner.owner !== host;
    const source = SourceSession.takeUp(this.#ready, record, vms.get(record.vm), hasDeparted);
    this.#sources.set(record.session, source);
  }
}

function goneProgress({ record, hasRun }: { record: TargetRecord; hasRun: boolean }): SessionProgress {
  const { name, memory } = record.spec;
  return {
    state: 'gone',
    hasRun,
    error: new MigrationError('QEMU_GONE', `the QEMU of ${name} has ended`).toJSON(),
    pagesTotal: memory.sizeBytes / memory.pageBytes,
    pagesPresent: 0,
    pageBytes: memory.pageBytes,
    counters: {},
  };
}
