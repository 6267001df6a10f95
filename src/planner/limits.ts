/**
 * Checks beforehand whether a host may open the files and start the tasks that further VMs need, and has room for their
 * records. Pure.
 */
import {
  type HostLimits,
  type LimitUse,
  OPEN_FILES_PER_VM,
  OPEN_FILES_RESERVE,
  STATE_ROOM_BYTES,
  TASKS_PER_VM,
} from '../domain/host.js';
import { LIMITS } from '../domain/limits.js';
import type { Refusal } from '../domain/refusal.js';
import { describeBytes } from './bytes.js';

export interface LimitNeed {
  readonly vmCount: number;
  /** vCPUs of each VM. */
  readonly cpus: number;
}

/** Returns how many VMs fit under the limits of open files and tasks, at most `vmCount`. */
export function vmCountWithinLimits(limits: HostLimits | undefined, { vmCount, cpus }: LimitNeed): number {
  const room = [
    roomFor(limits?.openFiles, OPEN_FILES_PER_VM, OPEN_FILES_RESERVE),
    roomFor(limits?.openFilesOfHost, OPEN_FILES_PER_VM, OPEN_FILES_RESERVE),
    roomFor(limits?.tasks, TASKS_PER_VM + cpus, 0),
  ];
  return Math.min(vmCount, ...room);
}

/** Yields the limits of the host that the VMs would meet. A host of an earlier build reports none. */
export function* checkLimits(host: string, limits: HostLimits | undefined, need: LimitNeed): Iterable<Refusal> {
  const checks = [
    { limit: 'openFiles', use: limits?.openFiles, each: OPEN_FILES_PER_VM, reserve: OPEN_FILES_RESERVE },
    { limit: 'openFilesOfHost', use: limits?.openFilesOfHost, each: OPEN_FILES_PER_VM, reserve: OPEN_FILES_RESERVE },
    { limit: 'tasks', use: limits?.tasks, each: TASKS_PER_VM + need.cpus, reserve: 0 },
  ] as const;
  for (const { limit, use, each, reserve } of checks) {
    if (use === null || use === undefined || roomFor(use, each, reserve) >= need.vmCount) continue;
    const needed = `about ${need.vmCount * each + reserve} more are needed`;
    yield {
      code: 'HOST_LIMIT',
      reason: `${host}: ${NOUNS[limit]} are limited to ${use.max}, ${use.used} are in use, and ${needed}`,
      remedy: LIMITS[limit].remedy,
    };
  }
}

/**
 * A job writes records, and after its commit it can only go on. `freeBytes` is undefined if the host's build is older
 * and does not say.
 */
export function* checkState(host: string, freeBytes: number | undefined): Iterable<Refusal> {
  if (freeBytes === undefined || freeBytes >= STATE_ROOM_BYTES) return;
  const need = `needs ${describeBytes(STATE_ROOM_BYTES)} of free space; it has ${describeBytes(freeBytes)}`;
  yield {
    code: 'NO_SPACE',
    reason: `the state directory of ${host} ${need}`,
    remedy: `free space on its file system on ${host}`,
  };
}

const NOUNS = {
  openFiles: 'open files of vmigrated',
  openFilesOfHost: 'open files of the host',
  tasks: 'processes and threads',
} as const;

function roomFor(use: LimitUse | null | undefined, each: number, reserve: number): number {
  if (use === null || use === undefined) return Number.POSITIVE_INFINITY;
  return Math.max(0, Math.floor((use.max - use.used - reserve) / each));
}
