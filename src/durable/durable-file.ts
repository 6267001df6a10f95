/**
 * Writes small files so that a crash of the machine leaves either the old or the new content, and makes directories
 * that survive one.
 */
import { open, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { makeDirectories } from '../kit/directory.js';
import { fileError } from './log-store.js';
import { isDiskFull, withReserve } from './reserve.js';

/**
 * Writes a temporary file, syncs it, renames it, and syncs the directory. The mode is 0600. Two writes of one path must
 * not run at the same time. Throws NO_SPACE if the disk is full, also without its reserve. The old content stays then.
 */
export async function writeDurably(path: string, text: string): Promise<void> {
  await writeAside(path, text, true);
  await syncDirectory(dirname(path));
}

/**
 * Like writeDurably, but safe only against a crash of the daemon. After a crash of the machine the file may be old, new
 * or empty. It takes some milliseconds less.
 */
export function writeWhole(path: string, text: string): Promise<void> {
  return writeAside(path, text, false);
}

async function writeAside(path: string, text: string, isSynced: boolean): Promise<void> {
  try {
    await withReserve(path, () => writeOnce(path, text, isSynced));
  } catch (error) {
    throw isDiskFull(error) ? fileError(error, path) : error;
  }
}

async function writeOnce(path: string, text: string, isSynced: boolean): Promise<void> {
  const sidePath = `${path}.new`;
  const file = await open(sidePath, 'w', 0o600);
  try {
    try {
      await file.writeFile(text);
      if (isSynced) await file.sync();
    } finally {
      await file.close();
    }
    await rename(sidePath, path);
  } catch (error) {
    await rm(sidePath, { force: true }).catch(() => undefined);
    throw error;
  }
}

/** Makes renames and removals in the directory durable. */
export async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, 'r');
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
}

/**
 * Makes the directory, for its owner alone, and those above it that are missing. Their entries are durable when it
 * resolves. Throws NO_SPACE if the disk is full, and what `makeDirectories` throws.
 */
export async function makeDirectoryDurably(path: string): Promise<void> {
  try {
    const made = await makeDirectories(path, 0o700);
    for (const each of made) await syncDirectory(dirname(each));
  } catch (error) {
    throw isDiskFull(error) ? fileError(error, path) : error;
  }
}
