/**
 * Region files: where guest memory lies. `RAMDIR/NAME/REGION.ram` on tmpfs, or the same below a hugetlbfs mount; the
 * presence map of a target always on tmpfs beside it. An image's are in `RAMDIR/.images/ID` in the same way. Room is
 * checked first: a guest that runs out of tmpfs later would die by SIGBUS.
 */
import { link, mkdir, open, readdir, readFile, rm, rmdir, statfs } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import type { NativeBinding, RegionFile } from '../../native/types.js';

const SMALL_PAGE_BYTES = 4096;
/** What QEMU itself needs beside the guest's memory. */
const QEMU_BYTES = 64 * 1024 * 1024;
/** Beside the directories of the VMs: no VM can have this name. */
const IMAGES = '.images';

export interface RamPlace {
  readonly host: string;
  /** On tmpfs. */
  readonly ramDir: string;
}

/**
 * Paths only; nothing is created. UNSUPPORTED if no hugetlbfs of that page size is mounted. Empty for private memory.
 * `image`: a clone's.
 */
export async function regionFiles(place: RamPlace, spec: VmSpec, image: string | null): Promise<RegionFile[]> {
  const { memory, name } = spec;
  if (memory.backing === 'private') return [];
  if (memory.backing === 'shared') return filesIn(join(await ramRoot(place, memory.pageBytes), name), memory);
  if (image === null) throw new MigrationError('UNSUPPORTED', `${name} runs on an image, which is not on this host`);
  const files = await imageFiles(place, memory, image);
  return files.map((file) => ({ ...file, isPrivate: true }));
}

/** The memory files of an image, whose guest had this memory. Paths only. */
export async function imageFiles(place: RamPlace, memory: VmSpec['memory'], image: string): Promise<RegionFile[]> {
  return filesIn(join(await ramRoot(place, memory.pageBytes), IMAGES, image), memory);
}

/** Always on tmpfs. */
export function imagePresencePath(place: RamPlace, image: string, region: string): string {
  return join(place.ramDir, IMAGES, image, `${region}.presence`);
}

function filesIn(directory: string, { regions, pageBytes }: VmSpec['memory']): RegionFile[] {
  return regions.map((region) => ({
    path: join(directory, `${region.id}.ram`),
    lengthBytes: BigInt(region.lengthBytes),
    pageBytes,
  }));
}

export function presencePath(place: RamPlace, vm: string, region: string): string {
  return join(place.ramDir, vm, `${region}.presence`);
}

/** Where a clone's own pages are kept while it leaves, always on tmpfs. Gone with its other files. */
export function ownPagesPath(place: RamPlace, vm: string, region: string): string {
  return join(place.ramDir, vm, `${region}.own`);
}

/** NO_SPACE or OUT_OF_MEMORY if the VM does not fit now. */
export async function checkRoom(place: RamPlace, spec: VmSpec): Promise<void> {
  const { backing, pageBytes, sizeBytes } = spec.memory;
  if (backing === 'image') return;
  if (pageBytes !== SMALL_PAGE_BYTES) {
    const free = (await hugePagesFree())[String(pageBytes)] ?? 0;
    if (free * pageBytes >= sizeBytes) return;
    throw new MigrationError(
      'OUT_OF_MEMORY',
      `${spec.name} needs ${sizeBytes / pageBytes} huge pages, ${free} are free`,
      {
        remedy: 'reserve more huge pages (vm.nr_hugepages)',
      },
    );
  }
  const available = await memoryAvailableBytes();
  if (sizeBytes + QEMU_BYTES > available) {
    throw new MigrationError(
      'OUT_OF_MEMORY',
      `${spec.name} needs ${sizeBytes} bytes, the host has ${available} available`,
    );
  }
  if (backing === 'private') return;
  const free = await ramFileFreeBytes(place);
  if (sizeBytes > free) {
    throw new MigrationError('NO_SPACE', `${spec.name} needs ${sizeBytes} bytes in ${place.ramDir}, ${free} are free`);
  }
}

/** New, sparse, exclusive. Those of an image are there before its clones. */
export async function createRegionFiles(
  place: RamPlace,
  spec: VmSpec,
  regions: readonly RegionFile[],
  native: NativeBinding | null,
): Promise<void> {
  if (regions.length === 0 || spec.memory.backing === 'image') return;
  await mkdir(join(place.ramDir, spec.name), { recursive: true, mode: 0o700 });
  await mkdir(join(await ramRoot(place, spec.memory.pageBytes), spec.name), { recursive: true, mode: 0o700 });
  for (const region of regions) {
    if (native === null) await createSparse(region);
    else native.createRegionFile(region);
  }
}

