/** Reads the limits of this process and of this host that many VMs meet, with what is used of each. */
import { readdir, readFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { HostLimits, LimitUse } from '../../domain/host.js';

export interface LimitPlaces {
  readonly proc: string;
  readonly cgroups: string;
}

const PLACES: LimitPlaces = { proc: '/proc', cgroups: '/sys/fs/cgroup' };
const CAP_SYS_RESOURCE = 24n;
const CAP_SYS_ADMIN = 21n;

/** Never rejects for a file that a kernel lacks: that limit is then left out. */
export async function hostLimits(places: LimitPlaces = PLACES): Promise<HostLimits> {
  const { proc } = places;
  const limits = await read(join(proc, 'self/limits'));
  const [openFiles, openFilesOfHost, tasks, mappings] = await Promise.all([
    openFilesUse(proc, limits),
    hostFilesUse(proc),
    tasksUse(places, limits),
    mappingsUse(proc),
  ]);
  return {
    openFiles,
    openFilesOfHost,
    tasks,
    mappings,
    fileWatchesMax: finite(Number(await read(join(proc, 'sys/fs/inotify/max_user_watches')))),
  };
}

async function openFilesUse(proc: string, limits: string): Promise<LimitUse | null> {
  const max = softLimit(limits, 'Max open files');
  if (max === null) return null;
  // If even this directory cannot be opened, no descriptor is free.
  const used = await readdir(join(proc, 'self/fd')).then(
    (entries) => entries.length - 1,
    () => max,
  );
  return { used, max };
}

async function hostFilesUse(proc: string): Promise<LimitUse | null> {
  const [used, , max] = (await read(join(proc, 'sys/fs/file-nr'))).trim().split(/\s+/).map(Number);
  return use(used, max);
}

async function mappingsUse(proc: string): Promise<LimitUse | null> {
  const maps = await read(join(proc, 'self/maps'));
  return use(maps.split('\n').length - 1, Number((await read(join(proc, 'sys/vm/max_map_count'))) || Number.NaN));
}

/** Returns the narrowest limit of tasks: the host's, the cgroups', and the user's if it holds for this process. */
async function tasksUse({ proc, cgroups }: LimitPlaces, limits: string): Promise<LimitUse | null> {
  const [, running] = /\d+\/(\d+)/.exec(await read(join(proc, 'loadavg'))) ?? [];
  const found: (LimitUse | null)[] = [];
  for (const name of ['threads-max', 'pid_max']) {
    found.push(use(Number(running), Number((await read(join(proc, 'sys/kernel', name))) || Number.NaN)));
  }
  const path = /^(?:0:|\d+:pids):(.*)$/m.exec(await read(join(proc, 'self/cgroup')))?.[1];
  const root = /^0::/m.test(await read(join(proc, 'self/cgroup'))) ? cgroups : join(cgroups, 'pids');
  if (path !== undefined) {
    for (let directory = join(root, path); directory.startsWith(root); directory = dirname(directory)) {
      const max = Number((await read(join(directory, 'pids.max'))) || Number.NaN);
      found.push(use(Number((await read(join(directory, 'pids.current'))) || Number.NaN), max));
    }
  }
  const userMax = softLimit(limits, 'Max processes');
  if (userMax !== null && !(await isExemptFromUserLimit(proc))) found.push(use(await tasksOfUser(proc), userMax));
  const known = found.filter((each) => each !== null);
  return known.sort((a, b) => a.max - a.used - (b.max - b.used))[0] ?? null;
}

/** The kernel does not count the tasks of root, nor of a process with one of two capabilities. */
async function isExemptFromUserLimit(proc: string): Promise<boolean> {
  const status = await read(join(proc, 'self/status'));
  if (/^Uid:\s+0\b/m.test(status)) return true;
  const capabilities = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)/m.exec(status)?.[1] ?? '0'}`);
  return ((capabilities >> CAP_SYS_RESOURCE) & 1n) === 1n || ((capabilities >> CAP_SYS_ADMIN) & 1n) === 1n;
}

async function tasksOfUser(proc: string): Promise<number> {
  const uid = /^Uid:\s+(\d+)/m.exec(await read(join(proc, 'self/status')))?.[1];
  let count = 0;
  for (const entry of await readdir(proc).catch(() => [])) {
    if (!/^\d+$/.test(entry)) continue;
    const status = await read(join(proc, entry, 'status'));
    if (/^Uid:\s+(\d+)/m.exec(status)?.[1] !== uid) continue;
    count += Number(/^Threads:\s+(\d+)/m.exec(status)?.[1] ?? 0);
  }
  return count;
}

function softLimit(limits: string, name: string): number | null {
  const soft = new RegExp(`^${name}\\s+(\\S+)`, 'm').exec(limits)?.[1];
  return soft === undefined || soft === 'unlimited' ? null : finite(Number(soft));
}

function use(used: number | undefined, max: number | undefined): LimitUse | null {
  if (used === undefined || max === undefined || !Number.isFinite(used) || !Number.isFinite(max)) return null;
  return { used, max };
}

function finite(value: number): number | null {
  return Number.isFinite(value) && value > 0 ? value : null;
}

async function read(path: string): Promise<string> {
  return readFile(path, 'utf8').catch(() => '');
}
