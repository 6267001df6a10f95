/** A file system that never answers, as an NFS mount whose server is away: a FUSE mount whose program does nothing. */
import { execFileSync, spawnSync } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';

/** Mounts it. The returned call ends it, and with it every call that waits for an answer. */
export function mountSilent(directory: string): () => void {
  const device = openSync('/dev/fuse', 'r+');
  const options = 'fd=3,rootmode=40000,user_id=0,group_id=0';
  const mount = spawnSync('mount', ['-i', '-t', 'fuse', '-o', options, 'silent', directory], {
    stdio: ['ignore', 'ignore', 'pipe', device],
  });
  if (mount.status !== 0) {
    closeSync(device);
    throw new Error(`a FUSE mount is refused: ${mount.stderr.toString()}`);
  }
  return () => {
    closeSync(device);
    execFileSync('umount', ['--lazy', directory]);
  };
}
