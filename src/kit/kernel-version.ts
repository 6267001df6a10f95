/** The version of the running Linux kernel. */
import { release } from 'node:os';

export function isKernelAtLeast([major, minor]: readonly [number, number]): boolean {
  const [, a, b] = /^(\d+)\.(\d+)/.exec(release()) ?? [];
  return Number(a) > major || (Number(a) === major && Number(b) >= minor);
}
