/**
 * Opens files that a user has named. Calls on files share four threads with the records and the commits of all VMs, so
 * none of them may wait for a stranger: not for a writer of a FIFO, and not for a file server that is away. A child
 * process opens the file first; if that takes too long, it is killed, and no thread of the daemon has waited.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { MigrationError, toMigrationError } from '../domain/errors.js';

const ANSWER_MS = 5_000;
/** A process that waits for a file server may not even end by SIGKILL. So many of them may be left. */
const PROBES_MAX = 32;
/**
 * Opens $1 for reading if it is a file, a block device or a directory, without waiting. How it ends does not matter:
 * the daemon makes the same call afterwards, and gets the system's own error.
 */
const PROBE =
  'if [ -f "$1" ] || [ -b "$1" ]; then exec dd if="$1" iflag=nonblock count=0 status=none; fi; ' +
  'if [ -d "$1" ]; then exec ls -d "$1/."; fi';

let probes = 0;

/** For tests: what is run instead of the shell. */
export interface ProbeOptions {
  readonly timeoutMs?: number;
  readonly command?: readonly string[];
}

/** Throws TIMEOUT if the file system of the path does not answer. Says nothing about whether the file exists. */
export async function fileSystemAnswers(path: string, options: ProbeOptions = {}): Promise<void> {
  const { timeoutMs = ANSWER_MS, command = ['/bin/sh', '-c', PROBE, 'sh', path] } = options;
  if (probes >= PROBES_MAX) throw crowded(path);
  const [program = '', ...args] = command;
  let child: ChildProcess;
  try {
    child = spawn(program, args, { stdio: 'ignore' });
  } catch (error) {
    throw toMigrationError(error);
  }
  probes++;
  const ended = new Promise<void>((resolve, reject) => {
    child.once('exit', () => resolve());
    child.once('error', (error) => reject(toMigrationError(error)));
  }).finally(() => probes--);
  ended.catch(() => undefined);
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => {
      child.kill('SIGKILL');
      child.unref();
      reject(noAnswer(path, `no answer within ${timeoutMs / 1000} s`));
    }, timeoutMs);
  });
  try {
    await Promise.race([ended, late]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Opens a file or a block device. Never waits for anybody: TIMEOUT if its file system does not answer, USAGE for a
 * FIFO, a socket, a directory or a character device. Other errors are the system's own. The caller closes the handle.
 */
export async function openUserFile(path: string, access: 'read' | 'readWrite'): Promise<FileHandle> {
  await fileSystemAnswers(path);
  const mode = access === 'read' ? constants.O_RDONLY : constants.O_RDWR;
  // Without this flag the call would wait for the other end of a FIFO. Files and block devices do not know it.
  const file = await open(path, mode | constants.O_NONBLOCK | constants.O_NOCTTY);
  try {
    const found = await file.stat();
    if (!found.isFile() && !found.isBlockDevice())
      throw new MigrationError('USAGE', `${path} is neither a file nor a block device`, {
        remedy: 'name a file; a pipe or a socket cannot be used here',
      });
    return file;
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** Nothing is known of this path. The file systems of other paths are to blame. */
function crowded(path: string): MigrationError {
  return new MigrationError('TIMEOUT', `${path} is not looked at: ${PROBES_MAX} other files have not answered yet`, {
    remedy: 'look for file systems that do not answer, for example by "df" on each mount; then try again',
    isRetryable: true,
  });
}

function noAnswer(path: string, why: string): MigrationError {
  return new MigrationError('TIMEOUT', `the file system of ${path} does not answer: ${why}`, {
    remedy: `look at the mount that ${path} is on, for example whether its NFS server is reachable`,
    isRetryable: true,
  });
}