/** Everything of this VM, also presence maps. Idempotent. */
export async function removeRegionFiles(place: RamPlace, spec: VmSpec): Promise<void> {
  await rm(join(place.ramDir, spec.name), { recursive: true, force: true });
  if (spec.memory.pageBytes === SMALL_PAGE_BYTES) return;
  const mount = await hugetlbMount(spec.memory.pageBytes);
  if (mount !== null) await rm(join(mount, `vmigrate-${place.host}`, spec.name), { recursive: true, force: true });
}

/** Empty files for an image, or, with `parent`, further names of the parent's own. */
export async function createImageFiles(
  place: RamPlace,
  image: string,
  files: readonly RegionFile[],
  options: { native: NativeBinding | null; parent: readonly RegionFile[] | null },
): Promise<void> {
  await mkdir(join(place.ramDir, IMAGES, image), { recursive: true, mode: 0o700 });
  for (const [index, file] of files.entries()) {
    await mkdir(dirname(file.path), { recursive: true, mode: 0o700 });
    const original = options.parent?.[index];
    if (original !== undefined) await link(original.path, file.path);
    else if (options.native !== null) options.native.createRegionFile(file);
    else await createSparse(file);
  }
}

/** Memory files and presence maps. Idempotent. */
export async function removeImageFiles(place: RamPlace, image: string, pageBytes: number): Promise<void> {
  const roots = [place.ramDir];
  if (pageBytes !== SMALL_PAGE_BYTES) {
    const mount = await hugetlbMount(pageBytes);
    if (mount !== null) roots.push(join(mount, `vmigrate-${place.host}`));
  }
  for (const root of roots) {
    await rm(join(root, IMAGES, image), { recursive: true, force: true });
    // The last one takes the folder along.
    await rmdir(join(root, IMAGES)).catch(() => undefined);
  }
}

/** Ids of the images that have files. */
export async function imagesWithFiles(place: RamPlace): Promise<string[]> {
  return readdir(join(place.ramDir, IMAGES)).catch(() => []);
}

export async function memoryAvailableBytes(): Promise<number> {
  const match = /^MemAvailable:\s+(\d+) kB$/m.exec(await readFile('/proc/meminfo', 'utf8'));
  return Number(match?.[1] ?? 0) * 1024;
}

export async function ramFileFreeBytes(place: RamPlace): Promise<number> {
  await mkdir(place.ramDir, { recursive: true, mode: 0o700 });
  const { bavail, bsize } = await statfs(place.ramDir);
  return bavail * bsize;
}

/** Free huge pages by page size in bytes. */
export async function hugePagesFree(): Promise<Record<string, number>> {
  const root = '/sys/kernel/mm/hugepages';
  const free: Record<string, number> = {};
  for (const entry of await readdir(root).catch(() => [])) {
    const kib = Number(/^hugepages-(\d+)kB$/.exec(entry)?.[1] ?? 0);
    if (kib > 0) free[String(kib * 1024)] = Number(await readFile(join(root, entry, 'free_hugepages'), 'utf8'));
  }
  return free;
}

async function ramRoot(place: RamPlace, pageBytes: number): Promise<string> {
  if (pageBytes === SMALL_PAGE_BYTES) return place.ramDir;
  const mount = await hugetlbMount(pageBytes);
  if (mount !== null) return join(mount, `vmigrate-${place.host}`);
  throw new MigrationError('UNSUPPORTED', `no hugetlbfs with pages of ${pageBytes} bytes is mounted`, {
    remedy: `mount -t hugetlbfs -o pagesize=${pageBytes} none /dev/hugepages`,
  });
}

async function hugetlbMount(pageBytes: number): Promise<string | null> {
  for (const line of (await readFile('/proc/mounts', 'utf8')).split('\n')) {
    const [, mount, type] = line.split(' ');
    if (type !== 'hugetlbfs' || mount === undefined) continue;
    // The block size of a hugetlbfs is its page size.
    const { bsize } = await statfs(mount).catch(() => ({ bsize: 0 }));
    if (bsize === pageBytes) return mount;
  }
  return null;
}

async function createSparse(region: RegionFile): Promise<void> {
  let file: Awaited<ReturnType<typeof open>>;
  try {
    file = await open(region.path, 'wx', 0o600);
  } catch (error) {
    const isThere = (error as NodeJS.ErrnoException).code === 'EEXIST';
    throw new MigrationError(isThere ? 'CONFLICT' : 'NO_SPACE', `${region.path} cannot be created`, { cause: error });
  }
  try {
    await file.truncate(Number(region.lengthBytes));
  } finally {
    await file.close();
  }
}
