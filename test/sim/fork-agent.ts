/** One host's part of forks in the simulation. It keeps the rules of ports/fork.ts, and forgets when it dies. */
import type { CloneFailure } from '../../src/domain/fork.js';
import type { ForkInventory } from '../../src/domain/host.js';
import type { Transport } from '../../src/domain/transport.js';
import type {
  ForkDecision,
  ForkPointReply,
  ForkPort,
  ForkProgress,
  ForkQuestion,
  ImageDigests,
  ImageHolder,
  LoadClonesReply,
  PrepareForkReply,
  PrepareForkRequest,
  RunClonesReply,
} from '../../src/engine/ports/fork.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { SourcePort } from '../../src/engine/ports/source.js';
import { HostFanout } from './fork/host-fanout.js';
import { committedFork, failure, identity } from './fork/replies.js';
import { ForkPages } from './fork-pages.js';
import { type Clone, type ForkHost, type ForkNote, type ForkWorld, type Image, PAGES } from './fork-world.js';
import { forkFacts } from './spec.js';
import { type Life, NEVER } from './time.js';

const WORK_MS = 2;

/** How an agent that is broken on purpose breaks the rules. */
export type AgentSabotage = 'startByItself' | 'discardWhenOpen' | 'givePagesEarly' | 'rememberForEver' | 'runTooSoon';

export interface ForkAgentParts {
  readonly world: ForkWorld;
  readonly host: ForkHost;
  readonly life: Life;
  /** The calls of this daemon to another one. */
  readonly peer: (host: string) => HostPort;
  readonly sabotage: AgentSabotage | null;
}

export class SimForkAgent implements ForkPort, Pick<SourcePort, 'reserve' | 'unreserve'> {
  readonly #world: ForkWorld;
  readonly #host: ForkHost;
  readonly #life: Life;
  readonly #pages: ForkPages;
  readonly fanout: HostFanout;
  readonly #sabotage: AgentSabotage | null;
  readonly #peer: ForkAgentParts['peer'];
  /** Forks that have ended. A late call does not bring them back. */
  readonly #closed = new Set<string>();
  /** Committed forks that are over here. */
  readonly #finished = new Set<string>();
  readonly #pointing = new Map<string, Promise<ForkPointReply>>();

