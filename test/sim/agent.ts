/** One host's agent in the simulation: keeps the rules of ports.ts, forgets what a real daemon forgets when it dies. */

import { type ErrorCode, MigrationError } from '../../src/domain/errors.js';
import type { HostInventory, TargetChecks, VmInventory } from '../../src/domain/host.js';
import type { VmSpec } from '../../src/domain/vm.js';
import type { AgentPort } from '../../src/engine/ports/agent.js';
import type { Registry } from '../../src/engine/ports/registry.js';
import type {
  PrepareReply,
  PrepareRequest,
  SessionProgress,
  SourceEndpointInfo,
} from '../../src/engine/ports/session.js';
import { NO_RDMA } from '../unit/planner/planner-facts.js';
import { moveNatively, PAGE_MS } from './native.js';
import { type Life, NEVER } from './time.js';
import { type HostState, PAGES, type Qemu, type VmRecord, type World } from './world.js';

/** Time that QEMU or the disk takes. */
const WORK_MS = 2;

interface Exposure {
  readonly key: string;
  readonly vm: string;
}

export class SimAgent implements AgentPort {
  readonly #world: World;
  readonly #state: HostState;
  readonly #life: Life;
  readonly #registry: Registry;
  /** Agent of the other host, if its daemon lives and the network is up. */
  readonly #peer: () => SimAgent | null;
  readonly #exposures = new Map<string, Exposure>();
  /** Sessions that fetch, with the key they connected with. */
  readonly #connections = new Map<string, string>();
  /** Sessions, and VM/job pairs, that are over: nothing that arrives late brings them back. */
  readonly #closed = new Set<string>();
  #keyCount = 0;

  constructor(world: World, state: HostState, life: Life, registry: Registry, peer: () => SimAgent | null) {
    this.#world = world;
    this.#state = state;
    this.#life = life;
    this.#registry = registry;
    this.#peer = peer;
  }

  get host(): string {
    return this.#state.name;
  }

  get exposureCount(): number {
    return this.#exposures.size;
  }

