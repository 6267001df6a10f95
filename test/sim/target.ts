/**
 * The target's half of a simulated host. It keeps the rules of ports/host.ts, and forgets what a real daemon forgets.
 */

import { tracksWrites } from '../../src/domain/migration.js';
import type {
  ArrivedDigests,
  ChunkRange,
  PrepareReply,
  PrepareRequest,
  SessionProgress,
  SourceEndpointInfo,
} from '../../src/engine/ports/session.js';
import type { FetchedAhead, TargetPort } from '../../src/engine/ports/target.js';
import { failure, type HalfParts, SimHalf } from './half.js';
import { PAGE_MS } from './native.js';
import { DIRTY_WEIGHT } from './source.js';
import { digestsOf, PAGES, type VmRecord } from './world.js';

/** The source of the pages. */
interface PageSource {
  accepts(session: string, key: string): boolean;
  page(session: string, index: number): number | null;
  dirty(session: string, round: number): readonly number[] | null;
}

/** As that of the source's pages, and more, so that a second round pays. */
const FETCHED_WEIGHT = 4096 * 2_000;
/** A call fetches no more, so that rounds are made before every page has come. */
const PAGES_AT_ONCE = 4;

export class SimTarget extends SimHalf implements TargetPort {
  /** The other host's source, if its daemon lives and the network is up. */
  readonly #peer: () => PageSource | null;
  /** Sessions that fetch pages, with the key of their connection. */
  readonly #connections = new Map<string, string>();
  /** Sessions whose device state has to wait, with the last round that was taken back. */
  readonly #waiting = new Map<string, { round: number; pages: number; fetched: number; isOpen: boolean }>();

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
      this.state.sessions.set(session, { session, vm, mode: request.mode, hasRun: false, arrived: [] });
      this.state.vms.set(vm, {
        spec: request.spec,
        job: request.job,
        memory: null,
        qemu: null,
        epoch: request.epoch,
        loadedVersion: 0,
      });
    }
    if (tracksWrites(request.mode) && known === undefined)
      this.#waiting.set(session, { round: 0, pages: 0, fetched: 0, isOpen: false });
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

  async fetchAhead(session: string, _msMax: number, holds: boolean): Promise<FetchedAhead> {
    const waiting = this.#ahead(session);
    const { memory } = this.vm(this.#session(session).vm);
    const key = this.#connections.get(session);
    let left = PAGES_AT_ONCE;
    for (let index = 0; index < PAGES; index++) {
      if (memory === null || memory.pages[index] !== null) continue;
      if (left-- === 0) return { isDone: false, isHeld: holds };
      await this.life.sleep(PAGE_MS);
      this.refuseClosed(session);
      const peer = this.#peer();
      const page = key !== undefined && peer?.accepts(session, key) === true ? peer.page(session, index) : null;
      if (page === null) throw failure('DISCONNECTED', 'the source is gone');
      // A call that was repeated may have fetched the page, and the round of that may have been taken back since.
      if (waiting.isOpen) throw failure('CONFLICT', 'the source has stopped the VM');
      memory.pages[index] = page;
      this.#session(session).arrived[index] = page;
      waiting.fetched++;
      this.world.event(`page ${index} ahead`);
      await this.life.survive();
    }
    return { isDone: true, isHeld: true };
  }

  async takeBack(session: string, round: number): Promise<{ pages: number }> {
    const waiting = this.#ahead(session);
    if (waiting.round === round) return { pages: waiting.pages };
    if (round !== waiting.round + 1) throw failure('CONFLICT', `round ${round} does not follow ${waiting.round}`);
    const dirty = this.#peer()?.dirty(session, round) ?? null;
    if (dirty === null) throw failure('DISCONNECTED', 'the source does not tell what was written');
    const { memory } = this.vm(this.#session(session).vm);
    if (!this.world.isTakeBackBroken) for (const index of dirty) if (memory !== null) memory.pages[index] = null;
    const pages = dirty.length * DIRTY_WEIGHT;
    Object.assign(waiting, { round, pages });
    await this.work('take back');
    return { pages };
  }

  #ahead(session: string) {
    this.refuseClosed(session);
    const waiting = this.#waiting.get(session);
    if (waiting !== undefined) return waiting;
    throw failure('CONFLICT', 'nothing is fetched ahead');
  }

  isOpen(session: string): boolean {
    const { mode } = this.#session(session);
    return !tracksWrites(mode) || this.#waiting.get(session)?.isOpen === true;
  }

  async awaitLoaded(session: string, lastRound?: number): Promise<void> {
    if (tracksWrites(this.#session(session).mode)) {
      if (lastRound === undefined) throw failure('CONFLICT', 'the last round is not named');
      await this.takeBack(session, lastRound);
      this.#ahead(session).isOpen = true;
    }
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
    if (qemu.state === 'loaded') {
      this.#checkFetched(record);
      qemu.state = 'running';
    }
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
    const fetched = this.#waiting.get(session)?.fetched;
    const counters = fetched === undefined ? {} : { pushBytes: fetched * FETCHED_WEIGHT };
    return { state, hasRun: noted.hasRun, error: null, ...pages, counters, ...ended };
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
    this.#waiting.delete(session);
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

  /** Before the VM runs, what is here must be what it is on the source, which has stopped. */
  #checkFetched({ memory, spec }: VmRecord): void {
    const frozen = this.world.hosts.A.vms.get(spec.name)?.memory?.pages;
    for (const [index, page] of memory?.pages.entries() ?? [])
      if (page !== null && frozen !== undefined && page !== frozen[index])
        this.world.fail(`page ${index} was fetched before it was written, and kept`);
  }

  #session(session: string) {
    const noted = this.state.sessions.get(session);
    if (noted === undefined) throw failure('NOT_FOUND', `no session ${session} on ${this.state.name}`);
    return noted;
  }
}