  constructor(parts: ForkAgentParts) {
    const { world, host, life, sabotage } = parts;
    this.#world = world;
    this.#host = host;
    this.#life = life;
    this.#sabotage = sabotage;
    this.#peer = parts.peer;
    this.fanout = new HostFanout(parts);
    this.#pages = new ForkPages({
      ...parts,
      fanout: this.fanout,
      discard: (fork) => this.discardFork(fork),
      isOver: (decision) => decision === 'discarded' || (sabotage === 'discardWhenOpen' && decision === 'open'),
    });
  }

  /** Starts the daemon: it removes what was not committed, and continues the rest. It lets no clone run. */
  async start(): Promise<void> {
    const { forks, images, clones } = this.#host;
    for (const note of [...forks.values()]) {
      const { fork, image, isCommitted, isPrepared, origin } = note;
      const isUndecided = origin !== null && isPrepared;
      if (origin !== null && !images.has(image)) {
        // The host has been down: nothing of its part is left but the records of clones that have run.
        for (const { name, hasRun } of this.#clonesOf(fork)) if (!hasRun) clones.delete(name);
        forks.delete(fork);
      } else if (isCommitted && origin === null) void this.#pages.fill(note);
      else if (isCommitted) void this.#pages.read(note);
      else if (isUndecided) {
        if (this.#sabotage === 'startByItself') for (const clone of this.#clonesOf(fork)) this.#world.run(clone);
        void this.#pages.read(note);
        void this.#pages.askUntilDecided(note);
      }
      // What cannot be undone yet stays, and the coordinator asks again.
      else await this.#remove(fork).catch(() => undefined);
    }
  }

  async forkInventory({ vm, origin, image }: ForkQuestion): Promise<ForkInventory> {
    const { parent, root } = this.#world;
    const isThere = image !== null && root.images.has(image);
    return forkFacts({
      state: vm === null || parent.isAlive ? parent.state : 'stopped',
      job: parent.job,
      image: isThere && origin === undefined ? image : null,
    });
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
    const { fork, origin, share } = request;
    const { forks, images, clones } = this.#host;
    this.#refuseClosed(fork);
    if (this.#finished.has(fork)) throw failure('CONFLICT', `${fork} is over`);
    await this.#write('prepare: fork noted');
    this.#refuseClosed(fork);
    const image = origin?.image ?? request.image ?? fork;
    const { first, count } = share ?? { first: 0, count: request.cloneCount };
    const note: ForkNote = forks.get(fork) ?? {
      ...{ fork, image, first, count, origin: origin?.host ?? null, isPrepared: false, isCommitted: false },
      isOwnImage: !images.has(image),
      isParentStopped: request.vm !== null && request.parentMode === 'stop',
      isPartial: request.isPartialAllowed,
      fanout: request.fanout ?? null,
    };
    forks.set(fork, note);
    if (!images.has(image)) images.set(image, { pages: Array(PAGES).fill(null), hasState: false });
    await this.#work('prepare: image made');
    for (let index = first; index < first + count; index++) {
      this.#refuseClosed(fork);
      const name = `clone-${index}`;
      if (clones.has(name)) continue;
      const alive = { isAlive: true, hasEnded: false, hasRun: false, state: 'waiting' } as const;
      clones.set(name, { index, name, fork, image, ...alive });
      await this.#work(`prepare: ${name} waits`);
    }
    await this.#write('prepared');
    this.#refuseClosed(fork);
    note.isPrepared = true;
    if (origin !== undefined) void this.#pages.askUntilDecided(note);
    return { image, isWarm: false, clones: this.#clonesOf(fork).map(identity), failures: [] };
  }

  async armParent(fork: string): Promise<void> {
    this.#open(fork);
    this.#living();
    this.#world.parent.protectedFor = fork;
    await this.#work('arm: protected');
    this.#refuseClosed(fork);
  }

  forkPoint(fork: string): Promise<ForkPointReply> {
    const pointing = this.#pointing.get(fork) ?? this.#point(fork);
    this.#pointing.set(fork, pointing);
    return pointing;
  }

  async #point(fork: string): Promise<ForkPointReply> {
    const note = this.#open(fork);
    const { parent, points } = this.#world;
    const image = this.#image(note);
    this.#living();
    parent.state = 'paused';
    parent.isFrozen = note.isParentStopped;
    await this.#work('fork point: stopped');
    this.#refuseClosed(fork);
    this.#living();
    points.set(note.image, [...parent.pages]);
    await this.#work('fork point: state saved');
    this.#refuseClosed(fork);
    this.#living();
    image.hasState = true;
    if (note.isParentStopped) image.pages.splice(0, PAGES, ...parent.pages);
    else parent.state = 'running';
    await this.#work('fork point: resumed');
    if (!note.isParentStopped) void this.#pages.fill(note);
    return { parentPauseMs: 4, deviceStateBytes: 1000, parts: [] };
  }

  async serveImage(image: string, reader: string, _transport: Transport): Promise<ImageHolder> {
    const { parent } = this.#world;
    const found = this.#host.images.get(image);
    if (found === undefined) throw failure('NOT_FOUND', `no image ${image}`);
    const isServed = found.hasState || parent.protectedFor === image || this.#sabotage === 'givePagesEarly';
    if (!isServed) throw failure('CONFLICT', `image ${image} is not captured yet`);
    if (this.#sabotage === 'givePagesEarly') this.#world.host(reader).images.get(image)?.pages.fill(1);
    this.#world.fanout.noteReader(image, reader);
    await this.#work(`serves ${reader}`);
    return { session: '', token: '', endpoint: { transport: 'tcp', host: '', port: 1, keys: [] } };
  }

  async imageDigests(): Promise<ImageDigests> {
    return { digests: null };
  }

  async endImage(): Promise<void> {}
  async completeImage(): Promise<void> {}

  async connectImage(fork: string, transport: Transport): Promise<void> {
    const note = this.#open(fork);
    await this.#pages.connect(note, transport);
    this.#refuseClosed(fork);
    void this.#pages.read(note);
    await this.#work('connected');
  }

  async sendForkState(fork: string, host: string): Promise<LoadClonesReply> {
    const note = this.#open(fork);
    if (!this.#image(note).hasState) throw failure('CONFLICT', 'the state is not saved');
    await this.#work(`state to ${host}`);
    const { life, forks, images } = this.#world.host(host);
    if (life === null || !this.#world.isLinked(this.#host.name, host)) throw failure('UNREACHABLE', host);
    const image = forks.has(fork) ? images.get(note.image) : undefined;
    if (image === undefined) throw failure('NOT_FOUND', `no fork ${fork} on ${host}`);
    image.hasState = true;
    return this.#peer(host).forks.loadClones(fork);
  }

  async loadClones(fork: string): Promise<LoadClonesReply> {
    const note = this.#open(fork);
    if (note.isCommitted) return { failures: [] };
    if (!this.#image(note).hasState) throw failure('CONFLICT', 'there is no device state');
    const failures: CloneFailure[] = [];
    for (const clone of this.#clonesOf(fork)) {
      if (note.origin !== null && !(await this.#pages.reaches(note))) throw failure('CONFLICT', `${fork} is over`);
      this.#refuseClosed(fork);
      const { index, name, isAlive } = clone;
      if (!isAlive) {
        const error = failure('QEMU_GONE', `${name} has ended`);
        if (!note.isPartial) throw error;
        failures.push({ index, name, error });
        this.#host.clones.delete(name);
        continue;
      }
      if (clone.state === 'waiting') clone.state = 'loaded';
      await this.#work(`load: ${clone.name} loaded`);
    }
    await this.#work('load: all loaded');
    return { failures };
  }

  async commitFork(fork: string): Promise<void> {
    const note = this.#open(fork);
    if (note.isCommitted) return;
    if (this.#clonesOf(fork).some(({ state }) => state === 'waiting')) throw failure('CONFLICT', 'not loaded');
    await this.#write('commit', () => {
      this.#refuseClosed(fork);
      note.isCommitted = true;
      if (note.origin === null) this.#world.commit(fork);
    });
  }

  async runClones(fork: string, decision?: 'committed'): Promise<RunClonesReply> {
    const isTold = decision === 'committed' && this.#open(fork).origin !== null;
    if (isTold && this.#sabotage === 'runTooSoon') for (const clone of this.#clonesOf(fork)) this.#world.run(clone);
    if (isTold) await this.commitFork(fork);
    if (!this.#open(fork).isCommitted) throw failure('CONFLICT', 'the fork is not committed');
    const ready: { index: number; atMs: number }[] = [];
    const failures: CloneFailure[] = [];
    for (const clone of this.#clonesOf(fork)) {
      const { index, name } = clone;
      if (!clone.hasRun && !clone.isAlive) {
        failures.push({ index, name, error: failure('QEMU_GONE', `${name} has ended`) });
        continue;
      }
      this.#world.run(clone);
      await this.#work(`run: ${name} runs`);
      ready.push({ index, atMs: index });
    }
    await this.#work('run: all run');
    return { ready, failures };
  }

  async forkProgress(fork: string): Promise<ForkProgress> {
    const note = this.#open(fork);
    const { pages } = this.#image(note);
    const pagesDone = pages.filter((page) => page !== null).length;
    const state = pagesDone === PAGES ? 'complete' : 'filling';
    return {
      ...{ state, error: null, pagesTotal: PAGES, pagesDone, pageBytes: 4096, ...this.fanout.progress(fork) },
      committed: note.isCommitted ? committedFork(note, this.#clonesOf(fork)) : null,
    };
  }

  async finishFork(fork: string): Promise<void> {
    const note = this.#host.forks.get(fork);
    if (note === undefined) return;
    if (!note.isCommitted) throw failure('CONFLICT', 'the fork is not committed');
    if (this.#image(note).pages.includes(null)) throw failure('CONFLICT', 'pages are missing');
    const isWaiting = this.#clonesOf(fork).some(({ isAlive, hasRun }) => isAlive && !hasRun);
    if (isWaiting) throw failure('CONFLICT', 'clones have not run');
    this.#unprotect(note);
    await this.#write('finish', () => this.#host.forks.delete(fork));
    this.#finished.add(fork);
  }

  async forkDecision(fork: string): Promise<{ readonly decision: ForkDecision }> {
    const note = this.#host.forks.get(fork);
    const isRemembered = this.#sabotage === 'rememberForEver' && this.#world.committed.has(fork);
    // Whoever asks after the end of a committed fork has no part in it: all others have committed by then.
    if (note === undefined) return { decision: isRemembered ? 'committed' : 'discarded' };
    return { decision: note.isCommitted ? 'committed' : 'open' };
  }

  async discardFork(fork: string): Promise<void> {
    if (this.#host.forks.get(fork)?.isCommitted === true) throw failure('CONFLICT', 'the clones are VMs of their own');
    this.#closed.add(fork);
    await this.#remove(fork);
  }

  async #remove(fork: string): Promise<void> {
    const { parent } = this.#world;
    const { images, forks } = this.#host;
    const note = forks.get(fork);
    const ran = this.#clonesOf(fork).filter(({ hasRun }) => hasRun);
    if (ran.length > 0) throw failure('STEP_FAILED', `${ran.map(({ name }) => name).join(', ')} has run`);
    if (note?.origin === null) {
      this.#unprotect(note);
      if (note.image === fork && parent.isAlive && parent.state === 'paused') {
        // The QEMU of a guest that has ended refuses to run, until the daemon has ended it.
        if (parent.hasEnded) throw failure('STEP_FAILED', 'the guest has ended');
        parent.state = 'running';
        parent.isFrozen = false;
      }
      await this.#work('remove: parent runs');
    }
    for (const { name } of this.#clonesOf(fork)) {
      this.#world.take(this.#host, name);
      await this.#work(`remove: ${name} ended`);
    }
    if (note?.isOwnImage === true) {
      await this.fanout.close(note.image);
      images.delete(note.image);
    }
    await this.#work('remove: image removed');
    forks.delete(fork);
  }

  #unprotect({ image }: ForkNote): void {
    const { parent } = this.#world;
    if (parent.protectedFor === image) parent.protectedFor = null;
  }

  /** Lets time pass, and may crash. Earlier effects have happened then; later ones have not. */
  async #work(label: string): Promise<void> {
    this.#world.event(`${this.#host.name} ${label}`);
    await this.#life.sleep(WORK_MS);
    if (!this.#life.isAlive) await NEVER;
  }

  /** Writes a durable record. */
  async #write(label: string, act: () => unknown = () => undefined): Promise<void> {
    this.#world.event(`${this.#host.name} write ${label}`);
    await this.#life.survive();
    if (this.#host.isDiskFull) throw failure('NO_SPACE', 'full');
    act();
    await this.#work(`written ${label}`);
  }

  #clonesOf(fork: string): Clone[] {
    return [...this.#host.clones.values()].filter((clone) => clone.fork === fork);
  }

  #image({ image }: ForkNote): Image {
    const found = this.#host.images.get(image);
    if (found === undefined) throw failure('NOT_FOUND', `no image ${image}`);
    return found;
  }

  #open(fork: string): ForkNote {
    this.#refuseClosed(fork);
    const note = this.#host.forks.get(fork);
    if (note === undefined) throw failure('NOT_FOUND', `no fork ${fork}`);
    return note;
  }

  #living(): void {
    const { isAlive, hasEnded } = this.#world.parent;
    if (!isAlive || hasEnded) throw failure('QEMU_GONE', 'the parent has ended');
  }

  #refuseClosed(key: string): void {
    if (this.#closed.has(key)) throw failure('CONFLICT', `${key} is over`);
  }
}
