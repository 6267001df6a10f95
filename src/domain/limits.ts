/**
 * The limits of a process and of a host that a system call can meet, each with the place where it is raised. The code
 * of all of them is OUT_OF_MEMORY or NO_SPACE, which daemons of earlier builds know too; `details.limit` says which.
 */
export const LIMITS = {
  openFiles: {
    code: 'OUT_OF_MEMORY',
    text: 'the process may not open more files (RLIMIT_NOFILE)',
    remedy:
      'raise the limit of vmigrated and restart it: LimitNOFILE=1048576 in its unit, or "ulimit -n" before its ' +
      'start; the sysctl fs.nr_open is the largest value',
  },
  openFilesOfHost: {
    code: 'OUT_OF_MEMORY',
    text: 'the host has no more open files to give',
    remedy: 'raise the sysctl fs.file-max on that host',
  },
  tasks: {
    code: 'OUT_OF_MEMORY',
    text: 'no further process or thread may start',
    remedy:
      'raise the limit of tasks: TasksMax=infinity in the unit of vmigrated (pids.max of its cgroup), "ulimit -u", ' +
      'or the sysctls kernel.pid_max and kernel.threads-max',
  },
  memory: {
    code: 'OUT_OF_MEMORY',
    text: 'the kernel gives no more memory',
    remedy:
      'free memory on that host, or raise MemoryMax= in the unit of vmigrated, or the sysctl vm.max_map_count: ' +
      '"vmctl doctor" there shows them',
  },
  lockedMemory: {
    code: 'OUT_OF_MEMORY',
    text: 'no more memory may be locked (RLIMIT_MEMLOCK)',
    remedy: 'LimitMEMLOCK=infinity in the unit of vmigrated, or run it as root or with CAP_IPC_LOCK',
  },
  watches: {
    code: 'OUT_OF_MEMORY',
    text: 'no more files may be watched (inotify)',
    remedy: 'raise the sysctls fs.inotify.max_user_watches and fs.inotify.max_user_instances on that host',
  },
  space: {
    code: 'NO_SPACE',
    text: 'the file system is full, or its quota is used up',
    remedy: 'free space in that file system on that host',
  },
} as const satisfies Record<string, { code: 'OUT_OF_MEMORY' | 'NO_SPACE'; text: string; remedy: string }>;

export type Limit = keyof typeof LIMITS;

/** System calls that start a process or a thread. EAGAIN of any other call names no limit. */
const STARTS_TASK = /^(spawn|fork|vfork|clone3?|pthread_create|uv_thread_create)\b/;
const WATCHES = /^(watch|inotify_|uv_fs_event)/;
const LOCKS = /mlock|MLOCK|register memory|ibv_reg_mr/;

/**
 * Returns the limit that a failed call has met, or null. `errno` is its name (EMFILE), `call` the system call or the
 * native operation.
 */
export function limitMet(errno: string, call: string): Limit | null {
  switch (errno) {
    case 'EMFILE':
      return WATCHES.test(call) ? 'watches' : 'openFiles';
    case 'ENFILE':
      return 'openFilesOfHost';
    case 'EAGAIN':
      return STARTS_TASK.test(call) ? 'tasks' : null;
    case 'ENOMEM':
      return LOCKS.test(call) ? 'lockedMemory' : 'memory';
    case 'ENOSPC':
      return WATCHES.test(call) ? 'watches' : 'space';
    case 'EDQUOT':
      return 'space';
    default:
      return null;
  }
}

/** The words of libc in the output of other programs (QEMU, qemu-img, ip), where there is no errno. */
const WORDS: readonly (readonly [RegExp, Limit])[] = [
  [/Too many open files in system/i, 'openFilesOfHost'],
  [/Too many open files/i, 'openFiles'],
  [/(?:thread|fork|clone|spawn)[^\n]*Resource temporarily unavailable/i, 'tasks'],
  [/Cannot allocate memory|Out of memory/i, 'memory'],
  [/No space left on device|Disk quota exceeded/i, 'space'],
];

/** Returns the limit that the output of a program names, or null. */
export function limitInText(text: string): Limit | null {
  return WORDS.find(([words]) => words.test(text))?.[1] ?? null;
}

/** Returns the limit behind an error of Node's, or null. */
export function limitOfError(thrown: unknown): Limit | null {
  const { code, syscall } = (thrown ?? {}) as { code?: unknown; syscall?: unknown };
  return typeof code === 'string' ? limitMet(code, typeof syscall === 'string' ? syscall : '') : null;
}
