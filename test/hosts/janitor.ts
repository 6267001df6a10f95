/**
 * Cleans up after a run that could not do so itself, whatever ended it: ^C, a deadline, SIGKILL. The janitor is a
 * process with its own session. It waits until the run's end of a pipe is closed. Then it ends the QEMUs and daemons
 * that have one of the run's directories on their command line, and removes the directories, the file systems mounted
 * in them, and the run's network namespaces.
 */
import { type ChildProcess, spawn } from 'node:child_process';

/** The janitor gets its paths from the environment, so that they are not on its own command line. */
const SCRIPT = `
cat >/dev/null
for process in /proc/[0-9]*; do
  case $(readlink "$process/exe") in *qemu-system-*|*/node) ;; *) continue ;; esac
  for path in $JANITOR_PATHS; do
    if grep -qaF -e "$path" "$process/cmdline"; then kill -KILL "\${process#/proc/}"; break; fi
  done
done
for namespace in $(ip netns list | cut -d' ' -f1); do
  case $namespace in $JANITOR_NAMESPACES) ip netns del "$namespace" ;; esac
done
while read -r _ mount _; do
  for path in $JANITOR_PATHS; do case $mount in "$path"*) umount --lazy "$mount" ;; esac; done
done </proc/mounts
if [ -z "$VMIGRATE_KEEP_LOGS" ]; then rm -rf $JANITOR_PATHS; fi
`;

export interface Belongings {
  /** Absolute directories without blanks, by which processes are found. */
  readonly paths: readonly string[];
  /** Prefix of the names of network namespaces. */
  readonly namespacePrefix?: string;
}

export class Janitor {
  readonly #process: ChildProcess;

  constructor({ paths, namespacePrefix }: Belongings) {
    const odd = paths.find((path) => !/^\/[\w./-]*vmg-[\w./-]+$/.test(path));
    if (odd !== undefined) throw new Error(`${odd} is not a directory of a test run`);
    this.#process = spawn('sh', ['-c', SCRIPT], {
      detached: true,
      stdio: ['pipe', 'ignore', 'ignore'],
      env: {
        ...process.env,
        JANITOR_PATHS: paths.join(' '),
        JANITOR_NAMESPACES: namespacePrefix === undefined ? '' : `${namespacePrefix}*`,
      },
    });
    this.#process.on('error', () => undefined);
    this.#process.unref();
    // The pipe is a handle of its own, and must not keep a finished run alive.
    const pipe = this.#process.stdin as unknown as { unref(): void } | null;
    pipe?.unref();
  }

  /** Ends the janitor, because the run has cleaned up itself. */
  dismiss(): void {
    this.#process.kill('SIGKILL');
  }
}
