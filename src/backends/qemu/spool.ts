/**
 * The output of a QEMU whose guest is not trusted: serial log and QEMU's own messages. The program `vmigrate-spool`
 * (native/spool) starts QEMU, keeps its pid, and leaves a small process behind that writes the output to files of a
 * limited size. Both outlive the daemon.
 */
import { access } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import type { Command, VmPlace } from '../backend.js';

export const SPOOL_PROGRAM = fileURLToPath(new URL('../../../build/native/Release/vmigrate-spool', import.meta.url));
/** Each log has this many bytes at most, and so has each of the older files that are kept beside it. */
export const LOG_BYTES_MAX = 2 * 1024 * 1024;
export const OLDER_LOGS_KEPT = 2;
/** QEMU opens its serial log by this descriptor. The number is above those of the files that a launch passes on. */
const SERIAL_DESCRIPTOR = 100;
const MARK_FILE = 'spooling';
const KEPT_POLL_MS = 5;

/** The path by which a spooled QEMU opens its serial log. */
export const SPOOLED_SERIAL_PATH = `/proc/self/fd/${SERIAL_DESCRIPTOR}`;

/** Returns the command that runs `command` with its output in the logs of `place`. */
export function spooled(command: Command, program: string, place: VmPlace): Command {
  return {
    program,
    args: [
      ...['--limit', String(LOG_BYTES_MAX), '--keep', String(OLDER_LOGS_KEPT)],
      ...['--mark', join(place.directory, MARK_FILE)],
      ...['--log', '1', place.outputPath, '--log', String(SERIAL_DESCRIPTOR), place.serialLogPath],
      // The first program that loads the preload uses it up, so only QEMU gets its variables.
      ...Object.entries(command.environment).flatMap(([name, value]) => ['--env', `${name}=${value}`]),
      ...['--', command.program, ...command.args],
    ],
    environment: {},
  };
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
