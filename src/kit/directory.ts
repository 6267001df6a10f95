/** Makes a directory and those above it, with an error that names the one at fault. */
import { mkdir, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { MigrationError, toMigrationError } from '../domain/errors.js';

/**
 * Makes what is missing of `path`: itself with `mode`, and those above it with 0755. Returns what was missing, the
 * highest first. Node's own recursive call never ends below /proc. Throws SPEC_INVALID if a part of the path is a file
 * or cannot hold directories, NOT_PERMITTED if this user may not.
 */
export async function makeDirectories(path: string, mode: number): Promise<readonly string[]> {
  const missing: string[] = [];
  for (let each = path; ; each = dirname(each)) {
    const found = await stat(each).catch((error: NodeJS.ErrnoException) => {
      // ENOTDIR: a part above is a file, which is found on the way up.
      if ((error.code === 'ENOENT' || error.code === 'ENOTDIR') && each !== dirname(each)) return null;
      throw directoryError(each, error);
    });
    if (found !== null && !found.isDirectory()) throw notADirectory(each);
    if (found !== null) break;
    missing.push(each);
  }
  for (const each of missing.reverse()) {
    await mkdir(each, { mode: each === path ? mode : 0o755 }).catch((error: NodeJS.ErrnoException) => {
      // Another process has made it meanwhile.
      if (error.code !== 'EEXIST') throw directoryError(each, error);
    });
  }
  return missing;
}

/**
 * Makes the directory of a socket if it is missing, for example after a boot in /run. Throws NOT_PERMITTED if others
 * could put a socket of their own there: the directory must be root's or this user's, and not writable by everybody.
 */
export async function makeSocketDirectory(socketPath: string): Promise<void> {
  const directory = dirname(socketPath);
  await makeDirectories(directory, 0o755);
  const { uid, mode } = await stat(directory);
  const isSticky = (mode & 0o1000) !== 0;
  const isOpenToAll = (mode & 0o002) !== 0 && !isSticky;
  if ((uid === 0 || uid === process.geteuid?.()) && !isOpenToAll) return;
  const what = isOpenToAll ? 'everybody may write to it' : `it belongs to user ${uid}`;
  throw new MigrationError('NOT_PERMITTED', `the socket ${socketPath} is not safe in ${directory}: ${what}`, {
    remedy: `chown root ${directory}; chmod 755 ${directory}; or choose another path for --api unix:PATH`,
  });
}

export function notADirectory(path: string): MigrationError {
  return new MigrationError('SPEC_INVALID', `${path} is not a directory, or is a symbolic link`, {
    remedy: 'name the directory itself, or move that file away',
  });
}

export function directoryError(path: string, error: NodeJS.ErrnoException): MigrationError {
  if (error.code === 'EACCES' || error.code === 'EPERM' || error.code === 'EROFS')
    return new MigrationError('NOT_PERMITTED', `the directory ${path} cannot be used: ${error.code}`, {
      remedy: 'run vmigrated as root, or name a directory that its user may write to',
      cause: error,
    });
  if (error.code === 'ENOENT' || error.code === 'EINVAL' || error.code === 'ENAMETOOLONG' || error.code === 'ELOOP')
    return new MigrationError('SPEC_INVALID', `the directory ${path} cannot be made there: ${error.code}`, {
      remedy: 'name a directory on a disk',
      cause: error,
    });
  return toMigrationError(error);
}
