/**
 * Directories that belong to this daemon alone. What lies in them is trusted, so nobody else may have made them, write
 * to them, or be able to replace them through a directory above. Each check is made on an open descriptor, which a
 * later rename or a symbolic link cannot redirect.
 */
import { constants } from 'node:fs';
import { type FileHandle, lstat, mkdir, open, readdir, readlink } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { MigrationError } from '../domain/errors.js';
import { directoryError, makeDirectories, notADirectory } from './directory.js';

const GROUP_OR_OTHERS_WRITE = 0o022;
const OTHERS_WRITE = 0o002;
const GROUP_WRITE = 0o020;
const STICKY = 0o1000;
const LINKS_MAX = 40;

/**
 * Makes the directory with mode 0700 if it is missing (those above it with 0755), checks it, and returns it open; the
 * caller closes it. An existing directory that others may write to is closed to them first, and must then be free of
 * their files. `isContentChecked` looks at the files in any case.
 *
 * Throws SPEC_INVALID if a part of the path is no directory or cannot hold one, NOT_PERMITTED if others own it or can
 * replace it, or if this user may not make it, CONFLICT if it holds files of others.
 */
export async function openOwnDirectory(path: string, isContentChecked: boolean): Promise<FileHandle> {
  await makeDirectories(path, 0o700);
  await checkAbove(dirname(path), LINKS_MAX);
  return openChecked(path, path, isContentChecked);
}

/**
 * The same for the folder `name` of a directory that is open, which nothing can redirect meanwhile. `opened` is the
 * directory's `openedPath`, and `path` its path in messages. The caller closes the folder.
 */
export async function openBelow(opened: string, path: string, name: string): Promise<FileHandle> {
  const at = join(opened, name);
  await mkdir(at, { mode: 0o700 }).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'EEXIST') throw directoryError(join(path, name), error);
  });
  return openChecked(at, join(path, name), false);
}

/** Returns a path to an open directory that nothing moved or mounted can redirect. It is valid in this process. */
export function openedPath({ fd }: FileHandle): string {
  return `/proc/self/fd/${fd}`;
}

/** Opens what lies at `at`; messages name it `path`. */
async function openChecked(at: string, path: string, isContentChecked: boolean): Promise<FileHandle> {
  const flags = constants.O_RDONLY | constants.O_DIRECTORY | constants.O_NOFOLLOW;
  const directory = await open(at, flags).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ELOOP' || error.code === 'ENOTDIR') throw notADirectory(path);
    throw directoryError(path, error);
  });
  try {
    const { uid, mode } = await directory.stat();
    if (uid !== ownUid()) {
      throw refused(
        path,
        `it belongs to user ${uid}`,
        `make sure that nobody else uses it, then rm -r ${path}, or chown ${ownUid()} ${path}`,
      );
    }
    const wasOpen = (mode & GROUP_OR_OTHERS_WRITE) !== 0;
    if (wasOpen) await directory.chmod(0o700);
    if (wasOpen || isContentChecked) await checkContent(path, openedPath(directory));
    return directory;
  } catch (error) {
    await directory.close();
    throw error instanceof MigrationError ? error : directoryError(path, error as NodeJS.ErrnoException);
  }
}

/** Checks this directory and all above it, and follows symbolic links as the kernel does. */
async function checkAbove(path: string, linksLeft: number): Promise<void> {
  if (dirname(path) !== path) await checkAbove(dirname(path), linksLeft);
  const found = await lstat(path).catch((error: NodeJS.ErrnoException) => {
    throw directoryError(path, error);
  });
  const { uid, gid, mode } = found;
  if (uid !== 0 && uid !== ownUid()) throw refused(path, `it belongs to user ${uid}`, `chown root ${path}`);
  if (found.isSymbolicLink()) {
    if (linksLeft === 0) throw notADirectory(path);
    return checkAbove(resolve(dirname(path), await readlink(path)), linksLeft - 1);
  }
  if ((mode & STICKY) !== 0) return;
  const isOthers = (mode & OTHERS_WRITE) !== 0;
  const isGroups = (mode & GROUP_WRITE) !== 0 && gid !== 0 && gid !== process.getegid?.();
  if (isOthers || isGroups) throw refused(path, 'other users may write to it', `chmod go-w ${path}`);
}

async function checkContent(path: string, opened: string): Promise<void> {
  for (const name of await readdir(opened)) {
    const found = await lstat(join(opened, name)).catch(() => null);
    if (found === null || found.uid === ownUid()) continue;
    throw new MigrationError('CONFLICT', `${join(path, name)} belongs to user ${found.uid}`, {
      remedy: `find out who made it, then rm -r ${join(path, name)}`,
    });
  }
}

function ownUid(): number {
  return process.geteuid?.() ?? 0;
}

function refused(path: string, reason: string, remedy: string): MigrationError {
  return new MigrationError('NOT_PERMITTED', `${path} is not safe for a daemon's files: ${reason}`, { remedy });
}
