/**
 * The amount of memory that this process may still lock and allocate. The memory that an RDMA device accesses must be
 * both allocated and locked.
 */
import { readFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';

const CAP_IPC_LOCK = 14n;
const PROC_SELF = '/proc/self';
const CGROUP_ROOT = '/sys/fs/cgroup';
/** Version 1 of cgroups expresses "no limit" by the largest possible number of pages. */
const UNLIMITED_BYTES = 2 ** 60;

/** Returns the bytes that the process may still lock. Null: there is no limit. */
export async function lockableBytes(proc = PROC_SELF): Promise<number | null> {
  const status = await readFile(join(proc, 'status'), 'utf8');
  const capabilities = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? '0'}`);
  if (((capabilities >> CAP_IPC_LOCK) & 1n) === 1n) return null;
  const limits = await readFile(join(proc, 'limits'), 'utf8');
  const soft = /^Max locked memory\s+(\S+)/m.exec(limits)?.[1] ?? '0';
  if (soft === 'unlimited') return null;
  const pinnedBytes = Number(/^VmPin:\s*(\d+) kB/m.exec(status)?.[1] ?? 0) * 1024;
  return Math.max(0, Number(soft) - pinnedBytes);
}

/**
 * Returns the free bytes of the narrowest memory cgroup around this process. Null: there is no limit. File cache, which
 * the kernel reclaims first, counts as free.
 */
export async function cgroupFreeBytes(proc = PROC_SELF, cgroups = CGROUP_ROOT): Promise<number | null> {
  const membership = await readFile(join(proc, 'cgroup'), 'utf8').catch(() => '');
  const isV1 = /^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/m.test(membership);
  const path = (isV1 ? /^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(.*)$/m : /^0::(.*)$/m).exec(membership)?.[1];
  if (path === undefined) return null;
  const root = isV1 ? join(cgroups, 'memory') : cgroups;
  const names = isV1
    ? { limit: 'memory.limit_in_bytes', usage: 'memory.usage_in_bytes' }
    : { limit: 'memory.max', usage: 'memory.current' };
  let narrowest: number | null = null;
  for (let directory = join(root, path); directory.startsWith(root); directory = dirname(directory)) {
    const limitBytes = Number(await readFile(join(directory, names.limit), 'utf8').catch(() => 'max'));
    if (!(limitBytes < UNLIMITED_BYTES)) continue;
    const usedBytes = Number(await readFile(join(directory, names.usage), 'utf8').catch(() => '0'));
    const stat = await readFile(join(directory, 'memory.stat'), 'utf8').catch(() => '');
    const file = [...stat.matchAll(/^(?:in)?active_file (\d+)$/gm)].reduce((sum, [, bytes]) => sum + Number(bytes), 0);
    const freeBytes = Math.max(0, limitBytes - usedBytes + file);
    narrowest = narrowest === null ? freeBytes : Math.min(narrowest, freeBytes);
  }
  return narrowest;
}
