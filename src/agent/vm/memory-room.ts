/**
 * The memory of this host that is not promised yet. Guest memory is in sparse files, so a file system that has room now
 * may be full when the guests write to what they were given. A guest that then touches a new page dies by SIGBUS. So
 * each VM counts with its whole memory, from the moment it exists here until it has ended, whatever it has touched.
 *
 * No promise is stored. The promises are the VMs and images that exist, so no crash can leave a wrong one, and a
 * restarted daemon knows them when it has found its VMs. `admit` lets one caller at a time look, and counts its VM from
 * then on.
 *
 * What other programs use is known, what they will use is not. Daemons that share a machine, or a file system, need
 * `budgetBytes`, which bounds what each of them promises.
 */
import { readFileSync, statSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { MigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import { hugePagesFree, memoryAvailableBytes, ramFileFreeBytes } from './ram-files.js';
import { type RamPlace, SMALL_PAGE_BYTES } from './ram-place.js';
import type { Vm } from './vm.js';

/** The memory that QEMU itself needs in addition to the guest's. */
const QEMU_BYTES = 64 * 1024 * 1024;
const STAT_BLOCK_BYTES = 512;
const MIB = 1024 * 1024;
/** By default clones may be promised this share of the host's memory, this many times over: most write little. */
const CLONE_BUDGET_SHARE = 0.5;
const CLONE_OVERCOMMIT = 16;

export interface MemoryLimits {
  /** The most that all VMs together may be promised. Null: what the host has. */
  readonly budgetBytes: number | null;
  /** How many times the host's memory may be promised. At 1 no guest can run out of it. */
  readonly overcommit: number;
  /** The most that all clones together may write. Null: half of the host's memory. */
  readonly cloneBudgetBytes: number | null;
  /** How many times the clones' budget may be promised, each clone with its whole memory. */
  readonly cloneOvercommit: number;
}

const DEFAULT_LIMITS: MemoryLimits = {
  ...{ budgetBytes: null, overcommit: 1 },
  ...{ cloneBudgetBytes: null, cloneOvercommit: CLONE_OVERCOMMIT },
};

/** file: pages on tmpfs · huge: huge pages · process: the process's own memory · clone: what a clone writes */
export type MemoryKind = 'file' | 'huge' | 'process' | 'clone';

export interface MemoryPromise {
  readonly kind: MemoryKind;
  readonly pageBytes: number;
  readonly promisedBytes: number;
  /** How much of it is in use now. The kernel has taken that from what it reports as free. */
  readonly usedBytes: number;
}

/** What may still be promised. All figures are 0 or more. */
export interface MemoryFree {
  /** Memory of the host, for guests of either backing. */
  readonly hostBytes: number;
  /** In the file system of the memory files. */
  readonly fileBytes: number;
  /** Free huge pages by page size in bytes. */
  readonly hugePages: Readonly<Record<string, number>>;
  /** For clones: the rest of their budget, times its overcommit. */
  readonly cloneBytes: number;
}

export class MemoryRoom {
  readonly limits: MemoryLimits;
  readonly #place: RamPlace;
  readonly #holders: (() => Iterable<MemoryPromise>)[] = [];
  /** Promises to jobs whose objects do not exist yet. */
  readonly #held = new Map<string | symbol, MemoryPromise>();
  #turn: Promise<unknown> = Promise.resolve();

  constructor(place: RamPlace, limits: Partial<MemoryLimits> = {}) {
    this.#place = place;
    this.limits = { ...DEFAULT_LIMITS, ...limits };
  }

  /** Registers a part of the agent that has memory of guests. It is asked at each admission. */
  addHolder(promises: () => Iterable<MemoryPromise>): void {
    this.#holders.push(promises);
  }

  /**
   * Runs `create` if the VM has room. Only the look at what is free is made one at a time: from then on the VM counts,
   * so many clones are created at once. What `create` makes must be among the promises of a holder when it resolves.
   * Throws NO_SPACE or OUT_OF_MEMORY if there is no room.
   */
  async admit<T>(spec: VmSpec, create: () => Promise<T>): Promise<T> {
    const admission = Symbol(spec.name);
    await this.#inTurn(async () => {
      if (spec.memory.backing === 'image') refuseWithoutCloneRoom(spec, await this.#cloneBytesFree());
      else refuseWithoutRoom(spec, await this.free(), this.#place);
      this.#held.set(admission, promiseOf(spec, 0));
    });
    try {
      return await create();
    } finally {
      this.#held.delete(admission);
    }
  }

  /**
   * Promises the bytes of an image to a fork until `release`. Idempotent for one name. Throws NO_SPACE if there is no
   * room.
   */
  hold(name: string, bytes: number, pageBytes: number): Promise<void> {
    return this.#inTurn(async () => {
      if (this.#held.has(name)) return;
      const free = await this.free();
      const kind = kindOf(pageBytes);
      const freeBytes = kind === 'huge' ? (free.hugePages[pageBytes] ?? 0) * pageBytes : free.fileBytes;
      if (bytes > freeBytes) throw noSpace(`the image needs ${mib(bytes)}`, freeBytes, this.#place.ramDir);
      this.#held.set(name, { kind, pageBytes, promisedBytes: bytes, usedBytes: 0 });
    });
  }

  release(name: string): void {
    this.#held.delete(name);
  }

  async free(): Promise<MemoryFree> {
    // Looked at before what is free: a page that a guest takes in between must not count as used and as free.
    const promises = this.#promises();
    const [availableBytes, fileFreeBytes, hugeFree, cloneBytes] = await Promise.all([
      memoryAvailableBytes(),
      ramFileFreeBytes(this.#place),
      hugePagesFree(),
      this.#cloneBytesFree(),
    ]);
    const of = (...kinds: MemoryKind[]): Sum => sum(promises.filter(({ kind }) => kinds.includes(kind)));
    const { budgetBytes, overcommit } = this.limits;
    const left = (freeBytes: number, { promisedBytes, usedBytes }: Sum): number =>
      Math.max(0, Math.floor((freeBytes + usedBytes) * overcommit - promisedBytes));
    const inBudgetBytes =
      budgetBytes === null
        ? Infinity
        : Math.max(0, budgetBytes * overcommit - of('file', 'huge', 'process').promisedBytes);
    const hugePages = Object.entries(hugeFree).map(([pageBytes, pageCount]) => {
      const ofSize = sum(promises.filter((one) => one.kind === 'huge' && String(one.pageBytes) === pageBytes));
      const freeBytes = Math.min(inBudgetBytes, left(pageCount * Number(pageBytes), ofSize));
      return [pageBytes, Math.floor(freeBytes / Number(pageBytes))] as const;
    });
    return {
      // The budget is for guests: what QEMU needs besides is not taken from it.
      hostBytes: Math.min(inBudgetBytes + QEMU_BYTES, left(availableBytes, of('file', 'process'))),
      fileBytes: Math.min(inBudgetBytes, left(fileFreeBytes, of('file'))),
      hugePages: Object.fromEntries(hugePages),
      cloneBytes,
    };
  }

  /** The most that clones may write together, without overcommit. */
  async cloneBudgetBytes(): Promise<number> {
    return this.limits.cloneBudgetBytes ?? Math.floor((await memoryTotalBytes()) * CLONE_BUDGET_SHARE);
  }

  async #cloneBytesFree(): Promise<number> {
    const budgetBytes = await this.cloneBudgetBytes();
    const { promisedBytes } = sum(this.#promises().filter(({ kind }) => kind === 'clone'));
    return Math.max(0, Math.floor(budgetBytes * this.limits.cloneOvercommit - promisedBytes));
  }

  #promises(): MemoryPromise[] {
    return [...this.#holders.flatMap((holder) => [...holder()]), ...this.#held.values()];
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#turn.then(work);
    this.#turn = turn.catch(() => undefined);
    return turn;
  }
}

/** The promises of VMs. One that has stopped has none. The memory of a departed one is kept for its target. */
export function* promisesOf(vms: Iterable<Vm>): Iterable<MemoryPromise> {
  for (const vm of vms) {
    if (vm.state === 'stopped') continue;
    const { backing } = vm.spec.memory;
    yield promiseOf(
      vm.spec,
      backing === 'image' ? 0 : backing === 'private' ? ownBytesOf(vm) : allocatedBytes(vm.regions),
    );
  }
}

function promiseOf({ memory }: VmSpec, usedBytes: number): MemoryPromise {
  const { backing, pageBytes, sizeBytes } = memory;
  const kind = backing === 'shared' ? kindOf(pageBytes) : backing === 'private' ? 'process' : 'clone';
  return { kind, pageBytes, promisedBytes: sizeBytes, usedBytes: Math.min(usedBytes, sizeBytes) };
}

export function kindOf(pageBytes: number): 'file' | 'huge' {
  return pageBytes === SMALL_PAGE_BYTES ? 'file' : 'huge';
}

/** Counts the blocks that the file system has allocated. A file that does not exist has none. */
export function allocatedBytes(files: readonly { readonly path: string }[]): number {
  return files.reduce(
    (bytes, { path }) => bytes + (statSync(path, { throwIfNoEntry: false })?.blocks ?? 0) * STAT_BLOCK_BYTES,
    0,
  );
}

/** Returns the memory of the VM's process that is in no file; 0 if it has ended. */
export function ownBytesOf({ record }: Vm): number {
  if (record.process === null) return 0;
  try {
    const status = readFileSync(`/proc/${record.process.pid}/status`, 'utf8');
    return Number(/^RssAnon:\s+(\d+) kB$/m.exec(status)?.[1] ?? 0) * 1024;
  } catch {
    return 0;
  }
}

interface Sum {
  readonly promisedBytes: number;
  readonly usedBytes: number;
}

function sum(promises: readonly MemoryPromise[]): Sum {
  return promises.reduce(
    (total, { promisedBytes, usedBytes }) => ({
      promisedBytes: total.promisedBytes + promisedBytes,
      usedBytes: total.usedBytes + usedBytes,
    }),
    { promisedBytes: 0, usedBytes: 0 },
  );
}

function refuseWithoutCloneRoom({ name, memory: { sizeBytes } }: VmSpec, freeBytes: number): void {
  if (sizeBytes <= freeBytes) return;
  throw new MigrationError(
    'OUT_OF_MEMORY',
    `${name} may write ${mib(sizeBytes)}; ${mib(freeBytes)} of the clones' budget are not promised`,
    { remedy: 'end clones ("vmctl stop"), or raise clones.budget or clones.overcommit in the configuration' },
  );
}

function refuseWithoutRoom({ name, memory }: VmSpec, free: MemoryFree, { ramDir }: RamPlace): void {
  const { backing, pageBytes, sizeBytes } = memory;
  if (kindOf(pageBytes) === 'huge' && backing === 'shared') {
    const neededCount = Math.ceil(sizeBytes / pageBytes);
    const freeCount = free.hugePages[pageBytes] ?? 0;
    if (neededCount <= freeCount) return;
    throw new MigrationError(
      'OUT_OF_MEMORY',
      `${name} needs ${neededCount} huge pages of ${mib(pageBytes)}, ${freeCount} are neither used nor promised`,
      { remedy: 'reserve more huge pages (vm.nr_hugepages), or end a VM' },
    );
  }
  if (sizeBytes + QEMU_BYTES > free.hostBytes) {
    throw new MigrationError(
      'OUT_OF_MEMORY',
      `${name} needs ${mib(sizeBytes + QEMU_BYTES)} of memory, ${mib(free.hostBytes)} are neither used nor promised`,
      { remedy: 'end a VM, or raise memory.budget in the configuration if it is lower than what the host has' },
    );
  }
  if (backing === 'shared' && sizeBytes > free.fileBytes) {
    throw noSpace(`${name} needs ${mib(sizeBytes)}`, free.fileBytes, ramDir);
  }
}

function noSpace(need: string, freeBytes: number, ramDir: string): MigrationError {
  return new MigrationError('NO_SPACE', `${need} in ${ramDir}, ${mib(freeBytes)} are neither used nor promised`, {
    remedy: 'end a VM or remove an image there, or enlarge the file system: mount -o remount,size=',
  });
}

function mib(bytes: number): string {
  return `${Math.ceil(bytes / MIB)} MiB`;
}

async function memoryTotalBytes(): Promise<number> {
  const match = /^MemTotal:\s+(\d+) kB$/m.exec(await readFile('/proc/meminfo', 'utf8'));
  return Number(match?.[1] ?? 0) * 1024;
}
