/** The doctor's lines about limits: how many are in use, for how many clones the rest is enough, where to raise it. */
import {
  type HostLimits,
  type LimitUse,
  OPEN_FILES_PER_VM,
  OPEN_FILES_RESERVE,
  TASKS_PER_VM,
} from '../../domain/host.js';
import { LIMITS } from '../../domain/limits.js';
import { ok, type Verdict, warn } from './doctor-verdict.js';

/** A fork of this many clones is what the documents promise. */
const CLONES_WANTED = 64;
const MAPPINGS_FREE_MIN = 4096;
/** One for the exit port of each VM, and some for certificates. */
const WATCHES_MIN = 1024;

export function limitChecks(limits: HostLimits | undefined): (readonly [string, Verdict])[] {
  if (limits === undefined) return [];
  const { openFiles, openFilesOfHost, tasks, mappings, fileWatchesMax } = limits;
  return [
    ['open files', perVm(openFiles, OPEN_FILES_PER_VM, OPEN_FILES_RESERVE, LIMITS.openFiles.remedy)],
    ['files of host', perVm(openFilesOfHost, OPEN_FILES_PER_VM, OPEN_FILES_RESERVE, LIMITS.openFilesOfHost.remedy)],
    ['tasks', perVm(tasks, TASKS_PER_VM + 1, 0, LIMITS.tasks.remedy)],
    ['mappings', mappingsVerdict(mappings)],
    ['file watches', watchesVerdict(fileWatchesMax)],
  ];
}

function perVm(use: LimitUse | null, each: number, reserve: number, remedy: string): Verdict {
  if (use === null) return ok('no limit');
  const room = Math.max(0, Math.floor((use.max - use.used - reserve) / each));
  const text = `${use.used} of ${use.max} in use; a VM or clone takes about ${each}, so ${room} more fit`;
  return room >= CLONES_WANTED ? ok(text) : warn(`${text}, fewer than ${CLONES_WANTED}`, remedy);
}

function mappingsVerdict(use: LimitUse | null): Verdict {
  if (use === null) return ok('no limit known');
  const text = `${use.used} of ${use.max} in use`;
  return use.max - use.used >= MAPPINGS_FREE_MIN ? ok(text) : warn(text, 'raise the sysctl vm.max_map_count');
}

function watchesVerdict(max: number | null): Verdict {
  if (max === null) return ok('no limit known');
  const text = `${max} for each user; each VM takes one`;
  return max >= WATCHES_MIN ? ok(text) : warn(text, LIMITS.watches.remedy);
}
