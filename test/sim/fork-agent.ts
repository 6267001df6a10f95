/**
 * The host's part of forks in the simulation. It keeps the rules of ports/host.ts, and forgets what a real daemon
 * forgets when it dies.
 */

import { type ErrorCode, MigrationError } from '../../src/domain/errors.js';
import type { CloneFailure, CloneIdentity } from '../../src/domain/fork.js';
import type { ForkInventory } from '../../src/domain/host.js';
import type {
  CommittedFork,
  ForkPointReply,
  ForkPort,
  ForkProgress,
  LoadClonesReply,
  PrepareForkReply,
  PrepareForkRequest,
  RunClonesReply,
} from '../../src/engine/ports/fork.js';
import type { SourcePort } from '../../src/engine/ports/source.js';
import { CLONES, type Clone, type ForkNote, type ForkWorld, type Image, PAGES } from './fork-world.js';
import { vmSpec } from './spec.js';
import { type Life, NEVER } from './time.js';

const WORK_MS = 2;
/** Slow enough that the image still fills when the clones run. */
const PAGE_MS = 4;

export class SimForkAgent implements ForkPort, Pick<SourcePort, 'reserve' | 'unreserve'> {
  readonly #world: ForkWorld;
  readonly #life: Life;
  /** Forks that have ended. A late call does not bring them back. */
  readonly #closed = new Set<string>();

  constructor(world: ForkWorld, life: Life) {
    this.#world = world;
    this.#life = life;
  }

  /** Starts the daemon: it removes what was not committed, and continues the rest. It lets no clone run. */
  async start(): Promise<void> {
    for (const { fork, isCommitted } of this.#world.forks.values()) {
      if (isCommitted) void this.#fill(fork);
      // What cannot be undone yet stays, and the coordinator asks again.
      else await this.#remove(fork).catch(() => undefined);
    }
  }

  async forkInventory(): Promise<ForkInventory> {
    const { parent } = this.#world;
    return {
      vm: {
        spec: vmSpec,
        state: parent.isAlive ? parent.state : 'stopped',
        epoch: 1,
        owner: 'A',
        job: parent.job,
        qemuVersion: '7.2.22',
        accel: 'tcg',
        isRamShared: true,
        isRamNamedFile: true,
        migrationBlockers: [],
        ramAllocatedBytes: 2 ** 28,
        discardingDevices: [],
        image: null,
        identityIssue: null,
        fleetingDisks: [],
        exitCode: null,
      },
      image: null,
      escapingDevices: [],
      isWriteProtectSupported: true,
      hasPreload: true,
      isFilling: false,
      diskBlockers: [],
      imageBytesFree: 2 ** 34,
      memoryAvailableBytes: 2 ** 34,
      imageBytesNeeded: 2 ** 28,
      cloneBytesNeeded: 2 ** 24,
      warmCloneCount: 0,
      namesTaken: [],
    };
  }

  async reserve(_vm: string, job: string): Promise<void> {
    const { parent } = this.#world;
    this.#refuseClosed(job);
    if (parent.job !== null && parent.job !== job) throw failure('VM_BUSY', parent.job);
    parent.job = job;
    await this.#work('reserve');
  }

  async unreserve(_vm: string, job: string): Promise<void> {
    const { parent } = this.#world;
    this.#closed.add(job);
    if (parent.job === job) parent.job = null;
    await this.#work('unreserve');
  }

  async prepareClones(request: PrepareForkRequest): Promise<PrepareForkReply> {
    const { fork } = request;
    const { forks, images, clones } = this.#world;
    this.#refuseClosed(fork);
    await this.#write('prepare: fork noted');
    this.#refuseClosed(fork);
    if (!forks.has(fork)) forks.set(fork, { fork, isParentStopped: request.parentMode === 'stop', isCommitted: false });
    images.set(fork, { pages: Array(PAGES).fill(null), forkVersion: null, wanted: [], hasState: false });
    await this.#work('prepare: image made');
    for (let index = 0; index < CLONES; index++) {
      this.#refuseClosed(fork);
      const name = `clone-${index}`;
      clones.set(name, { name, image: fork, isAlive: true, hasEnded: false, hasRun: false, state: 'waiting' });
      await this.#work(`prepare: ${name} waits`);
    }
    this.#refuseClosed(fork);
    const identities = Array.from({ length: CLONES }, (_, index) => identity(index));
    return { image: fork, isWarm: false, clones: identities, failures: [] };
  }

