/** Small files that a crash of the machine leaves either as they were or as they were to become. */
import { open, rename } from 'node:fs/promises';
import { dirname } from 'node:path';

/**
 * Written to the side, synced, renamed, directory synced. Mode 0600. Two writes of one path must not run at the same
 * time.
 */
export async function writeDurably(path: string, text: string): Promise<void> {
  await writeAside(path, text, true);
  await syncDirectory(dirname(path));
}

/**
 * As writeDurably for a crash of the daemon; after one of the machine there may be an old one, a new one, or an empty
 * one. Some ms less.
 */
export function writeWhole(path: string, text: string): Promise<void> {
  return writeAside(path, text, false);
}

async function writeAside(path: string, text: string, isSynced: boolean): Promise<void> {
  const sidePath = `${path}.new`;
  const file = await open(sidePath, 'w', 0o600);
  try {
    await file.writeFile(text);
    if (isSynced) await file.sync();
  } finally {
    await file.close();
  }
  await rename(sidePath, path);
}

/** Makes renames and removals in it durable. */
export async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path, 'r');
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
}
