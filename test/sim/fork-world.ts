/**
 * The simulated world of a fork: one host, its parent VM, its clones and images, and the oracle that checks all of it
 * after every event. The state in this file survives the daemon; the state in an agent (fork-agent.ts) does not.
 */
import { Chance } from './chance.js';
import type { Disk } from './store.js';
import { type Life, Time } from './time.js';

/** So many pages that the parent has not written all of them before the clones run. */
export const PAGES = 24;
export const CLONES = 3;

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
  /** The version of the guest at the fork point; null before it. */
  forkVersion: number | null;
  /** The pages at the fork point, against which copies are checked. */
  wanted: readonly number[];
  hasState: boolean;
}

export interface Clone {
  readonly name: string;
  readonly image: string;
  isAlive: boolean;
  hasEnded: boolean;
  /** Its vCPUs have run. */
  hasRun: boolean;
  state: 'waiting' | 'loaded' | 'running';
}

export interface ForkNote {
  readonly fork: string;
  readonly isParentStopped: boolean;
  isCommitted: boolean;
}

export type ForkFaultKind =
  | 'killDaemon'
  | 'killParent'
  | 'killClone'
  /** A guest that runs ends by itself: it powers off, or panics. */
  | 'endGuest'
  | 'fillDisk'
  | 'cancel'
  | 'failCall'
  | 'failAnswer'
  | 'delayCall';

export interface ForkFault {
  /** Number of the event at which the fault strikes. */
  readonly at: number;
  readonly kind: ForkFaultKind;
  /** Duration of the fault, or the delay of a call. */
  readonly ms: number;
  /** The guest that ends. Absent: any that runs. */
  readonly guest?: GuestChoice;
}

/** The time that a daemon takes to end the QEMU of a guest that has ended. */
const REAP_MS = 3;

export class ForkWorld {
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
  readonly forks = new Map<string, ForkNote>();
  readonly images = new Map<string, Image>();
  readonly clones = new Map<string, Clone>();
  /** The forks whose commit has been written. They stay in it when they are finished. */
  readonly committed = new Set<string>();
  life: Life | null = null;
  isDiskFull = false;
  eventCount = 0;
  violation: string | null = null;
  readonly trace: string[] = [];
  /** The fault for the next call. */
  callFault: ForkFault | null = null;
  /** Deaths of QEMU that no engine could have prevented. */
  readonly killed = { parent: false, clones: 0 };
  /** Guests that have ended by themselves. */
  readonly ended = { parent: false, clones: 0 };
  onRestart: () => void = () => undefined;
  onCancel: () => void = () => undefined;
  #faults: ForkFault[];
  #pending = 0;
  #pausedSinceMs: number | null = null;

  constructor(seed: number, faults: readonly ForkFault[]) {
    this.chance = new Chance(seed);
    this.time = new Time(() => this.chance.next());
    this.#faults = [...faults];
  }

  /** Every fault has ended. */
  get isCalm(): boolean {
    return this.#pending === 0;
  }

  endFaults(): void {
    this.#faults = [];
    this.callFault = null;
  }

  fail(message: string): void {
    this.violation ??= message;
  }

  /** Resumes a clone, unless it has run. */
  run(clone: Clone): void {
    if (!this.committed.has(clone.image)) this.fail(`${clone.name} runs before its fork is committed`);
    if (clone.hasRun) return;
    clone.hasRun = true;
    clone.state = 'running';
  }

  /** Ends and removes a clone in an undo. */
  take(name: string): void {
    if (this.clones.get(name)?.hasRun === true) this.fail(`an undo takes ${name}, which has run`);
    this.clones.delete(name);
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
    const { parent } = this;
    if (!parent.isAlive || parent.state !== 'running') return;
    parent.version++;
    const page = this.chance.below(PAGES);
    const image = parent.protectedFor === null ? undefined : this.images.get(parent.protectedFor);
    if (image !== undefined && image.forkVersion !== null && image.pages[page] === null) {
      // Without a daemon the write waits.
      if (this.life === null) return;
      image.pages[page] = parent.pages[page] ?? null;
    }
    parent.pages[page] = parent.version;
  }

  #strike(fault: ForkFault): void {
    this.trace.push(`  !! ${fault.kind} ${fault.ms}`);
    switch (fault.kind) {
      case 'killDaemon': {
        const { life } = this;
        if (life === null) return;
        this.life = null;
        life.kill();
        return this.#later(fault.ms, () => this.onRestart());
      }
      case 'killParent':
        this.killed.parent ||= this.parent.isAlive;
        this.parent.isAlive = false;
        return;
      case 'killClone': {
        const alive = [...this.clones.values()].filter(({ isAlive }) => isAlive);
        const victim = alive.length === 0 ? undefined : this.chance.pick(alive);
        if (victim === undefined) return;
        victim.isAlive = false;
        this.killed.clones++;
        return;
      }
      case 'endGuest':
        return this.#endGuest(fault.guest);
      case 'fillDisk':
        this.isDiskFull = true;
        return this.#later(fault.ms, () => {
          this.isDiskFull = false;
        });
      case 'cancel':
        return this.onCancel();
      default:
        this.callFault = fault;
    }
  }

  /** A guest whose vCPUs stand still cannot end. */
  #endGuest(choice: GuestChoice | undefined): void {
    const { parent } = this;
    const clones = [...this.clones.values()];
    const chosen = choice === undefined ? [parent, ...clones] : [choice === 'parent' ? parent : clones[choice]];
    const running = chosen.filter((vm) => vm?.isAlive === true && vm.state === 'running' && !vm.hasEnded);
    const victim = running.length === 0 ? undefined : this.chance.pick(running);
    if (victim === undefined) return;
    victim.hasEnded = true;
    if (victim === parent) {
      this.ended.parent = true;
      parent.state = 'paused';
    } else this.ended.clones++;
    const reap = (): void => {
      if (this.life === null) this.#later(REAP_MS, reap);
      else victim.isAlive = false;
    };
    this.#later(REAP_MS, reap);
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
    for (const { image, state, name } of this.clones.values()) {
      const { hasState, forkVersion } = this.images.get(image) ?? { hasState: false, forkVersion: null };
      if (state === 'running' && (!hasState || forkVersion === null)) this.fail(`${name} runs without a state`);
    }
    for (const { pages, wanted } of this.images.values()) {
      if (pages.some((page, index) => page !== null && page !== wanted[index])) {
        this.fail('the image holds a page that was written after the fork point');
      }
    }
    this.#watchPause();
  }

  /** A parent that is to continue is stopped for at most 5 s while the daemon lives. */
  #watchPause(): void {
    const { parent } = this;
    const isMeantToRun = parent.isAlive && !parent.hasEnded && !parent.isFrozen;
    if (!isMeantToRun || parent.state === 'running' || this.life === null) {
      this.#pausedSinceMs = null;
      return;
    }
    this.#pausedSinceMs ??= this.time.nowMs;
    const ms = this.time.nowMs - this.#pausedSinceMs;
    if (ms > 5_000) this.fail(`the parent has stood still for ${ms} ms`);
  }
}
