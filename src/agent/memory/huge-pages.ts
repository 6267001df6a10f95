/** Checks this daemon's directories on hugetlbfs at its start, as it checks the memory directory (mark.ts). */
import { lstat, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { toMigrationError } from '../../domain/errors.js';
import type { Log } from '../../kit/log.js';
import { hugeRoot, hugetlbMounts, inHugeRoot } from '../vm/ram-place.js';

export interface HugePlaces {
  readonly host: string;
  readonly stateDir: string;
  /** The id of the memory directory's mark. */
  readonly memoryId: string;
}

/**
 * Marks the directories that exist. One of an earlier build is accepted if the state directory knows all VMs in it. One
 * that is somebody else's does not keep the daemon from starting, because most VMs need no huge pages: VMs that need
 * them are refused with the same reason. Never rejects for such a directory.
 */
export async function tieHugePages({ host, stateDir, memoryId }: HugePlaces, log: Log): Promise<void> {
  const vms = await readdir(join(stateDir, 'vms')).catch(() => []);
  for (const mount of await hugetlbMounts()) {
    const directory = hugeRoot(mount.path, host);
    if ((await lstat(directory).catch(() => null)) === null) continue;
    await inHugeRoot(directory, memoryId, ['.images', ...vms], () => Promise.resolve()).catch((error: unknown) => {
      log.warn(
        { directory, err: toMigrationError(error) },
        'the directory for huge pages belongs to somebody else: VMs with huge pages are refused',
      );
    });
  }
}