  async inventory(): Promise<HostInventory> {
    return {
      host: this.host,
      machineId: this.host,
      protocolVersion: 1,
      qemuVersion: '7.2.22',
      machines: ['pc-q35-7.2'],
      isKvmUsable: false,
      isUserfaultfdPermitted: true,
      hasMinorFaults: true,
      isPreloadPresent: true,
      memoryAvailableBytes: 2 ** 34,
      ramFileFreeBytes: 2 ** 34,
      hugePagesFree: {},
      dataAddress: '10.0.0.1',
      rdma: NO_RDMA,
      vmNames: [...this.#state.vms.keys()],
      bridges: [],
      certificateExpiresAt: null,
      clockMs: 0,
    };
  }

  async vmInventory(vm: string): Promise<VmInventory> {
    const record = this.#vm(vm);
    return {
      spec: record.spec,
      state: record.qemu?.isAlive === true && record.qemu.state === 'running' ? 'running' : 'paused',
      epoch: record.epoch,
      owner: (await this.#registry.owner(vm))?.owner ?? '',
      job: record.job,
      qemuVersion: '7.2.22',
      accel: 'tcg',
      ...{ isRamShared: true, isRamNamedFile: true },
      migrationBlockers: [],
      ramAllocatedBytes: record.spec.memory.sizeBytes,
      discardingDevices: [],
      ...{ image: null, identityIssue: null, fleetingDisks: [], exitCode: null },
    };
  }

  async checkTarget(_spec: VmSpec): Promise<TargetChecks> {
    return { disks: [], files: [], rdma: null };
  }

  // ---- target

  async prepare(request: PrepareRequest): Promise<PrepareReply> {
    const { session } = request;
    const vm = request.spec.name;
    this.#refuseClosed(session);
    const known = this.#state.sessions.get(session);
    if (known === undefined) {
      if (this.#state.vms.has(vm)) throw failure('CONFLICT', `${vm} is here already`);
      this.#state.sessions.set(session, { session, vm, hasRun: false });
      this.#state.vms.set(vm, {
        spec: request.spec,
        job: request.job,
        memory: null,
        qemu: null,
        epoch: request.epoch,
        loadedVersion: 0,
      });
    }
    await this.#work('prepare: session noted');
    this.#refuseClosed(session);
    const record = this.#vm(vm);
    record.memory ??= { pages: Array.from({ length: PAGES }, () => null) };
    await this.#work('prepare: region files made');
    this.#refuseClosed(session);
    record.qemu ??= { isAlive: true, state: 'incoming', version: 0 };
    await this.#work('prepare: QEMU started');
    this.#refuseClosed(session);
    return { nativeUri: request.mode === 'postcopy' ? null : 'tcp:sim' };
  }

  async connect(session: string, source: SourceEndpointInfo): Promise<void> {
    this.#refuseClosed(session);
    this.#session(session);
    const key = source.keys[0]?.ram ?? '';
    if (this.#peer()?.accepts(session, key) !== true) throw failure('DISCONNECTED', 'nobody listens');
    await this.#work('connect');
    this.#refuseClosed(session);
    this.#connections.set(session, key);
  }

  async awaitLoaded(session: string): Promise<void> {
    for (;;) {
      const { qemu } = this.#vm(this.#session(session).vm);
      if (qemu?.isAlive !== true) throw failure('QEMU_FAILED', 'QEMU has ended while loading');
      if (qemu.state !== 'incoming') return;
      await this.#life.sleep(1);
    }
  }

  async resume(session: string, epoch: number): Promise<{ resumedAtUs: number }> {
    const noted = this.#session(session);
    const record = this.#vm(noted.vm);
    const { qemu } = record;
    if (qemu?.isAlive !== true) throw failure('QEMU_GONE', 'QEMU has ended');
    if (qemu.state === 'incoming') throw failure('CONFLICT', 'nothing is loaded');
    const present = await this.#registry.owner(noted.vm);
    if (present === null || present.epoch < epoch) {
      const next = { vm: noted.vm, owner: this.host, epoch, session };
      await this.#registry.swapOwner(noted.vm, present?.epoch ?? null, next);
    } else if (present.session !== session) {
      throw failure('OWNER_CHANGED', 'a newer epoch is known here');
    }
    await this.#work('resume: ownership noted');
    if (!qemu.isAlive) throw failure('QEMU_GONE', 'QEMU has ended');
    noted.hasRun = true;
    record.epoch = epoch;
    if (qemu.state === 'loaded') qemu.state = 'running';
    this.#world.event('resume: runs');
    await this.#life.survive();
    void this.#fetch(session, record);
    return { resumedAtUs: 0 };
  }

  async progress(session: string): Promise<SessionProgress> {
    const noted = this.#session(session);
    const { qemu, memory } = this.#vm(noted.vm);
    const pagesPresent = memory?.pages.filter((page) => page !== null).length ?? 0;
    const filling = this.#connections.has(session) ? 'filling' : 'disconnected';
    const state =
      qemu?.isAlive !== true
        ? 'gone'
        : pagesPresent === PAGES
          ? 'complete'
          : noted.hasRun
            ? filling
            : qemu.state === 'loaded'
              ? 'loaded'
              : 'prepared';
    return { state, hasRun: noted.hasRun, error: null, pagesTotal: PAGES, pagesPresent, pageBytes: 4096, counters: {} };
  }

  async reconnect(session: string, source: SourceEndpointInfo): Promise<void> {
    await this.connect(session, source);
    const noted = this.#session(session);
    if (noted.hasRun) void this.#fetch(session, this.#vm(noted.vm));
  }

  async inherit(): Promise<void> {}

  async finish(session: string): Promise<void> {
    const { vm } = this.#session(session);
    const record = this.#vm(vm);
    if (record.memory?.pages.includes(null)) throw failure('CONFLICT', 'pages are missing');
    this.#connections.delete(session);
    this.#state.sessions.delete(session);
    record.job = null;
    await this.#work('finish');
  }

  async discard(session: string): Promise<void> {
    const noted = this.#state.sessions.get(session);
    if (noted?.hasRun === true) throw failure('CONFLICT', 'the VM runs here');
    this.#closed.add(session);
    this.#connections.delete(session);
    if (noted === undefined) return;
    const record = this.#state.vms.get(noted.vm);
    if (record?.qemu) record.qemu.isAlive = false;
    await this.#work('discard: QEMU ended');
    this.#state.vms.delete(noted.vm);
    await this.#work('discard: files removed');
    this.#state.sessions.delete(session);
  }

  // ---- source

  async reserve(vm: string, job: string): Promise<void> {
    this.#refuseClosed(`${vm}/${job}`);
    const record = this.#vm(vm);
    if (record.job !== null && record.job !== job) throw failure('VM_BUSY', record.job);
    record.job = job;
    await this.#work('reserve');
  }

  async unreserve(vm: string, job: string): Promise<void> {
    this.#closed.add(`${vm}/${job}`);
    const record = this.#state.vms.get(vm);
    if (record?.job === job) record.job = null;
    await this.#work('unreserve');
  }

  async expose({ session, vm }: { session: string; vm: string }): Promise<SourceEndpointInfo> {
    this.#refuseClosed(session);
    this.#vm(vm);
    const known = this.#exposures.get(session) ?? { key: `${++this.#keyCount}`, vm };
    this.#exposures.set(session, known);
    await this.#work('expose');
    return { transport: 'tcp', host: '10.0.0.1', port: 1, keys: [{ ram: known.key, dataMap: known.key }] };
  }

  async unexpose(session: string): Promise<void> {
    this.#closed.add(session);
    this.#exposures.delete(session);
    await this.#work('unexpose');
  }

  async stop(vm: string, session: string): Promise<{ stoppedAtUs: number; stoppedForMs: number }> {
    this.#refuseClosed(session);
    const qemu = this.#living(vm);
    if (qemu.state === 'running') qemu.state = 'paused';
    await this.#work('stop: stopped');
    return { stoppedAtUs: 0, stoppedForMs: 0 };
  }

  async continueVm(vm: string, _session: string): Promise<void> {
    const owner = await this.#registry.owner(vm);
    if (owner?.owner !== this.host) throw failure('OWNER_CHANGED', `${vm} belongs to ${owner?.owner}`);
    const qemu = this.#living(vm);
    qemu.state = 'running';
    await this.#work('continue: runs');
  }

  async transferState(vm: string, session: string, _target: string): Promise<{ deviceStateBytes: number }> {
    const qemu = this.#living(vm);
    if (qemu.state !== 'paused') throw failure('CONFLICT', 'the VM runs');
    await this.#work('transfer: saved');
    const peer = this.#peer();
    if (peer === null) throw failure('UNREACHABLE', 'the target does not take the state');
    peer.load(session, qemu.version);
    await this.#work('transfer: loaded');
    return { deviceStateBytes: 1000 };
  }

  async nativeMigrate(vm: string, session: string): Promise<void> {
    const moving = moveNatively(this.#world, this.#state, vm, session);
    while (moving.outcome === null) await this.#life.sleep(1);
    if (moving.outcome === 'failed') throw failure('QEMU_FAILED', 'migration failed');
  }

  async nativeProgress(): Promise<Record<string, number | string>> {
    return { status: 'completed', downtimeMs: 3 };
  }

  async nativeCancel(vm: string, session: string): Promise<void> {
    this.#vm(vm);
    this.#world.nativeCancelled.add(session);
    await this.#work('native cancel');
  }

  async sourceCounters(session: string): Promise<Record<string, number>> {
    if (!this.#exposures.has(session)) throw failure('NOT_FOUND', 'no such session');
    return { cpuNs: 1 };
  }

  async release(vm: string, session: string): Promise<void> {
    this.#closed.add(session);
    this.#exposures.delete(session);
    const record = this.#state.vms.get(vm);
    const owner = await this.#registry.owner(vm);
    if (record === undefined || owner?.session !== session) return;
    if (record.qemu) record.qemu.isAlive = false;
    await this.#work('release: QEMU ended');
    this.#state.vms.delete(vm);
    await this.#work('release: files removed');
  }

  // ---- data plane

  accepts(session: string, key: string): boolean {
    return this.#exposures.get(session)?.key === key;
  }

  /** The source's device state arrives. */
  load(session: string, version: number): void {
    const record = this.#vm(this.#session(session).vm);
    const { qemu } = record;
    if (qemu?.isAlive !== true) throw failure('QEMU_FAILED', 'QEMU has ended');
    if (qemu.state !== 'incoming') return;
    qemu.state = 'loaded';
    qemu.version = version;
    record.loadedVersion = version;
  }

  page(session: string, index: number): number | null {
    const exposure = this.#exposures.get(session);
    const memory = exposure === undefined ? undefined : this.#state.vms.get(exposure.vm)?.memory;
    return memory?.pages[index] ?? null;
  }

  async #fetch(session: string, record: VmRecord): Promise<void> {
    const key = this.#connections.get(session);
    const { memory } = record;
    if (memory === null || key === undefined) return;
    for (let index = 0; index < PAGES; index++) {
      if (memory.pages[index] !== null) continue;
      await this.#life.sleep(PAGE_MS);
      if (this.#connections.get(session) !== key) return;
      const peer = this.#peer();
      const page = peer?.accepts(session, key) === true ? peer.page(session, index) : null;
      if (page === null) {
        this.#connections.delete(session);
        return;
      }
      if (page > record.loadedVersion)
        this.#world.fail(`page ${index} was written after the state that the VM runs from`);
      // A page that the guest has written meanwhile was fetched before: it is not overwritten.
      memory.pages[index] ??= page;
      this.#world.event(`page ${index}`);
      await this.#life.survive();
    }
  }

  // ---- parts

  /** What takes time, and where a crash may fall: what came before is on the disk then, what comes after is not. */
  async #work(label: string): Promise<void> {
    this.#world.event(`${this.host} ${label}`);
    await this.#life.sleep(WORK_MS);
    if (!this.#life.isAlive) await NEVER;
  }

  #vm(name: string): VmRecord {
    const record = this.#state.vms.get(name);
    if (record === undefined) throw failure('NOT_FOUND', `${name} is not on ${this.host}`);
    return record;
  }

  #living(name: string): Qemu {
    const { qemu } = this.#vm(name);
    if (qemu?.isAlive !== true) throw failure('QEMU_GONE', 'QEMU has ended');
    return qemu;
  }

  #session(session: string) {
    const noted = this.#state.sessions.get(session);
    if (noted === undefined) throw failure('NOT_FOUND', `no session ${session} on ${this.host}`);
    return noted;
  }

  #refuseClosed(key: string): void {
    if (this.#closed.has(key)) throw failure('CONFLICT', `${key} is over`);
  }
}

function failure(code: ErrorCode, message: string): MigrationError {
  return new MigrationError(code, message);
}