  async armParent(fork: string): Promise<void> {
    this.#open(fork);
    this.#living();
    this.#world.parent.protectedFor = fork;
    await this.#work('arm: protected');
    this.#refuseClosed(fork);
  }

  async forkPoint(fork: string): Promise<ForkPointReply> {
    const note = this.#open(fork);
    const { parent } = this.#world;
    const image = this.#image(fork);
    this.#living();
    if (image.hasState) return { parentPauseMs: 1, deviceStateBytes: 1000, parts: [] };
    parent.state = 'paused';
    parent.isFrozen = note.isParentStopped;
    await this.#work('fork point: stopped');
    this.#refuseClosed(fork);
    this.#living();
    image.forkVersion = parent.version;
    image.wanted = [...parent.pages];
    await this.#work('fork point: state saved');
    this.#refuseClosed(fork);
    this.#living();
    image.hasState = true;
    if (note.isParentStopped) image.pages.splice(0, PAGES, ...parent.pages);
    else parent.state = 'running';
    await this.#work('fork point: resumed');
    if (!note.isParentStopped) void this.#fill(fork);
    return { parentPauseMs: 4, deviceStateBytes: 1000, parts: [] };
  }

  // The simulated fork has one host.

  async serveImage(): Promise<never> {
    throw failure('UNSUPPORTED', 'there is one host');
  }

  async connectImage(): Promise<never> {
    throw failure('UNSUPPORTED', 'there is one host');
  }

  async endImage(): Promise<void> {}

  async completeImage(): Promise<void> {}

  async forkDecision(): Promise<never> {
    throw failure('UNSUPPORTED', 'there is one host');
  }

  async sendForkState(): Promise<never> {
    throw failure('UNSUPPORTED', 'there is one host');
  }

  async loadClones(fork: string): Promise<LoadClonesReply> {
    this.#open(fork);
    for (const clone of this.#clonesOf(fork)) {
      this.#refuseClosed(fork);
      if (!clone.isAlive) throw failure('QEMU_GONE', `${clone.name} has ended`);
      clone.state = 'loaded';
      await this.#work(`load: ${clone.name} loaded`);
    }
    await this.#work('load: all loaded');
    return { failures: [] };
  }

