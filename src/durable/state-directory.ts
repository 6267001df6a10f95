/** The state directory of a daemon: locked for life, and in the present format. */
import { DirectoryLock, type LockFile } from './directory-lock.js';
import { makeDirectoryDurably } from './durable-file.js';
import { fileError } from './log-store.js';
import { openState } from './state-format.js';

export interface StateDirectory {
  /** Distinguishes this directory from every other. 32 hex digits. */
  readonly id: string;
  /** Releases the lock. Called when nothing uses the directory any more. */
  giveBack(): Promise<void>;
}

/**
 * Throws CONFLICT if another process uses the directory, CORRUPT if its mark is damaged, UNSUPPORTED if a newer version
 * has written it.
 */
export async function openStateDirectory(directory: string, lockFile: LockFile): Promise<StateDirectory> {
  await makeDirectoryDurably(directory).catch((error: unknown) => {
    throw fileError(error, directory);
  });
  const lock = await DirectoryLock.take(directory, lockFile);
  try {
    const { id } = await openState(directory);
    return { id, giveBack: () => lock.giveBack() };
  } catch (error) {
    await lock.giveBack();
    throw error;
  }
}
