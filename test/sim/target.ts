/**
 * The target's half of a simulated host. It keeps the rules of ports/host.ts, and forgets what a real daemon forgets.
 */

import type {
  ArrivedDigests,
  ChunkRange,
  PrepareReply,
  PrepareRequest,
  SessionProgress,
  SourceEndpointInfo,
} from '../../src/engine/ports/session.js';
import type { TargetPort } from '../../src/engine/ports/target.js';
import { failure, type HalfParts, SimHalf } from './half.js';
import { PAGE_MS } from './native.js';
import { digestsOf, PAGES, type VmRecord } from './world.js';

/** The source of the pages. */
interface PageSource {
  accepts(session: string, key: string): boolean;
  page(session: string, index: number): number | null;
}

export class SimTarget extends SimHalf implements TargetPort {
  /** The other host's source, if its daemon lives and the network is up. */
  readonly #peer: () => PageSource | null;
  /** Sessions that fetch pages, with the key of their connection. */
  readonly #connections = new Map<string, string>();

  constructor(parts: HalfParts, peer: () => PageSource | null) {
    super(parts);
    this.#peer = peer;
  }

  async prepare(request: PrepareRequest): Promise<PrepareReply> {
    const { session } = request;
    const vm = request.spec.name;
    this.refuseClosed(session);
    const known = this.state.sessions.get(session);
    if (known === undefined) {
      if (this.state.vms.has(vm)) throw failure('CONFLICT', `${vm} is here already`);
      this.state.sessions.set(session, { session, vm, hasRun: false, arrived: [] });
      this.state.vms.set(vm, {
        spec: request.spec,
        job: request.job,
        memory: null,
        qemu: null,
        epoch: request.epoch,
        loadedVersion: 0,
      });
    }
    await this.work('prepare: session noted');
    this.refuseClosed(session);
    const record = this.vm(vm);
    record.memory ??= { pages: Array.from({ length: PAGES }, () => null) };
    await this.work('prepare: region files made');
    this.refuseClosed(session);
    record.qemu ??= { isAlive: true, state: 'incoming', version: 0 };
    await this.work('prepare: QEMU started');
    this.refuseClosed(session);
    return { nativeUri: null };
  }

