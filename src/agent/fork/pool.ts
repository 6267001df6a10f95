/**
 * Sets of QEMUs that wait for future forks. A fork that matches takes a whole set, and the set is made again in the
 * background when no job runs. Each process of a set costs some 16 MiB of its own, so their number is limited. All sets
 * are ended when the host runs short of memory: little is available, or (PSI) tasks wait for it.
 *
 * The list of sets that users have asked for is durable. The processes do not outlive the daemon's restart: the next
 * daemon ends them (they are incoming VMs of an image that no fork has committed) and makes new ones.
 */

import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { WarmRequest, WarmSetView } from '../../domain/fork.js';
import { resourceClashes } from '../../domain/host-resource.js';
import { writeDurably } from '../../durable/durable-file.js';
import { unreadable } from '../../durable/record-files.js';
import { checkVersion, seal, unseal } from '../../durable/sealed.js';
import { POOL_FILE } from '../../durable/state-format.js';
import { parseKept } from '../../kit/unknown-keys.js';
import { cloneDisks, cloneMemory, cloneNetwork, parentMode } from '../../schemas/words.js';
import { type MemoryBounds, type MemoryReading, memoryState } from '../vm/memory-pressure.js';
import type { ManagedVm } from '../vm/vms.js';
import { cloneNames } from './clones/names.js';
import type { ForkContext } from './context.js';
import { newImage, ramOfImage, shapeOf } from './shape.js';
import { type CloneShape, endClones, makeWaitingSet, type WaitingSet } from './waiting-set.js';

/** All sets are ended when the host's memory is outside these bounds. */
export interface PoolConfig extends MemoryBounds {
  /** The limit of waiting QEMUs in all sets together. */
  readonly processesMax: number;
}

export interface PooledSet extends WaitingSet {
  readonly image: string;
}

interface Entry {
  readonly image: string;
  readonly key: string;
  readonly request: WarmRequest;
  readonly cancel: AbortController;
  /** Null while the set is being made. */
  set: PooledSet | null;
}

export interface PoolOptions {
  readonly stateDir: string;
  readonly config: PoolConfig;
  readonly randomId: () => string;
  readonly readMemory: () => Promise<MemoryReading>;
}

const UPKEEP_MS = 2_000;
/** The memory that a waiting QEMU takes. */
const PROCESS_BYTES = 20 * 1024 * 1024;

const VERSION = 1;

const requestSchema: z.ZodType<WarmRequest> = z.strictObject({
  vm: z.string(),
  cloneCount: z.int().min(1),
  namePrefix: z.string().nullable(),
  parentMode,
  memory: cloneMemory,
  network: cloneNetwork,
  disks: cloneDisks,
});

const wantedSchema = z.strictObject({ version: z.literal(VERSION), wanted: z.array(requestSchema) });

/** Returns the sets that users have asked for. Throws CORRUPT if the file is damaged. */
export async function readWanted(path: string): Promise<readonly WarmRequest[]> {
  const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return null;
    throw error;
  });
  if (text === null) return [];
  const json = unseal(text, path);
  checkVersion(json, VERSION, path);
  return parseKept(wantedSchema, json).wanted;
}

export class Pool {
  readonly #context: ForkContext;
  readonly #config: PoolConfig;
  readonly #path: string;
  readonly #randomId: () => string;
  readonly #readMemory: () => Promise<MemoryReading>;
  readonly #entries = new Map<string, Entry>();
  #wanted: readonly WarmRequest[] = [];
  /** Why the wanted sets could not be made again, by request. */
  readonly #failures = new Map<string, string>();
  #upkeep: NodeJS.Timeout | null = null;
  #working: Promise<void> = Promise.resolve();
  #isClosed = false;

