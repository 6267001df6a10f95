/**
 * The command that starts a QEMU whose guest is not trusted. The program `vmigrate-launcher` (native/launcher) becomes
 * QEMU, with its pid, and leaves a small process behind that outlives the daemon: it writes QEMU's output to files of a
 * limited size, and opens the files of a contained QEMU.
 */
import { realpathSync } from 'node:fs';
import { access } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { Command, Container, VmPlace } from '../../backend.js';
import { fileListPath } from './file-list.js';

export const LAUNCHER = fileURLToPath(new URL('../../../../build/native/Release/vmigrate-launcher', import.meta.url));
/** Each log has this many bytes at most, and so has each of the older files that are kept beside it. */
export const LOG_BYTES_MAX = 2 * 1024 * 1024;
export const OLDER_LOGS_KEPT = 2;
/** QEMU opens its serial log by this descriptor. The number is above those of the files that a launch passes on. */
const SERIAL_DESCRIPTOR = 100;
const MARK_FILE = 'spooling';
const ROOT_DIRECTORY = 'root';
const KEPT_POLL_MS = 5;

/** QEMU's own name for a descriptor that it has been given, and the argument that gives it. */
export const SPOOLED_SERIAL_PATH = `/dev/fdset/${SERIAL_DESCRIPTOR}`;
export const SPOOLED_SERIAL = ['-add-fd', `fd=${SERIAL_DESCRIPTOR},set=${SERIAL_DESCRIPTOR}`] as const;

/** What a contained QEMU sees of the host: programs and their data, which are nobody's secret. */
const SHOWN = ['/usr', '/lib', '/lib64', '/bin', '/sbin', '/etc/ld.so.cache', '/etc/alternatives', '/etc/localtime'];
const DEVICES = ['/dev/null', '/dev/zero', '/dev/full', '/dev/random', '/dev/urandom'];

/** Returns the command that runs `command` with its output in the logs of `place`, and contained if it is to be. */
export function launched(command: Command, place: VmPlace, container: Container | null): Command {
  return {
    program: LAUNCHER,
    args: [
      ...['--limit', String(LOG_BYTES_MAX), '--keep', String(OLDER_LOGS_KEPT)],
      ...['--mark', join(place.directory, MARK_FILE)],
      ...['--log', '1', place.outputPath, '--log', String(SERIAL_DESCRIPTOR), place.serialLogPath],
      ...(container === null ? [] : containerOptions(command, place, container)),
      // The first program that loads the preload uses it up, so only QEMU gets its variables.
      ...Object.entries(command.environment).flatMap(([name, value]) => ['--env', `${name}=${value}`]),
      ...['--', command.program, ...command.args],
    ],
    environment: {},
  };
}

/** The directory on which the private root of a contained QEMU is mounted, in a namespace of its own. */
export function rootPath({ directory }: Pick<VmPlace, 'directory'>): string {
  return join(directory, ROOT_DIRECTORY);
}

function containerOptions({ program }: Command, place: VmPlace, container: Container): string[] {
  // One that is not in /usr, and the file that its name stands for.
  const shown = program.startsWith('/') ? [...SHOWN, program, realPath(program)] : SHOWN;
  return [
    ...['--uid', String(container.uid), '--files', fileListPath(place), '--root', rootPath(place)],
    ...shown.flatMap((path) => ['--read-only', path]),
    ...DEVICES.flatMap((path) => ['--device', path]),
    ...container.socketDirectories.flatMap((path) => ['--read-only', path]),
    ...['--writable', place.socketDirectory],
    ...container.taps.flatMap((name) => ['--tap', name]),
    ...container.cgroups.flatMap((directory) => ['--cgroup', directory]),
  ];
}

function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    // The start says best what is wrong.
    return path;
  }
}

/** Waits until everything that an ended QEMU has written is in its logs, but not longer than `timeoutMs`. */
export async function untilKept(directory: string, timeoutMs: number): Promise<void> {
  const mark = join(directory, MARK_FILE);
  const isThere = () =>
    access(mark).then(
      () => true,
      () => false,
    );
  const deadlineMs = performance.now() + timeoutMs;
  while ((await isThere()) && performance.now() < deadlineMs) await sleep(KEPT_POLL_MS);
}