  async connect(session: string, source: SourceEndpointInfo): Promise<void> {
    this.refuseClosed(session);
    const noted = this.#session(session);
    const key = source.keys[0]?.ram ?? '';
    if (this.#peer()?.accepts(session, key) !== true) throw failure('DISCONNECTED', 'nobody listens');
    await this.work('connect');
    this.refuseClosed(session);
    this.#connections.set(session, key);
    // A repeated call may arrive late, after the VM has begun to run.
    if (noted.hasRun) void this.#fetch(session, this.vm(noted.vm));
  }

  async awaitLoaded(session: string): Promise<void> {
    for (;;) {
      const { qemu } = this.vm(this.#session(session).vm);
      if (qemu?.isAlive !== true) throw failure('QEMU_FAILED', 'QEMU has ended while loading');
      if (qemu.state !== 'incoming') return;
      await this.life.sleep(1);
    }
  }

  async resume(session: string, epoch: number): Promise<{ resumedAtUs: number }> {
    const noted = this.#session(session);
    const record = this.vm(noted.vm);
    const { qemu } = record;
    if (qemu?.isAlive !== true) throw failure('QEMU_GONE', 'QEMU has ended');
    if (qemu.state === 'incoming') throw failure('CONFLICT', 'nothing is loaded');
    const present = await this.registry.owner(noted.vm);
    if (present === null || present.epoch < epoch) {
      const next = { vm: noted.vm, owner: this.state.name, epoch, session };
      await this.registry.swapOwner(noted.vm, present?.epoch ?? null, next);
    } else if (present.session !== session) {
      throw failure('OWNER_CHANGED', 'a newer epoch is known here');
    }
    await this.work('resume: ownership noted');
    if (!qemu.isAlive) throw failure('QEMU_GONE', 'QEMU has ended');
    noted.hasRun = true;
    record.epoch = epoch;
    if (qemu.state === 'loaded') qemu.state = 'running';
    this.world.event('resume: runs');
    await this.life.survive();
    void this.#fetch(session, record);
    return { resumedAtUs: 0 };
  }

  async progress(session: string): Promise<SessionProgress> {
    const noted = this.#session(session);
    const { qemu, memory } = this.vm(noted.vm);
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
    const ended = qemu?.hasEnded === true ? { ended: { reason: 'guest-shutdown', exitCode: 0 } } : {};
    const pages = { pagesTotal: PAGES, pagesPresent, pageBytes: 4096 };
    return { state, hasRun: noted.hasRun, error: null, ...pages, counters: {}, ...ended };
  }

  async reconnect(session: string, source: SourceEndpointInfo): Promise<void> {
    await this.connect(session, source);
  }

  async inherit(): Promise<void> {}

  async digestArrived(session: string, range: ChunkRange): Promise<ArrivedDigests> {
    const { arrived } = this.#session(session);
    await this.work('digest arrived');
    return { digests: digestsOf(arrived, range) };
  }

  async condemn(session: string): Promise<void> {
    const { qemu } = this.vm(this.#session(session).vm);
    if (qemu !== null) qemu.state = 'paused';
    await this.work('condemn');
  }

  async finish(session: string): Promise<void> {
    const { vm } = this.#session(session);
    const record = this.vm(vm);
    if (record.qemu?.isAlive === true && !record.qemu.hasEnded && record.memory?.pages.includes(null))
      throw failure('CONFLICT', 'pages are missing');
    this.#connections.delete(session);
    this.state.sessions.delete(session);
    record.job = null;
    await this.work('finish');
  }

  async discard(session: string): Promise<void> {
    const noted = this.state.sessions.get(session);
    if (noted?.hasRun === true) throw failure('CONFLICT', 'the VM runs here');
    this.closed.add(session);
    this.#connections.delete(session);
    if (noted === undefined) return;
    const record = this.state.vms.get(noted.vm);
    if (record?.qemu) record.qemu.isAlive = false;
    await this.work('discard: QEMU ended');
    this.state.vms.delete(noted.vm);
    await this.work('discard: files removed');
    this.state.sessions.delete(session);
  }

  /** Receives the source's device state. */
  load(session: string, version: number): void {
    const record = this.vm(this.#session(session).vm);
    const { qemu } = record;
    if (qemu?.isAlive !== true) throw failure('QEMU_FAILED', 'QEMU has ended');
    if (qemu.state !== 'incoming') return;
    qemu.state = 'loaded';
    qemu.version = version;
    record.loadedVersion = version;
  }

  async #fetch(session: string, record: VmRecord): Promise<void> {
    const key = this.#connections.get(session);
    const { memory } = record;
    if (memory === null || key === undefined) return;
    for (let index = 0; index < PAGES; index++) {
      if (memory.pages[index] !== null) continue;
      await this.life.sleep(PAGE_MS);
      if (this.#connections.get(session) !== key) return;
      const peer = this.#peer();
      const page = peer?.accepts(session, key) === true ? peer.page(session, index) : null;
      if (page === null) {
        this.#connections.delete(session);
        return;
      }
      if (page > record.loadedVersion)
        this.world.fail(`page ${index} was written after the state that the VM runs from`);
      // A page that the guest has written meanwhile had been fetched before, so it is not overwritten.
      const noted = this.state.sessions.get(session);
      if (noted !== undefined) noted.arrived[index] = page;
      memory.pages[index] ??= page;
      this.world.event(`page ${index}`);
      await this.life.survive();
    }
  }

  #session(session: string) {
    const noted = this.state.sessions.get(session);
    if (noted === undefined) throw failure('NOT_FOUND', `no session ${session} on ${this.state.name}`);
    return noted;
  }
}
