/**
 * The simulated world: two hosts, their disks, their QEMU processes, the network between them, and the oracle that
 * checks all of it after every event. `HostState` survives the daemon; the state in an agent (agent.ts) does not.
 */
import type { MigrationMode } from '../../src/domain/migration.js';
import type { VmSpec } from '../../src/domain/vm.js';
import type { ChunkRange } from '../../src/engine/ports/session.js';
import { CONSTANTS } from '../../src/protocol/wire.js';
import { Chance } from './chance.js';
import type { Disk } from './store.js';
import { type Life, Time } from './time.js';

export const PAGES = 6;

/**
 * Guest memory on one host. Each page has the version of the guest at the time when this was the only copy of the page.
 * Null: the page is not here.
 */
export interface Memory {
  readonly pages: (number | null)[];
}

export interface Qemu {
  isAlive: boolean;
  state: 'running' | 'paused' | 'incoming' | 'loaded';
  /** Version of the guest when its device state was saved or, while it runs, the current one. */
  version: number;
  /** The guest has ended by itself. */
  hasEnded?: boolean;
}

export interface VmRecord {
  readonly spec: VmSpec;
  job: string | null;
  memory: Memory | null;
  qemu: Qemu | null;
  epoch: number;
  /** Version of the device state that this QEMU was loaded from. */
  loadedVersion: number;
}

export interface SessionRecord {
  readonly session: string;
  readonly vm: string;
  readonly mode: MigrationMode;
  hasRun: boolean;
  /** Each page as it came. */
  readonly arrived: number[];
}

/** Digests of memory whose chunks are these pages, over and over. */
export function digestsOf(pages: readonly (number | null | undefined)[], { first, count }: ChunkRange): string {
  const digests = Array.from({ length: count }, (_, index) =>
    Buffer.alloc(CONSTANTS.PAGE_TAG_BYTES, `${pages[(first + index) % PAGES] ?? 'none'},`),
  );
  return Buffer.concat(digests).toString('base64');
}

export interface HostState {
  readonly name: string;
  readonly vms: Map<string, VmRecord>;
  readonly sessions: Map<string, SessionRecord>;
  readonly journal: Disk;
  readonly owners: Disk;
  /** The copy of the owner records in the memory directory. */
  readonly mirror: Disk;
  life: Life | null;
  isDiskFull: boolean;
}

export type FaultKind =
  | 'killSourceDaemon'
  /** The source's daemon is killed, and its owner records are lost, or come back from a backup. */
  | 'loseOwners'
  | 'restoreOwners'
  | 'killTargetDaemon'
  /** The same at the target. Its copies always come back under a mirror. */
  | 'restoreTargetOwners'
  | 'killSourceQemu'
  | 'killTargetQemu'
  | 'endGuest'
  | 'cutNetwork'
  | 'fillSourceDisk'
  | 'fillTargetDisk'
  | 'cancel'
  | 'loseAnswer'
  | 'repeatCall'
  | 'delayCall';

export interface Fault {
  /** Number of the event at which the fault strikes. */
  readonly at: number;
  readonly kind: FaultKind;
  /**
   * Time until the fault ends (the daemon restarts, the network heals, space is free again), or the delay of a call.
   */
  readonly ms: number;
  /** Of the restores: number of the event at which the copy was made. Absent: when the VM had been started. */
  readonly copiedAt?: number;
}

export class Violation extends Error {}

