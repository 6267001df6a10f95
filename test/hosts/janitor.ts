/**
 * Takes away what a run leaves behind that could not clean up after itself, whatever ended it: ^C, a deadline, SIGKILL.
 * A process in a session of its own waits until the run's end of a pipe is closed; it then ends the QEMUs and daemons
 * that name one of the run's directories on their command line, and removes the directories, file systems mounted in
 * them, and the run's network namespaces.
 */
import { type ChildProcess, spawn } from 'node:child_process';

/** The janitor knows its paths from its environment, so that nothing names them on its own command line. */
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
  /** Directories, absolute and without blanks; processes are known by them. */
  readonly paths: readonly string[];
  /** Names of network namespaces begin so. */
  readonly namespacePrefix?: string;
}

export class Janitor {
  readonly #process: ChildProcess;

  constructor({ paths, namespacePrefix }: Belongings) {
    const odd = paths.find((path) => !/^\/[\w./-]*vmg-[\w./-]+$/.test(path));
    if (odd !== undefined) throw new Error(`nobody but a run of tests owns ${odd}`);
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
    // The pipe is a handle of its own; it must not keep a run alive that is done.
    const pipe = this.#process.stdin as unknown as { unref(): void } | null;
    pipe?.unref();
  }

  /** The run has cleaned up itself. */
  dismiss(): void {
    this.#process.kill('SIGKILL');
  }
}
