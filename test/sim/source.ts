/**
 * The source's half of a simulated host. It keeps the rules of ports/host.ts, and forgets what a real daemon forgets.
 */

import type { ChunkRange, DirtyRound, FrozenDigests, SourceEndpointInfo } from '../../src/engine/ports/session.js';
import type { ExposeRequest, SourcePort, StopReply } from '../../src/engine/ports/source.js';
import { failure, type HalfParts, SimHalf } from './half.js';
import { moveNatively } from './native.js';
import { digestsOf } from './world.js';

interface Exposure {
  readonly key: string;
  readonly vm: string;
  /** The memory at the last round, and what was written before that. Absent: no writes are tracked. */
  readonly tracked?: { pages: readonly (number | null)[]; dirty: readonly number[]; round: number };
}

/** The receiver of the device state. */
interface StateSink {
  /** False: the state has to wait. */
  isOpen(session: string): boolean;
  load(session: string, version: number): void;
}

/** A page counts as this many, so that there are rounds: a few pages of 4 KiB would be too little for one. */
export const DIRTY_WEIGHT = 1000;

export class SimSource extends SimHalf implements SourcePort {
  /** The other host's target, if its daemon lives and the network is up. */
  readonly #peer: () => StateSink | null;
  readonly #exposures = new Map<string, Exposure>();
  #keyCount = 0;

  constructor(parts: HalfParts, peer: () => StateSink | null) {
    super(parts);
    this.#peer = peer;
  }

  get exposureCount(): number {
    return this.#exposures.size;
  }

  async reserve(vm: string, job: string): Promise<void> {
    this.refuseClosed(`${vm}/${job}`);
    const record = this.vm(vm);
    if (record.job !== null && record.job !== job) throw failure('VM_BUSY', record.job);
    record.job = job;
    await this.work('reserve');
  }

  async unreserve(vm: string, job: string): Promise<void> {
    this.closed.add(`${vm}/${job}`);
    const record = this.state.vms.get(vm);
    if (record?.job === job) record.job = null;
    await this.work('unreserve');
  }

  async expose({ session, vm, isTracked = false }: ExposeRequest): Promise<SourceEndpointInfo> {
    this.refuseClosed(session);
    const pages = [...(this.vm(vm).memory?.pages ?? [])];
    const tracked = isTracked ? { tracked: { pages, dirty: [], round: 0 } } : {};
    const known = this.#exposures.get(session) ?? { key: `${++this.#keyCount}`, vm, ...tracked };
    this.#exposures.set(session, known);
    await this.work('expose');
    return { transport: 'tcp', host: '10.0.0.1', port: 1, keys: [{ ram: known.key, dataMap: known.key }] };
  }

  async unexpose(session: string): Promise<void> {
    this.closed.add(session);
    this.#exposures.delete(session);
    await this.work('unexpose');
  }

  async noteDirty(vm: string, session: string): Promise<DirtyRound> {
    this.living(vm);
    const noted = this.#noteRound(session);
    await this.work('note what was written');
    if (noted === null) throw failure('CONFLICT', 'no writes are tracked');
    return noted;
  }

  /** Null: no writes are tracked. */
  #noteRound(session: string): DirtyRound | null {
    const exposure = this.#exposures.get(session);
    if (exposure?.tracked === undefined) return null;
    const { tracked } = exposure;
    const pages = [...(this.vm(exposure.vm).memory?.pages ?? [])];
    const before = tracked.dirty;
    tracked.dirty = pages.flatMap((page, index) => (page === tracked.pages[index] ? [] : [index]));
    const again = tracked.dirty.filter((index) => before.includes(index));
    tracked.pages = pages;
    tracked.round++;
    return {
      round: tracked.round,
      dirtyPages: tracked.dirty.length * DIRTY_WEIGHT,
      againPages: again.length * DIRTY_WEIGHT,
    };
  }

  async stop(vm: string, session: string): Promise<StopReply> {
    this.refuseClosed(session);
    const qemu = this.living(vm);
    if (qemu.state === 'running') qemu.state = 'paused';
    await this.work('stop: stopped');
    const dirty = this.#noteRound(session);
    return { stoppedAtUs: 0, stoppedForMs: 0, ...(dirty === null ? {} : { dirty }) };
  }

  async continueVm(vm: string, _session: string): Promise<void> {
    const owner = await this.registry.owner(vm);
    if (owner?.owner !== this.state.name) throw failure('OWNER_CHANGED', `${vm} belongs to ${owner?.owner}`);
    const qemu = this.living(vm);
    qemu.state = 'running';
    await this.work('continue: runs');
  }

  async transferState(vm: string, session: string, _target: string): Promise<{ deviceStateBytes: number }> {
    const qemu = this.living(vm);
    if (qemu.state !== 'paused') throw failure('CONFLICT', 'the VM runs');
    await this.work('transfer: saved');
    const peer = this.#peer();
    if (peer === null) throw failure('UNREACHABLE', 'the target does not take the state');
    while (!peer.isOpen(session)) {
      if (this.#peer() !== peer) throw failure('UNREACHABLE', 'the target is gone');
      await this.life.sleep(1);
    }
    peer.load(session, qemu.version);
    await this.work('transfer: loaded');
    return { deviceStateBytes: 1000 };
  }

  async nativeMigrate(vm: string, session: string): Promise<void> {
    const moving = moveNatively(this.world, this.state, vm, session);
    while (moving.outcome === null) await this.life.sleep(1);
    if (moving.outcome === 'failed') throw failure('QEMU_FAILED', 'migration failed');
  }

  async nativeRecover(): Promise<void> {
    throw failure('CONFLICT', 'no post-copy of QEMU is simulated');
  }

  async nativeProgress(): Promise<Record<string, number | string>> {
    return { status: 'completed', downtimeMs: 3 };
  }

  async nativeCancel(vm: string, session: string): Promise<void> {
    this.vm(vm);
    this.world.nativeCancelled.add(session);
    await this.work('native cancel');
  }

  async digestFrozen(session: string, _key: string, range: ChunkRange): Promise<FrozenDigests> {
    const exposure = this.#exposures.get(session);
    if (exposure === undefined) throw failure('NOT_FOUND', 'no such session');
    await this.work('digest frozen');
    return { digests: digestsOf(this.vm(exposure.vm).memory?.pages ?? [], range) };
  }

  async sourceCounters(session: string): Promise<Record<string, number>> {
    if (!this.#exposures.has(session)) throw failure('NOT_FOUND', 'no such session');
    return { cpuNs: 1 };
  }

  async release(vm: string, session: string): Promise<void> {
    this.closed.add(session);
    this.#exposures.delete(session);
    const record = this.state.vms.get(vm);
    const owner = await this.registry.owner(vm);
    if (record === undefined || owner?.session !== session) return;
    if (record.qemu) record.qemu.isAlive = false;
    await this.work('release: QEMU ended');
    this.state.vms.delete(vm);
    await this.work('release: files removed');
  }

  // ---- reads of the target

  accepts(session: string, key: string): boolean {
    return this.#exposures.get(session)?.key === key;
  }

  /** What was written before that round. Null: there is no such round. */
  dirty(session: string, round: number): readonly number[] | null {
    const tracked = this.#exposures.get(session)?.tracked;
    return tracked?.round === round ? tracked.dirty : null;
  }

  page(session: string, index: number): number | null {
    const exposure = this.#exposures.get(session);
    const memory = exposure === undefined ? undefined : this.state.vms.get(exposure.vm)?.memory;
    return memory?.pages[index] ?? null;
  }
}