export class World {
  readonly chance: Chance;
  readonly time: Time;
  readonly hosts: { readonly A: HostState; readonly B: HostState } = { A: hostState('A'), B: hostState('B') };
  isNetworkUp = true;
  /** Pages that were written since they were fetched stay as they are. */
  isTakeBackBroken = false;
  eventCount = 0;
  readonly trace: string[] = [];
  violation: Violation | null = null;
  /** The fault for the next call. */
  callFault: Fault | null = null;
  /** Sessions whose native migration QEMU was told to end. */
  readonly nativeCancelled = new Set<string>();
  /** Deaths of QEMU that no engine could have prevented. */
  readonly killed = { source: false, target: false };
  /**
   * The source's owner records have been lost or restored, and their mirror lost, so they do not show what has been
   * committed.
   */
  areOwnersLost = false;
  /** The source's owner records when the VM had been started, and at each event since. */
  ownersBackup: Buffer = Buffer.alloc(0);
  readonly #ownersAt: { readonly A: Buffer; readonly B: Buffer }[] = [];
  /** The events at which the owner records of a host were other ones than before. */
  readonly ownersChangedAt: { readonly A: number[]; readonly B: number[] } = { A: [], B: [] };
  guestEndedOn: 'source' | 'target' | null = null;
  onRestart: (host: 'A' | 'B') => void = () => undefined;
  onCancel: () => void = () => undefined;
  #faults: Fault[];
  #pausedSinceMs: number | null = null;
  #pending = 0;

  constructor(seed: number, faults: readonly Fault[]) {
    this.chance = new Chance(seed);
    this.time = new Time(() => this.chance.next());
    this.#faults = [...faults];
  }

  /** Every fault has ended. */
  get isCalm(): boolean {
    return this.#pending === 0;
  }

  get faultsLeft(): number {
    return this.#faults.length;
  }

  /** Faults planned for events beyond the end of the run do not strike once the job has ended. */
  isLinked(one: string, other: string): boolean {
    return one === other || this.isNetworkUp;
  }

  takeCallFault(): Fault | null {
    const fault = this.callFault;
    this.callFault = null;
    return fault;
  }

  endFaults(): void {
    this.#faults = [];
    this.callFault = null;
  }

