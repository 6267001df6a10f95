/** Fills a small tmpfs to the last block, as another program on the host would. */
import { execFileSync } from 'node:child_process';
import { open, rm, statfs } from 'node:fs/promises';
import { join } from 'node:path';

const TRIES = 12;
const SLACK_BYTES = 32 * 1024;

/**
 * Leaves no free block on the tmpfs at `path`: makes it hardly larger than what is in it, and fills the rest. It cannot
 * be made smaller than its content, which may grow until it is resized, so what is left to fill doubles with each try.
 */
export async function fillTmpfs(path: string): Promise<void> {
  for (let tries = 1; ; tries++) {
    const { blocks, bfree, bsize } = await statfs(path);
    try {
      resize(path, (blocks - bfree) * bsize + SLACK_BYTES * 2 ** tries);
      break;
    } catch (error) {
      if (tries === TRIES) throw error;
    }
  }
  await appendUntilFull(filler(path));
}

/** Takes back what `fillTmpfs` has written, and gives the tmpfs its size again. */
export async function freeTmpfs(path: string, sizeBytes: number): Promise<void> {
  await rm(filler(path), { force: true });
  resize(path, sizeBytes);
}

function filler(path: string): string {
  return join(path, 'filler');
}

function resize(path: string, sizeBytes: number): void {
  execFileSync('mount', ['-o', `remount,size=${sizeBytes}`, path], { stdio: 'pipe' });
}

async function appendUntilFull(path: string): Promise<void> {
  const file = await open(path, 'a');
  try {
    for (;;) await file.write(Buffer.alloc(4096, 1));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error;
  } finally {
    await file.close();
  }
}
