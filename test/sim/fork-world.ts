/**
 * The simulated world of a fork: the hosts, the parent VM on the first of them, clones and images, and the oracle that
 * checks all of it after every event. The state in this file survives the daemons; the state in an agent
 * (fork-agent.ts) does not.
 */
import type { HostFanout } from '../../src/domain/fanout.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import { Chance } from './chance.js';
import { type FanoutFaultKind, FanoutState } from './fork/fanout-state.js';
import type { CallFault, Net } from './network.js';
import type { Disk } from './store.js';
import { type Life, Time } from './time.js';

/** So many pages that the parent has not written all of them before the clones run. */
export const PAGES = 24;
export const CLONES = 3;
/** The host of the parent and of the coordinator. */
export const ROOT = 'A';
/** An image that is there before the fork. */
export const EARLIER_IMAGE = 'e'.repeat(16);

/** The guest that is the parent, or a clone by its index. */
export type GuestChoice = 'parent' | number;

export interface Parent {
  isAlive: boolean;
  /** The guest has ended by itself. Its QEMU is paused until a daemon ends it. */
  hasEnded: boolean;
  state: 'running' | 'paused';
  /** Grows with every event while the VM runs. Its memory must prove this version. */
  version: number;
  readonly pages: number[];
  /** The fork whose capture the VM's writes wait for. */
  protectedFor: string | null;
  /** The VM stays stopped because the request asked for that. */
  isFrozen: boolean;
  job: string | null;
}

export interface Image {
  /** Version of each page. Null: not copied yet. */
  readonly pages: (number | null)[];
  hasState: boolean;
}

export interface Clone {
  readonly index: number;
  readonly name: string;
  readonly fork: string;
  readonly image: string;
  isAlive: boolean;
  hasEnded: boolean;
  /** Its vCPUs have run. */
  hasRun: boolean;
  state: 'waiting' | 'loaded' | 'running';
}

export interface ForkNote {
  readonly fork: string;
  readonly image: string;
  readonly isOwnImage: boolean;
  readonly isParentStopped: boolean;
  readonly isPartial: boolean;
  readonly first: number;
  readonly count: number;
  /** The host from which this one reads the image. Null: it has the image. */
  readonly origin: string | null;
  /** How the image gets here. Null: all of it from the origin. */
  readonly fanout: HostFanout | null;
  isPrepared: boolean;
  isCommitted: boolean;
}

export interface ForkHost {
  readonly name: string;
  readonly forks: Map<string, ForkNote>;
  readonly images: Map<string, Image>;
  readonly clones: Map<string, Clone>;
  life: Life | null;
  /** The calls to the daemon that lives now. */
  agent: HostPort | null;
  isDiskFull: boolean;
  isCut: boolean;
  /** The whole host has been down, so its QEMUs and images are gone. */
  wasDown: boolean;
}

export type ForkFaultKind =
  | FanoutFaultKind
  | 'killDaemon'
  /** Daemon, QEMUs and memory files of a host that joins. */
  | 'killHost'
  | 'killParent'
  | 'killClone'
  /** A guest that runs ends by itself: it powers off, or panics. */
  | 'endGuest'
  | 'fillDisk'
  | 'cutNetwork'
  | 'cancel'
  | 'failCall'
  | 'loseAnswer'
  | 'repeatCall'
  | 'delayCall';

export interface ForkFault extends CallFault {
  /** Number of the event at which the fault strikes. */
  readonly at: number;
  readonly kind: ForkFaultKind;
  /** Duration of the fault, or the delay of a call. */
  readonly ms: number;
  /** Absent: the root. */
  readonly host?: string;
  /** The guest that ends. Absent: any that runs. */
  readonly guest?: GuestChoice;
}

/** The time that a daemon takes to end the QEMU of a guest that has ended. */
const REAP_MS = 3;