  event(label: string): void {
    const number = this.eventCount++;
    this.trace.push(`${number} ${this.time.nowMs.toFixed(1)} ${label}`);
    const [A, B] = [this.hosts.A.owners.bytes, this.hosts.B.owners.bytes];
    if (A !== this.#ownersAt.at(-1)?.A) this.ownersChangedAt.A.push(number);
    if (B !== this.#ownersAt.at(-1)?.B) this.ownersChangedAt.B.push(number);
    this.#ownersAt.push({ A, B });
    for (const host of [this.hosts.A, this.hosts.B]) {
      for (const { qemu, memory } of host.vms.values()) {
        if (qemu?.isAlive !== true || qemu.state !== 'running' || memory === null) continue;
        qemu.version++;
        const page = this.chance.below(PAGES);
        if (memory.pages[page] !== null) memory.pages[page] = qemu.version;
      }
    }
    const due = this.#faults.filter(({ at }) => at === number);
    if (due.length > 0) this.#faults = this.#faults.filter(({ at }) => at !== number);
    for (const fault of due) this.#strike(fault);
    this.#watch();
  }

  fail(message: string): void {
    this.violation ??= new Violation(message);
  }

  /** Returns whether the registry durably names the target as owner. */
  get isCommitted(): boolean {
    const { bytes } = this.hosts.A.owners;
    return bytes.toString('utf8', 0, bytes.lastIndexOf(0x0a) + 1).includes('"owner":"B"');
  }

  vmsOf(host: HostState): VmRecord[] {
    return [...host.vms.values()];
  }

  killDaemon(host: 'A' | 'B', ms: number): void {
    const state = this.hosts[host];
    const { life } = state;
    if (life === null) return;
    state.life = null;
    this.#pausedSinceMs = null;
    life.kill();
    this.#later(ms, () => this.onRestart(host));
  }

  #later(ms: number, act: () => void): void {
    this.#pending++;
    this.time.after(ms, () => {
      this.#pending--;
      act();
    });
  }

  #strike(fault: Fault): void {
    this.trace.push(`  !! ${fault.kind} ${fault.ms}`);
    const { A, B } = this.hosts;
    switch (fault.kind) {
      case 'killSourceDaemon':
        return this.killDaemon('A', fault.ms);
      case 'loseOwners':
      case 'restoreOwners':
        this.killDaemon('A', fault.ms);
        A.owners.bytes = fault.kind === 'loseOwners' ? Buffer.alloc(0) : this.#backupOf(fault);
        // A copy comes back while the memory directory is what it was. Without its mirror the target has to be asked.
        if (fault.copiedAt !== undefined) return;
        this.areOwnersLost = true;
        A.mirror.bytes = Buffer.alloc(0);
        return;
      case 'restoreTargetOwners':
        this.killDaemon('B', fault.ms);
        B.owners.bytes = this.#ownersAt[fault.copiedAt ?? 0]?.B ?? Buffer.alloc(0);
        return;
      case 'killTargetDaemon':
        return this.killDaemon('B', fault.ms);
      case 'killSourceQemu':
        for (const { qemu } of A.vms.values()) if (qemu?.isAlive) this.#kill(qemu, 'source');
        return;
      case 'killTargetQemu':
        for (const { qemu } of B.vms.values()) if (qemu?.isAlive) this.#kill(qemu, 'target');
        return;
      case 'endGuest':
        for (const [side, host] of [['source', A] as const, ['target', B] as const])
          for (const { qemu } of host.vms.values())
            if (qemu?.isAlive === true && qemu.state === 'running') this.#endGuest(qemu, side);
        return;
      case 'cutNetwork':
        this.isNetworkUp = false;
        return this.#later(fault.ms, () => {
          this.isNetworkUp = true;
        });
      case 'fillSourceDisk':
      case 'fillTargetDisk': {
        const host = fault.kind === 'fillSourceDisk' ? A : B;
        host.isDiskFull = true;
        return this.#later(fault.ms, () => {
          host.isDiskFull = false;
        });
      }
      case 'cancel':
        return this.onCancel();
      case 'loseAnswer':
      case 'repeatCall':
      case 'delayCall':
        this.callFault = fault;
        return;
    }
  }

  #backupOf({ copiedAt }: Fault): Buffer {
    return copiedAt === undefined ? this.ownersBackup : (this.#ownersAt[copiedAt]?.A ?? this.ownersBackup);
  }

  /** A guest that runs may end at any moment. A stopped one cannot. */
  #endGuest(qemu: Qemu, side: 'source' | 'target'): void {
    qemu.isAlive = false;
    qemu.hasEnded = true;
    this.guestEndedOn = side;
  }

  #kill(qemu: Qemu, side: 'source' | 'target'): void {
    qemu.isAlive = false;
    this.killed[side] = true;
  }

  /** Checks the invariants that hold at every moment. */
  #watch(): void {
    const running = [this.hosts.A, this.hosts.B].flatMap((host) =>
      this.vmsOf(host).filter(({ qemu }) => qemu?.isAlive === true && qemu.state === 'running'),
    );
    if (running.length > 1) this.fail('two copies of the VM run');
    const arrived = this.vmsOf(this.hosts.B).find(({ qemu }) => qemu?.isAlive === true && qemu.state === 'running');
    const left = this.vmsOf(this.hosts.A)[0];
    if (arrived !== undefined && left?.qemu && left.qemu.version > arrived.loadedVersion) {
      this.fail('the source ran on after the state that the target runs from was saved');
    }
    this.#watchPause(left);
  }

  /** A stopped VM that still belongs to the source runs again within 5 s while the source's daemon lives. */
  #watchPause(left: VmRecord | undefined): void {
    const isPaused = left?.qemu?.isAlive === true && left.qemu.state === 'paused';
    if (!isPaused || this.hosts.A.life === null) {
      this.#pausedSinceMs = null;
      return;
    }
    this.#pausedSinceMs ??= this.time.nowMs;
    const ms = this.time.nowMs - this.#pausedSinceMs;
    if (ms > 5_000 && !this.isCommitted && !this.areOwnersLost)
      this.fail(`the VM has been stopped on the source for ${ms} ms without a commit`);
  }
}

function hostState(name: string): HostState {
  return {
    name,
    vms: new Map(),
    sessions: new Map(),
    journal: { path: `${name}/journal`, bytes: Buffer.alloc(0) },
    owners: { path: `${name}/owners`, bytes: Buffer.alloc(0) },
    mirror: { path: `${name}/mirror`, bytes: Buffer.alloc(0) },
    life: null,
    isDiskFull: false,
  };
}