  constructor(context: ForkContext, options: PoolOptions) {
    this.#context = context;
    this.#readMemory = options.readMemory;
    this.#config = options.config;
    this.#randomId = options.randomId;
    this.#path = join(options.stateDir, POOL_FILE);
    context.vms.on('exit', this.#onExit);
  }

  /** Makes the sets that were wanted before the daemon's restart, in the background. */
  async start(): Promise<void> {
    try {
      this.#wanted = await readWanted(this.#path);
    } catch (cause) {
      const err = unreadable(`${this.#path} is not a valid list of pool requests`, cause);
      this.#context.log.error({ err }, 'the pool starts empty: no set of waiting QEMUs is made again');
    }
    this.#startUpkeep();
  }

  /** Leaves the waiting QEMUs running. The next daemon ends them. */
  async close(): Promise<void> {
    this.#isClosed = true;
    this.#context.vms.off('exit', this.#onExit);
    if (this.#upkeep !== null) clearInterval(this.#upkeep);
    for (const entry of this.#entries.values()) if (entry.set === null) entry.cancel.abort();
    await this.#working;
  }

  has(image: string): boolean {
    return this.#entries.has(image);
  }

  list(): WarmSetView[] {
    return [...this.#entries.values()].map(({ image, request, set }) => {
      const { vm, cloneCount, namePrefix, memory, network, disks } = request;
      const readyCount = set?.clones.length ?? this.#context.images.clonesOf(image).length;
      return {
        ...{ image, vm, cloneCount, namePrefix, memory, network, disks, readyCount },
        state: set === null ? 'starting' : 'ready',
      };
    });
  }

  /** Resolves when all QEMUs of the set wait. From then on the pool keeps such a set, also after a restart. */
  async warm(request: WarmRequest): Promise<WarmSetView> {
    const entry = await this.#make(request);
    if (!this.#wanted.some((wanted) => sameRequest(wanted, request))) await this.#setWanted([...this.#wanted, request]);
    const view = this.list().find(({ image }) => image === entry.image);
    if (view === undefined) {
      throw new MigrationError('CANCELLED', `the set of waiting QEMUs for ${request.vm} was removed meanwhile`);
    }
    return view;
  }

  /** Ends the sets of one VM, or all sets (null). The pool does not make them again. */
  async drain(vm: string | null): Promise<{ readonly endedCount: number }> {
    await this.#setWanted(this.#wanted.filter((request) => vm !== null && request.vm !== vm));
    let endedCount = 0;
    for (const entry of [...this.#entries.values()]) {
      if (vm !== null && entry.request.vm !== vm) continue;
      endedCount += entry.set?.clones.length ?? 0;
      await this.#remove(entry);
    }
    return { endedCount };
  }

  /** Returns the set that a fork of this VM would take, or null. */
  find(parent: ManagedVm, question: Omit<CloneShape, 'parent' | 'accel'>): PooledSet | null {
    const { cloneCount, namePrefix, parentMode, memory, network, disks } = question;
    const { spec, accel } = parent;
    const shape = { parent: spec, accel, cloneCount, namePrefix, parentMode, memory, network, disks };
    return this.#entryFor(shape)?.set ?? null;
  }

  /** Returns why a set of the VM does not fit the fork, or null if the pool has no set of it. */
  whyCold({ spec, accel }: ManagedVm, question: Omit<CloneShape, 'parent' | 'accel'>): string | null {
    const sets = [...this.#entries.values()].filter(({ request }) => request.vm === spec.name);
    const [nearest] = sets
      .map(({ key, request, set }) => ({ key, set, differences: differencesOf(request, question) }))
      .sort((a, b) => a.differences.length - b.differences.length);
    if (nearest === undefined) return null;
    const { differences, key, set } = nearest;
    const prefix = `the waiting processes of ${spec.name} cannot be used`;
    if (differences.length > 0) return `${prefix}: they wait for ${differences.join(', ')}`;
    if (set === null) return `${prefix}: they are still being started`;
    return key === keyOf({ ...question, parent: spec, accel })
      ? `${prefix}: one of them has ended`
      : `${prefix}: the VM has changed since they were started, and new ones will be`;
  }

  /** Takes a matching set out of the pool, and the caller owns it. Returns null if there is none. */
  claim(shape: CloneShape): PooledSet | null {
    const entry = this.#entryFor(shape);
    if (entry === null) return null;
    this.#entries.delete(entry.image);
    return entry.set;
  }

  async #dispose(set: PooledSet): Promise<void> {
    await endClones(this.#context, set.clones);
    await this.#context.images.delete(set.image);
  }

  #entryFor(shape: CloneShape): Entry | null {
    const key = keyOf(shape);
    const isWaiting = ({ set }: Entry) => set?.clones.every(({ vm }) => vm.state === 'incoming') === true;
    return [...this.#entries.values()].find((entry) => entry.key === key && isWaiting(entry)) ?? null;
  }

  async #make(request: WarmRequest): Promise<Entry> {
    const { images, vms } = this.#context;
    const { vm, ...asked } = request;
    const { shape, parent } = shapeOf(this.#context, { ...asked, vm, image: null });
    const key = keyOf(shape);
    const existing = [...this.#entries.values()].find((entry) => entry.key === key);
    if (existing !== undefined) return existing;
    const { hostResources } = vms.backend.devicesIn(shape.parent);
    const refusals = [...resourceClashes(shape.parent, shape.network, hostResources)];
    if (refusals.length > 0) {
      const reasons = refusals.map(({ reason }) => reason).join('; ');
      throw new MigrationError('PREFLIGHT_REFUSED', `no process of ${vm} can wait: ${reasons}`, { details: refusals });
    }
    this.#refuseTakenNames(request);
    const processCount = [...this.#entries.values()].reduce((sum, entry) => sum + entry.request.cloneCount, 0);
    if (processCount + request.cloneCount > this.#config.processesMax) {
      const { processesMax } = this.#config;
      throw new MigrationError(
        'PREFLIGHT_REFUSED',
        `the pool has ${processCount} QEMUs; ${request.cloneCount} more exceed the limit of ${processesMax}`,
        { remedy: 'remove unused sets with "vmctl pool drain", or raise pool.processesMax' },
      );
    }
    const reading = await this.#readMemory();
    const availableBytes = reading.availableBytes - request.cloneCount * PROCESS_BYTES;
    if (memoryState({ ...reading, availableBytes }, this.#config) !== 'ample') {
      throw new MigrationError(
        'PREFLIGHT_REFUSED',
        `${request.cloneCount} waiting QEMUs would leave too little memory`,
      );
    }
    const image = this.#randomId();
    const entry: Entry = { image, key, request, cancel: new AbortController(), set: null };
    this.#entries.set(image, entry);
    try {
      const record = newImage(this.#context, image, shape, { qemuVersion: parent?.qemuVersion ?? '' });
      await images.create(record, ramOfImage(shape, parent));
      const options = { fork: image, isPartialAllowed: false, isReplacing: false, signal: entry.cancel.signal };
      const set = await makeWaitingSet(this.#context, record, shape, options);
      entry.set = { ...set, image };
      if (!this.#entries.has(image) || !vms.has(vm)) {
        throw new MigrationError('CANCELLED', `the set of waiting QEMUs for ${vm} was removed meanwhile`);
      }
      this.#startUpkeep();
      return entry;
    } catch (error) {
      this.#entries.delete(image);
      if (entry.set !== null) await this.#dispose(entry.set);
      else await images.delete(image);
      throw error;
    }
  }

  /** A set would only find out by its first start, and the upkeep would try that again and again. */
  #refuseTakenNames(request: WarmRequest): void {
    const { vms } = this.#context;
    if (request.namePrefix === null) return;
    const taken = cloneNames({ ...request, fork: '' }, request.vm).find((name) => vms.has(name));
    if (taken === undefined) return;
    throw new MigrationError('CONFLICT', `no process can wait as ${taken}: a VM of that name is there`, {
      remedy: `use another --name, or remove that VM: "vmctl stop ${taken}"`,
    });
  }

  /** Takes a set out of the pool and ends its processes. If the set is still being made, `#make` ends them. */
  async #remove(entry: Entry): Promise<void> {
    this.#entries.delete(entry.image);
    entry.cancel.abort();
    if (entry.set !== null) await this.#dispose(entry.set);
  }

  async #setWanted(wanted: readonly WarmRequest[]): Promise<void> {
    this.#wanted = wanted;
    this.#failures.clear();
    await writeDurably(this.#path, seal({ version: VERSION, wanted }));
    this.#startUpkeep();
  }

  /** Starts the periodic upkeep if the pool wants or has a set. */
  #startUpkeep(): void {
    const isNeeded = this.#wanted.length > 0 || this.#entries.size > 0;
    if (!isNeeded || this.#isClosed || this.#upkeep !== null) return;
    this.#upkeep = setInterval(() => {
      this.#working = this.#working
        .then(() => this.#maintain())
        .catch((error: unknown) => {
          this.#context.log.warn({ err: toMigrationError(error) }, 'a set of waiting QEMUs cannot be made or removed');
        });
    }, UPKEEP_MS);
    this.#upkeep.unref();
  }

  async #maintain(): Promise<void> {
    const { vms, log } = this.#context;
    if (this.#isClosed) return;
    const reading = await this.#readMemory();
    const state = memoryState(reading, this.#config);
    if (state === 'short') {
      if (this.#entries.size > 0) log.warn(reading, 'memory is short: waiting QEMUs are ended');
      for (const entry of [...this.#entries.values()]) await this.#remove(entry);
      return;
    }
    // The pool leaves the processors to a job in progress.
    if (vms.all().some(({ job }) => job !== null)) return;
    await this.#removeStale();
    if (state === 'tight') return;
    for (const request of this.#wanted) {
      if (this.#isClosed || !vms.has(request.vm) || vms.get(request.vm).state !== 'running') continue;
      await this.#makeAgain(request);
    }
  }

  /** Logs a failure once, not at every try: an ended VM may have a name of the set for days. */
  async #makeAgain(request: WarmRequest): Promise<void> {
    const key = JSON.stringify(request);
    try {
      await this.#make(request);
      this.#failures.delete(key);
    } catch (thrown) {
      const err = toMigrationError(thrown);
      if (this.#failures.get(key) === err.message) return;
      this.#failures.set(key, err.message);
      this.#context.log.warn({ vm: request.vm, err }, 'a set of waiting QEMUs cannot be made; it is tried again');
    }
  }

  /** Removes the sets of VMs that are gone or whose shape has changed. */
  async #removeStale(): Promise<void> {
    const { vms } = this.#context;
    for (const entry of [...this.#entries.values()]) {
      const { vm, ...shape } = entry.request;
      const parent = vms.has(vm) ? vms.get(vm) : null;
      const isFit = parent !== null && keyOf({ ...shape, parent: parent.spec, accel: parent.accel }) === entry.key;
      if (entry.set !== null && !isFit) await this.#remove(entry);
    }
  }

  readonly #onExit = (name: string): void => {
    const { vms, log } = this.#context;
    const image = vms.has(name) ? vms.get(name).image : null;
    const entry = image === null ? undefined : this.#entries.get(image);
    if (entry === undefined) return;
    this.#remove(entry).catch((error: unknown) => {
      const err = toMigrationError(error);
      log.error({ image, err }, 'one QEMU of a waiting set has ended, and the others cannot be removed');
    });
  };
}

function keyOf(shape: CloneShape): string {
  const { parent, accel, cloneCount, namePrefix, parentMode, memory, network, disks } = shape;
  return JSON.stringify([parent, accel, cloneCount, namePrefix, parentMode, memory, network, disks]);
}

/** Returns what the waiting processes were started for, where the fork asks for something else. */
function differencesOf(waiting: WarmRequest, asked: Omit<CloneShape, 'parent' | 'accel'>): string[] {
  const names = (prefix: string | null) => (prefix === null ? 'the default names' : `--name ${prefix}`);
  return [
    ...(waiting.cloneCount === asked.cloneCount ? [] : [`--clones ${waiting.cloneCount}`]),
    ...(waiting.namePrefix === asked.namePrefix ? [] : [names(waiting.namePrefix)]),
    ...(waiting.parentMode === asked.parentMode ? [] : [`--parent ${waiting.parentMode}`]),
    ...(waiting.memory === asked.memory ? [] : [`--memory ${waiting.memory}`]),
    ...(waiting.network === asked.network ? [] : [`--network ${waiting.network}`]),
    ...(waiting.disks === asked.disks ? [] : [`--disks ${waiting.disks}`]),
  ];
}

function sameRequest(a: WarmRequest, b: WarmRequest): boolean {
  const flat = ({ vm, cloneCount, namePrefix, parentMode, memory, network, disks }: WarmRequest) =>
    JSON.stringify([vm, cloneCount, namePrefix, parentMode, memory, network, disks]);
  return flat(a) === flat(b);
}