export class ForkWorld implements Net {
  readonly chance: Chance;
  readonly time: Time;
  readonly journal: Disk = { path: 'A/journal', bytes: Buffer.alloc(0) };
  readonly owners: Disk = { path: 'A/owners', bytes: Buffer.alloc(0) };
  readonly parent: Parent = {
    isAlive: true,
    hasEnded: false,
    state: 'running',
    version: 1,
    pages: Array.from({ length: PAGES }, () => 1),
    protectedFor: null,
    isFrozen: false,
    job: null,
  };
  readonly hosts: ReadonlyMap<string, ForkHost>;
  readonly root: ForkHost;
  /** The pages of each image at its fork point, against which all copies are checked. */
  readonly points = new Map<string, readonly number[]>();
  /** The forks whose commit the root has written. They stay in it when they are finished. */
  readonly committed = new Set<string>();
  readonly fanout = new FanoutState((message) => this.fail(message));
  isPartial = false;
  eventCount = 0;
  violation: string | null = null;
  readonly trace: string[] = [];
  /** Deaths of QEMU that no engine could have prevented. */
  readonly killed = { parent: false, clones: 0 };
  /** Guests that have ended by themselves. */
  readonly ended = { parent: false, clones: 0 };
  onRestart: (host: ForkHost) => void = () => undefined;
  onCancel: () => void = () => undefined;
  #callFault: ForkFault | null = null;
  #faults: ForkFault[];
  #pending = 0;
  #pausedSinceMs: number | null = null;

  constructor(seed: number, faults: readonly ForkFault[], hosts: readonly string[] = [ROOT]) {
    this.chance = new Chance(seed);
    this.time = new Time(() => this.chance.next());
    this.#faults = [...faults];
    this.hosts = new Map(hosts.map((name) => [name, newHost(name)]));
    this.root = this.host(ROOT);
  }

  host(name: string): ForkHost {
    return this.hosts.get(name)!;
  }

  get clones(): Clone[] {
    return [...this.hosts.values()].flatMap(({ clones }) => [...clones.values()]);
  }

  /** Every fault has ended. */
  get isCalm(): boolean {
    return this.#pending === 0;
  }

  isLinked(one: string, other: string): boolean {
    return one === other || !(this.host(one).isCut || this.host(other).isCut);
  }

  takeCallFault(): ForkFault | null {
    const fault = this.#callFault;
    this.#callFault = null;
    return fault;
  }

  endFaults(): void {
    this.#faults = [];
    this.#callFault = null;
  }

  fail(message: string): void {
    this.violation ??= message;
  }

  /** The root writes its commit: nothing of the fork is missing then, unless a part of it suffices. */
  commit(fork: string): void {
    const isDown = [...this.hosts.values()].some(({ wasDown }) => wasDown);
    const loadedCount = this.clones.filter((clone) => clone.fork === fork && clone.state === 'loaded').length;
    const wantedCount = this.isPartial ? 1 : CLONES;
    if (!isDown && loadedCount < wantedCount) this.fail(`the fork is committed with ${loadedCount} clones loaded`);
    this.committed.add(fork);
  }

  /** Resumes a clone, unless it has run. */
  run(clone: Clone): void {
    if (!this.committed.has(clone.fork)) this.fail(`${clone.name} runs before its fork is committed`);
    if (clone.hasRun) return;
    const isRecorded = [...this.hosts.values()].some(
      ({ clones, forks }) => clones.get(clone.name) === clone && forks.get(clone.fork)?.isCommitted === true,
    );
    if (!isRecorded) this.fail(`${clone.name} runs before its host has committed the fork`);
    const others = this.clones.filter(
      ({ index, fork, hasRun }) => hasRun && index === clone.index && fork === clone.fork,
    );
    if (others.length > 0) this.fail(`${clone.name} runs twice`);
    clone.hasRun = true;
    clone.state = 'running';
  }

  /** Ends and removes a clone in an undo. */
  take(host: ForkHost, name: string): void {
    if (host.clones.get(name)?.hasRun === true) this.fail(`an undo takes ${name}, which has run`);
    host.clones.delete(name);
  }

  event(label: string): void {
    const number = this.eventCount++;
    this.trace.push(`${number} ${this.time.nowMs.toFixed(1)} ${label}`);
    this.#runParent();
    const due = this.#faults.filter(({ at }) => at === number);
    if (due.length > 0) this.#faults = this.#faults.filter(({ at }) => at !== number);
    for (const fault of due) this.#strike(fault);
    this.#watch();
  }

