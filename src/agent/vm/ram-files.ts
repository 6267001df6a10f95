/**
 * Region files, which hold guest memory. They are `RAMDIR/NAME/REGION.ram` on tmpfs, or the same path below a hugetlbfs
 * mount. The presence map of a target is always in `RAMDIR/NAME` on tmpfs. The files of an image have the same layout
 * in `RAMDIR/.images/ID`. memory-room.ts says which VMs and images have room.
 */
import { constants } from 'node:fs';
import { link, open, readdir, readFile, rm, rmdir, statfs } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import type { VmSpec } from '../../domain/vm.js';
import type { NativeBinding, RegionFile } from '../../native/types.js';
import { type RamPlace, SMALL_PAGE_BYTES } from './ram-place.js';

/** The directory of the images, beside those of the VMs. No VM can have this name. */
const IMAGES = '.images';

/**
 * Returns the paths of a VM's region files and creates nothing. The list is empty for private memory. `image` is the
 * image of a clone, null for any other VM. Throws UNSUPPORTED if no hugetlbfs of that page size is mounted.
 */
export async function regionFiles(place: RamPlace, spec: VmSpec, image: string | null): Promise<RegionFile[]> {
  const { memory, name } = spec;
  if (memory.backing === 'private') return [];
  if (memory.backing === 'shared') return filesIn(join(await place.path(memory.pageBytes), name), memory);
  if (image === null) throw new MigrationError('UNSUPPORTED', `the memory of ${name} is an image, and none was given`);
  const files = await imageFiles(place, memory, image);
  return files.map((file) => ({ ...file, isPrivate: true }));
}

/** Returns the paths of an image's memory files. `memory` is that of the image's guest. */
export async function imageFiles(place: RamPlace, memory: VmSpec['memory'], image: string): Promise<RegionFile[]> {
  return filesIn(join(await place.path(memory.pageBytes), IMAGES, image), memory);
}

/** The file is always on tmpfs. */
export function imagePresencePath(place: RamPlace, image: string, region: string): string {
  return join(place.ramDir, IMAGES, image, `${region}.presence`);
}

/** The file is always on tmpfs. It stays as long as the image. */
export function imageDigestPath(place: RamPlace, image: string, region: string): string {
  return join(place.ramDir, IMAGES, image, `${region}.digests`);
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

/** The tags of pages as they arrived, of a move that is verified. The file is always on tmpfs. */
export function tagPath(place: RamPlace, vm: string, region: string): string {
  return join(place.ramDir, vm, `${region}.tags`);
}

/**
 * The file that keeps a clone's own pages while it migrates. It is always on tmpfs, and removed with the other files.
 */
export function ownPagesPath(place: RamPlace, vm: string, region: string): string {
  return join(place.ramDir, vm, `${region}.own`);
}

/**
 * Creates sparse files, and fails if one exists. A clone needs none, because the files of its image exist already.
 * Throws CONFLICT or NOT_PERMITTED if the directory for them is not this daemon's (ram-place.ts).
 */
export async function createRegionFiles(
  place: RamPlace,
  spec: VmSpec,
  regions: readonly RegionFile[],
  native: NativeBinding | null,
): Promise<void> {
  if (regions.length === 0 || spec.memory.backing === 'image') return;
  // The directory for the presence maps, which are on tmpfs in any case.
  await place.make(SMALL_PAGE_BYTES, [spec.name], () => Promise.resolve());
  await place.make(spec.memory.pageBytes, [spec.name], async (opened) => {
    for (const region of regions) await create(region, opened, native);
  });
}

/** Removes all memory files of this VM, including presence maps. Idempotent. */
export async function removeRegionFiles(place: RamPlace, spec: VmSpec): Promise<void> {
  await place.each(spec.memory.pageBytes, (opened) => rm(join(opened, spec.name), { recursive: true, force: true }));
}

/** Creates empty files for an image. If `parent` is given, creates hard links to the parent's files instead. */
export async function createImageFiles(
  place: RamPlace,
  image: string,
  files: readonly RegionFile[],
  options: { native: NativeBinding | null; parent: readonly RegionFile[] | null },
): Promise<void> {
  await place.make(SMALL_PAGE_BYTES, [IMAGES, image], () => Promise.resolve());
  await place.make(files[0]?.pageBytes ?? SMALL_PAGE_BYTES, [IMAGES, image], async (opened) => {
    for (const [index, file] of files.entries()) {
      const original = options.parent?.[index];
      if (original !== undefined) await link(original.path, join(opened, basename(file.path)));
      else await create(file, opened, options.native);
    }
  });
}

/** Removes the memory files and presence maps of an image. Idempotent. */
export async function removeImageFiles(place: RamPlace, image: string, pageBytes: number): Promise<void> {
  await place.each(pageBytes, async (opened) => {
    await rm(join(opened, IMAGES, image), { recursive: true, force: true });
    // This succeeds only for the last image.
    await rmdir(join(opened, IMAGES)).catch(() => undefined);
  });
}

/** Returns the ids of the images that have files. */
export async function imagesWithFiles(place: RamPlace): Promise<string[]> {
  return place.inRamDir((opened) => readdir(join(opened, IMAGES)).catch(() => []));
}

export async function memoryAvailableBytes(): Promise<number> {
  const match = /^MemAvailable:\s+(\d+) kB$/m.exec(await readFile('/proc/meminfo', 'utf8'));
  return Number(match?.[1] ?? 0) * 1024;
}

export function ramFileFreeBytes(place: RamPlace): Promise<number> {
  return place.inRamDir(async (opened) => {
    const { bavail, bsize } = await statfs(opened);
    return bavail * bsize;
  });
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

/** Makes the file in the directory that is opened. Neither a link nor what exists is ever taken for it. */
async function create(region: RegionFile, opened: string, native: NativeBinding | null): Promise<void> {
  const at = join(opened, basename(region.path));
  if (native === null) await createSparse(region, at);
  else native.createRegionFile(region, at);
}

async function createSparse(region: RegionFile, at: string): Promise<void> {
  let file: Awaited<ReturnType<typeof open>>;
  try {
    file = await open(at, constants.O_RDWR | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW, 0o600);
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
