/**
 * Region files, which hold guest memory. They are `RAMDIR/NAME/REGION.ram` on tmpfs, or the same path below a hugetlbfs
 * mount. The presence map of a target is always in `RAMDIR/NAME` on tmpfs. The files of an image have the same layout
 * in `RAMDIR/.images/ID`. memory-room.ts says which VMs and images have room.
 */
import { link, mkdir, open, readdir, readFile, rm, rmdir, statfs } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import type { NativeBinding, RegionFile } from '../../native/types.js';

export const SMALL_PAGE_BYTES = 4096;
/** The directory of the images, beside those of the VMs. No VM can have this name. */
const IMAGES = '.images';

export interface RamPlace {
  readonly host: string;
  /** A directory on tmpfs. */
  readonly ramDir: string;
}

/**
 * Returns the paths of a VM's region files and creates nothing. The list is empty for private memory. `image` is the
 * image of a clone, null for any other VM. Throws UNSUPPORTED if no hugetlbfs of that page size is mounted.
 */
export async function regionFiles(place: RamPlace, spec: VmSpec, image: string | null): Promise<RegionFile[]> {
  const { memory, name } = spec;
  if (memory.backing === 'private') return [];
  if (memory.backing === 'shared') return filesIn(join(await ramRoot(place, memory.pageBytes), name), memory);
  if (image === null) throw new MigrationError('UNSUPPORTED', `the memory of ${name} is an image, and none was given`);
  const files = await imageFiles(place, memory, image);
  return files.map((file) => ({ ...file, isPrivate: true }));
}

/** Returns the paths of an image's memory files. `memory` is that of the image's guest. */
export async function imageFiles(place: RamPlace, memory: VmSpec['memory'], image: string): Promise<RegionFile[]> {
  return filesIn(join(await ramRoot(place, memory.pageBytes), IMAGES, image), memory);
}

/** The file is always on tmpfs. */
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

/**
 * The file that keeps a clone's own pages while it migrates. It is always on tmpfs, and removed with the other files.
 */
export function ownPagesPath(place: RamPlace, vm: string, region: string): string {
  return join(place.ramDir, vm, `${region}.own`);
}

/** Creates sparse files, and fails if one exists. A clone needs none, because the files of its image exist already. */
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

/** Removes all memory files of this VM, including presence maps. Idempotent. */
export async function removeRegionFiles(place: RamPlace, spec: VmSpec): Promise<void> {
  await rm(join(place.ramDir, spec.name), { recursive: true, force: true });
  if (spec.memory.pageBytes === SMALL_PAGE_BYTES) return;
  const mount = await hugetlbMount(spec.memory.pageBytes);
  if (mount !== null) await rm(join(mount, `vmigrate-${place.host}`, spec.name), { recursive: true, force: true });
}

/** Creates empty files for an image. If `parent` is given, creates hard links to the parent's files instead. */
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

/** Removes the memory files and presence maps of an image. Idempotent. */
export async function removeImageFiles(place: RamPlace, image: string, pageBytes: number): Promise<void> {
  const roots = [place.ramDir];
  if (pageBytes !== SMALL_PAGE_BYTES) {
    const mount = await hugetlbMount(pageBytes);
    if (mount !== null) roots.push(join(mount, `vmigrate-${place.host}`));
  }
  for (const root of roots) {
    await rm(join(root, IMAGES, image), { recursive: true, force: true });
    // This succeeds only for the last image.
    await rmdir(join(root, IMAGES)).catch(() => undefined);
  }
}

/** Returns the ids of the images that have files. */
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
