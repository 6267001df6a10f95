/**
 * The directories for the memory files of this host: one on tmpfs, and one on each hugetlbfs. They belong to this
 * daemon alone, which is checked when they are opened (kit/own-directory.ts).
 *
 * The one on tmpfs is opened once. Files are made, looked for and removed below that descriptor, and QEMU opens them by
 * path. So before a file is made, the path must still name the opened directory. Otherwise somebody has moved it, has
 * put a mount on it, or has made another in its place, as everybody may in /dev/shm once it is gone.
 */
import { constants } from 'node:fs';
import { type FileHandle, lstat, open, readdir, readFile, statfs } from 'node:fs/promises';
import { join } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import { openBelow, openedPath, openOwnDirectory } from '../../kit/own-directory.js';

export const SMALL_PAGE_BYTES = 4096;
/** A hugetlbfs takes no bytes by write, so the id of the memory's owner is in the name of a file. */
const HUGE_MARK = '.owner-';

export interface RamPlaceOptions {
  readonly host: string;
  /** A directory on tmpfs. It is made if it is missing. */
  readonly ramDir: string;
  /** The id of the state directory that the memory belongs to. Absent: directories for huge pages are not marked. */
  readonly ownerId?: string | undefined;
}

export class RamPlace {
  readonly host: string;
  readonly ramDir: string;
  readonly #ownerId: string | undefined;
  #root: Promise<FileHandle> | null = null;

  constructor({ host, ramDir, ownerId }: RamPlaceOptions) {
    this.host = host;
    this.ramDir = ramDir;
    this.#ownerId = ownerId;
  }

  /** Gives the descriptor back. A later call opens the directory again. */
  async close(): Promise<void> {
    const root = this.#root;
    this.#root = null;
    await (await root?.catch(() => null))?.close();
  }

  /** Returns the path of the directory for pages of that size. Throws UNSUPPORTED if no hugetlbfs has such pages. */
  async path(pageBytes: number): Promise<string> {
    if (pageBytes === SMALL_PAGE_BYTES) return this.ramDir;
    const mount = await hugetlbMount(pageBytes);
    if (mount !== null) return hugeRoot(mount, this.host);
    throw new MigrationError('UNSUPPORTED', `no hugetlbfs with pages of ${pageBytes} bytes is mounted`, {
      remedy: `mount -t hugetlbfs -o pagesize=${pageBytes} none /dev/hugepages`,
    });
  }

  /**
   * Runs `work` with a path to the directory on tmpfs that nothing can redirect. The directory is made and checked if
   * this is the first call.
   */
  async inRamDir<T>(work: (opened: string) => Promise<T>): Promise<T> {
    this.#root ??= openOwnDirectory(this.ramDir, true);
    const root = await this.#root.catch((error: unknown) => {
      this.#root = null;
      throw error;
    });
    return work(openedPath(root));
  }

  /**
   * Makes the folders `names` below the directory for pages of that size, one in the other, and runs `work` with a path
   * to the last that nothing can redirect. One that exists is checked. Throws CONFLICT if the directory's path names
   * another directory now or belongs to another daemon, NOT_PERMITTED if it belongs to another user.
   */
  async make<T>(pageBytes: number, names: readonly string[], work: (opened: string) => Promise<T>): Promise<T> {
    if (pageBytes === SMALL_PAGE_BYTES) {
      return this.inRamDir(async (root) => {
        await this.#checkPath(root);
        return within(root, this.ramDir, names, work);
      });
    }
    const path = await this.path(pageBytes);
    return inHugeRoot(path, this.#ownerId, [], (root) => within(root, path, names, work));
  }

  /**
   * Runs `work` with a path to each of the directories that may have files for pages of that size. One for huge pages
   * that is missing, or is not this daemon's, has none.
   */
  async each(pageBytes: number, work: (opened: string) => Promise<void>): Promise<void> {
    await this.inRamDir(work);
    const mount = pageBytes === SMALL_PAGE_BYTES ? null : await hugetlbMount(pageBytes);
    if (mount === null) return;
    const path = hugeRoot(mount, this.host);
    if ((await lstat(path).catch(() => null)) === null) return;
    await inHugeRoot(path, this.#ownerId, [], async (opened) => {
      await work(opened);
    }).catch((error: unknown) => {
      const isForeign = error instanceof MigrationError && FOREIGN.has(error.code);
      if (!isForeign) throw error;
    });
  }

  async #checkPath(root: string): Promise<void> {
    const [opened, now] = await Promise.all([
      lstat(`${root}/.`, { bigint: true }),
      lstat(this.ramDir, { bigint: true }).catch(() => null),
    ]);
    if (now?.dev === opened.dev && now.ino === opened.ino) return;
    throw new MigrationError('CONFLICT', `${this.ramDir} is not the directory any more that vmigrated has opened`, {
      remedy: `move it back, or unmount what hides it; if no VM has memory there any more, restart vmigrated`,
    });
  }
}