  async commitFork(fork: string): Promise<void> {
    const note = this.#open(fork);
    await this.#write('commit', () => {
      this.#refuseClosed(fork);
      note.isCommitted = true;
      this.#world.committed.add(fork);
    });
  }

  async runClones(fork: string): Promise<RunClonesReply> {
    if (!this.#note(fork).isCommitted) throw failure('CONFLICT', 'the fork is not committed');
    const ready: { index: number; atMs: number }[] = [];
    const failures: CloneFailure[] = [];
    for (const [index, clone] of this.#clonesOf(fork).entries()) {
      if (!clone.hasRun && !clone.isAlive) {
        failures.push({ index, name: clone.name, error: failure('QEMU_GONE', `${clone.name} has ended`) });
        continue;
      }
      this.#world.run(clone);
      await this.#work(`run: ${clone.name} runs`);
      ready.push({ index, atMs: index });
    }
    await this.#work('run: all run');
    return { ready, failures };
  }

  async forkProgress(fork: string): Promise<ForkProgress> {
    this.#note(fork);
    const { pages } = this.#image(fork);
    const pagesDone = pages.filter((page) => page !== null).length;
    const state = pagesDone === PAGES ? 'complete' : 'filling';
    return {
      ...{ state, error: null, pagesTotal: PAGES, pagesDone, pageBytes: 4096, counters: {} },
      committed: this.#note(fork).isCommitted ? committedFork(fork, this.#clonesOf(fork)) : null,
    };
  }

  async finishFork(fork: string): Promise<void> {
    this.#note(fork);
    if (this.#image(fork).pages.includes(null)) throw failure('CONFLICT', 'pages are missing');
    const isWaiting = this.#clonesOf(fork).some(({ isAlive, hasRun }) => isAlive && !hasRun);
    if (isWaiting) throw failure('CONFLICT', 'clones have not run');
    this.#unprotect(fork);
    await this.#write('finish', () => this.#world.forks.delete(fork));
  }

  async discardFork(fork: string): Promise<void> {
    if (this.#world.forks.get(fork)?.isCommitted === true) throw failure('CONFLICT', 'the clones are VMs of their own');
    this.#closed.add(fork);
    await this.#remove(fork);
  }

  // ---- parts

  async #remove(fork: string): Promise<void> {
    const { parent, images, forks } = this.#world;
    const note = forks.get(fork);
    const ran = this.#clonesOf(fork).filter(({ hasRun }) => hasRun);
    if (ran.length > 0) throw failure('STEP_FAILED', `${ran.map(({ name }) => name).join(', ')} has run`);
    this.#unprotect(fork);
    if (note !== undefined && parent.isAlive && parent.state === 'paused') {
      // The QEMU of a guest that has ended refuses to run, until the daemon has ended it.
      if (parent.hasEnded) throw failure('STEP_FAILED', 'the guest has ended');
      parent.state = 'running';
      parent.isFrozen = false;
    }
    await this.#work('remove: parent runs');
    for (const { name } of this.#clonesOf(fork)) {
      this.#world.take(name);
      await this.#work(`remove: ${name} ended`);
    }
    images.delete(fork);
    await this.#work('remove: image removed');
    forks.delete(fork);
  }

  #unprotect(fork: string): void {
    const { parent } = this.#world;
    if (parent.protectedFor === fork) parent.protectedFor = null;
  }

  /** The copier. The parent's files remain when the parent dies. */
  async #fill(fork: string): Promise<void> {
    const { parent, images } = this.#world;
    for (let index = 0; index < PAGES; index++) {
      const image = images.get(fork);
      if (image === undefined) return;
      if (image.pages[index] !== null) continue;
      await this.#life.sleep(PAGE_MS);
      // The fork was discarded or finished meanwhile.
      if (!images.has(fork) || parent.protectedFor !== fork) return;
      // The parent may have written the page during the sleep, which has copied it.
      image.pages[index] ??= parent.pages[index] ?? null;
      this.#world.event(`page ${index}`);
      await this.#life.survive();
    }
  }

  /** Lets time pass, and may crash. Earlier effects have happened then; later ones have not. */
  async #work(label: string): Promise<void> {
    this.#world.event(label);
    await this.#life.sleep(WORK_MS);
    if (!this.#life.isAlive) await NEVER;
  }

  /** Writes a durable record. */
  async #write(label: string, act: () => unknown = () => undefined): Promise<void> {
    this.#world.event(`write ${label}`);
    await this.#life.survive();
    if (this.#world.isDiskFull) throw failure('NO_SPACE', 'full');
    act();
    await this.#work(`written ${label}`);
  }

  #clonesOf(fork: string): Clone[] {
    return [...this.#world.clones.values()].filter(({ image }) => image === fork);
  }

  #image(fork: string): Image {
    const image = this.#world.images.get(fork);
    if (image === undefined) throw failure('NOT_FOUND', `no image ${fork}`);
    return image;
  }

  #note(fork: string): ForkNote {
    const note = this.#world.forks.get(fork);
    if (note === undefined) throw failure('NOT_FOUND', `no fork ${fork}`);
    return note;
  }

  #open(fork: string): ForkNote {
    this.#refuseClosed(fork);
    return this.#note(fork);
  }

  #living(): void {
    const { isAlive, hasEnded } = this.#world.parent;
    if (!isAlive || hasEnded) throw failure('QEMU_GONE', 'the parent has ended');
  }

  #refuseClosed(key: string): void {
    if (this.#closed.has(key)) throw failure('CONFLICT', `${key} is over`);
  }
}

function identity(index: number): CloneIdentity {
  return { index, cloneCount: CLONES, name: `clone-${index}`, uuid: '', vmGenerationId: '', macs: {} };
}

function committedFork(image: string, all: readonly Clone[]): CommittedFork {
  const clones = Array.from({ length: CLONES }, (_, index) => identity(index));
  const ran = clones.filter(({ index }) => all[index]?.hasRun === true);
  const ready = ran.map(({ index }) => ({ index, at: '2000-01-01T00:00:00Z' }));
  return { image, isWarm: false, clones, failures: [], parentPauseMs: 4, deviceStateBytes: 1000, ready };
}

function failure(code: ErrorCode, message: string): MigrationError {
  return new MigrationError(code, message);
}