  /** A write to a page that the image lacks copies the page first, as the kernel forces the agent to do. */
  #runParent(): void {
    const { parent, root } = this;
    if (!parent.isAlive || parent.state !== 'running') return;
    parent.version++;
    const page = this.chance.below(PAGES);
    const image = parent.protectedFor === null ? undefined : root.images.get(parent.protectedFor);
    if (image !== undefined && this.points.has(parent.protectedFor ?? '') && image.pages[page] === null) {
      // Without a daemon the write waits.
      if (root.life === null) return;
      image.pages[page] = parent.pages[page] ?? null;
    }
    parent.pages[page] = parent.version;
  }

  #strike(fault: ForkFault): void {
    const host = this.host(fault.host ?? ROOT);
    this.trace.push(`  !! ${fault.kind} ${fault.host ?? ''} ${fault.ms}`);
    switch (fault.kind) {
      case 'killDaemon':
        return this.#killDaemon(host, fault.ms);
      case 'killHost':
        if (host === this.root) return;
        host.wasDown = true;
        for (const clone of host.clones.values()) clone.isAlive = false;
        host.images.clear();
        return this.#killDaemon(host, fault.ms);
      case 'killParent':
        this.killed.parent ||= this.parent.isAlive;
        this.parent.isAlive = false;
        return;
      case 'killClone': {
        const alive = this.clones.filter(({ isAlive }) => isAlive);
        const victim = alive.length === 0 ? undefined : this.chance.pick(alive);
        if (victim === undefined) return;
        victim.isAlive = false;
        this.killed.clones++;
        return;
      }
      case 'endGuest':
        return this.#endGuest(fault.guest);
      case 'fillDisk':
        host.isDiskFull = true;
        return this.#later(fault.ms, () => {
          host.isDiskFull = false;
        });
      case 'cutNetwork':
        host.isCut = true;
        return this.#later(fault.ms, () => {
          host.isCut = false;
        });
      case 'cancel':
        return this.onCancel();
      default: {
        const end = this.fanout.strike(fault.kind, host.name);
        if (end === null) this.#callFault = fault;
        else this.#later(fault.ms, end);
      }
    }
  }

  #killDaemon(host: ForkHost, ms: number): void {
    const { life } = host;
    if (life === null) return;
    host.life = null;
    host.agent = null;
    life.kill();
    this.#later(ms, () => this.onRestart(host));
  }

  /** A guest whose vCPUs stand still cannot end. */
  #endGuest(choice: GuestChoice | undefined): void {
    const { parent, clones } = this;
    const chosen = choice === undefined ? [parent, ...clones] : [this.#guest(choice)];
    const running = chosen.filter((vm) => vm?.isAlive === true && vm.state === 'running' && !vm.hasEnded);
    const victim = running.length === 0 ? undefined : this.chance.pick(running);
    if (victim === undefined) return;
    victim.hasEnded = true;
    if (victim === parent) {
      this.ended.parent = true;
      parent.state = 'paused';
    } else this.ended.clones++;
    const host = [...this.hosts.values()].find(({ clones: own }) =>
      [...own.values()].some((clone) => clone === victim),
    );
    const reap = (): void => {
      if ((host ?? this.root).life === null) this.#later(REAP_MS, reap);
      else victim.isAlive = false;
    };
    this.#later(REAP_MS, reap);
  }

  #guest(choice: GuestChoice): Parent | Clone | undefined {
    return choice === 'parent' ? this.parent : this.clones.find(({ index }) => index === choice);
  }

  #later(ms: number, act: () => void): void {
    this.#pending++;
    this.time.after(ms, () => {
      this.#pending--;
      act();
    });
  }

  /** Checks the invariants that hold at every moment. */
  #watch(): void {
    for (const { clones, images } of this.hosts.values()) {
      for (const { image, state, name, isAlive } of clones.values()) {
        const hasState = images.get(image)?.hasState === true && this.points.has(image);
        if (isAlive && state === 'running' && !hasState) this.fail(`${name} runs without a state`);
      }
      for (const [id, { pages }] of images) {
        const wanted = this.points.get(id) ?? [];
        if (pages.some((page, index) => page !== null && page !== wanted[index])) {
          this.fail('an image holds a page that was not written at the fork point');
        }
      }
    }
    this.#watchPause();
  }

  /** A parent that is to continue is stopped for at most 5 s while the daemon lives. */
  #watchPause(): void {
    const { parent } = this;
    const isMeantToRun = parent.isAlive && !parent.hasEnded && !parent.isFrozen;
    if (!isMeantToRun || parent.state === 'running' || this.root.life === null) {
      this.#pausedSinceMs = null;
      return;
    }
    this.#pausedSinceMs ??= this.time.nowMs;
    const ms = this.time.nowMs - this.#pausedSinceMs;
    if (ms > 5_000) this.fail(`the parent has stood still for ${ms} ms`);
  }
}

function newHost(name: string): ForkHost {
  return {
    name,
    forks: new Map(),
    images: new Map(),
    clones: new Map(),
    life: null,
    agent: null,
    isDiskFull: false,
    isCut: false,
    wasDown: false,
  };
}