const FOREIGN: ReadonlySet<string> = new Set(['CONFLICT', 'NOT_PERMITTED', 'SPEC_INVALID']);

/** Returns the hugetlbfs mounts, and the page size of each in bytes. */
export async function hugetlbMounts(): Promise<readonly { readonly path: string; readonly pageBytes: number }[]> {
  const mounts: { path: string; pageBytes: number }[] = [];
  for (const line of (await readFile('/proc/mounts', 'utf8')).split('\n')) {
    const [, path, type] = line.split(' ');
    if (type !== 'hugetlbfs' || path === undefined) continue;
    // The block size of a hugetlbfs is its page size.
    const pageBytes = await statfs(path).then(
      ({ bsize }) => bsize,
      () => 0,
    );
    mounts.push({ path, pageBytes });
  }
  return mounts;
}

export function hugeRoot(mount: string, host: string): string {
  return join(mount, `vmigrate-${host}`);
}

/**
 * Opens this daemon's directory on a hugetlbfs, makes it if it is missing, checks that it is its own, and marks it.
 * `known` are names that may lie in one without a mark, which an earlier build has made. Throws CONFLICT for any other
 * content without a mark, and for the mark of another daemon.
 */
export async function inHugeRoot<T>(
  path: string,
  ownerId: string | undefined,
  known: Iterable<string>,
  work: (opened: string) => Promise<T>,
): Promise<T> {
  const root = await openOwnDirectory(path, true);
  try {
    if (ownerId !== undefined) await claim(root, path, ownerId, new Set(known));
    return await work(openedPath(root));
  } finally {
    await root.close();
  }
}

async function claim(root: FileHandle, path: string, ownerId: string, known: ReadonlySet<string>): Promise<void> {
  const names = await readdir(openedPath(root));
  const mark = `${HUGE_MARK}${ownerId}`;
  if (names.includes(mark)) return;
  const foreign = names.find((name) => !known.has(name));
  if (foreign !== undefined) {
    throw new MigrationError('CONFLICT', `${join(path, foreign)} was not made by this daemon`, {
      remedy: `give the daemons different names; if no QEMU uses it any more: rm -r ${path}`,
    });
  }
  const flags = constants.O_CREAT | constants.O_WRONLY | constants.O_NOFOLLOW;
  await (await open(join(openedPath(root), mark), flags, 0o600)).close();
}

async function within<T>(
  root: string,
  path: string,
  names: readonly string[],
  work: (opened: string) => Promise<T>,
): Promise<T> {
  const [name, ...rest] = names;
  if (name === undefined) return work(root);
  const folder = await openBelow(root, path, name);
  try {
    return await within(openedPath(folder), join(path, name), rest, work);
  } finally {
    await folder.close();
  }
}

async function hugetlbMount(pageBytes: number): Promise<string | null> {
  return (await hugetlbMounts()).find((mount) => mount.pageBytes === pageBytes)?.path ?? null;
}
