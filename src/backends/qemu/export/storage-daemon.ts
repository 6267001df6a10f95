/**
 * Serves disks with qemu-storage-daemon over NBD. The formats are opened here, so a disk that is served has a fixed
 * size whatever its files do, and a whole chain of files is one disk.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { access, chmod, constants, rm, stat } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { dirname, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import { LIMITS, limitInText, limitOfError } from '../../../domain/limits.js';
import { endProcess, findByArgument } from '../../../kit/process.js';
import type { DiskExport, DiskExports, ExportOrder } from '../../disk-export.js';

const PROGRAM = 'qemu-storage-daemon';
/** A start takes 30 ms. The limit allows for a busy machine. */
const START_MS = 15_000;
const POLL_MS = 10;
const OUTPUT_BYTES_MAX = 2048;

const PATH_DEFAULT = '/usr/sbin:/usr/bin:/sbin:/bin';

export const storageDaemon: DiskExports = { problem, serve, endLeftover, pathOf };

async function problem(): Promise<string | null> {
  for (const directory of (process.env['PATH'] ?? PATH_DEFAULT).split(':')) {
    const isThere = await access(join(directory, PROGRAM), constants.X_OK).then(
      () => true,
      () => false,
    );
    if (isThere) return null;
  }
  return `${PROGRAM} is not installed`;
}

async function serve(order: ExportOrder): Promise<DiskExport> {
  const { socketPath } = order;
  await rm(socketPath, { force: true });
  const child = spawn(PROGRAM, await argumentsFor(order), {
    detached: true,
    cwd: dirname(socketPath),
    stdio: ['ignore', 'ignore', 'pipe'],
    env: { PATH: process.env['PATH'] ?? PATH_DEFAULT },
  });
  let output = '';
  child.stderr?.on('data', (data: Buffer) => (output = (output + data.toString()).slice(-OUTPUT_BYTES_MAX)));
  const exited = new Promise<void>((resolve) => {
    child.once('close', () => resolve());
    child.once('error', () => resolve());
  });
  const failed = new Promise<never>((_, reject) => {
    child.once('error', (cause) => reject(notStarted(cause)));
    child.once('close', () => {
      reject(ended(output.trim()));
    });
  });
  failed.catch(() => undefined);
  const end = async (): Promise<void> => {
    child.kill('SIGKILL');
    await exited;
    await rm(socketPath, { force: true });
  };
  try {
    (await Promise.race([answering(socketPath), failed])).destroy();
    await chmod(socketPath, 0o600);
  } catch (error) {
    await end();
    throw error;
  }
  unref(child);
  return { exited, end, connect: () => open(socketPath) };
}

/** The daemon may end while the process serves. The next one ends it (`endLeftover`). */
function unref(child: ChildProcess): void {
  child.unref();
  (child.stderr as Socket | null)?.unref();
}

async function argumentsFor({ socketPath, disks, isFixed }: ExportOrder): Promise<string[]> {
  const access = { 'read-only': true, 'force-share': !isFixed };
  const args: string[] = [];
  for (const [index, { id, path, format }] of disks.entries()) {
    const driver = (await stat(path)).isBlockDevice() ? 'host_device' : 'file';
    const file = { driver, filename: path, ...access };
    args.push('--blockdev', JSON.stringify({ driver: format, 'node-name': `disk-${index}`, file, ...access }));
    const exported = { type: 'nbd', id: `export-${index}`, 'node-name': `disk-${index}`, name: id, writable: false };
    args.push('--export', JSON.stringify(exported));
  }
  // The server comes before the exports.
  return ['--nbd-server', serverArgument(socketPath), ...args];
}

/** Only one process has this argument. */
function serverArgument(socketPath: string): string {
  return `addr.type=unix,addr.path=${socketPath.replaceAll(',', ',,')},max-connections=0`;
}

async function answering(socketPath: string): Promise<Socket> {
  const deadlineMs = performance.now() + START_MS;
  for (;;) {
    try {
      return await open(socketPath);
    } catch (cause) {
      if (performance.now() < deadlineMs) await sleep(POLL_MS);
      else throw new MigrationError('TIMEOUT', `${PROGRAM} does not answer within ${START_MS} ms`, { cause });
    }
  }
}

function open(socketPath: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(socketPath);
    const fail = (cause: Error): void => {
      reject(new MigrationError('QEMU_GONE', `${PROGRAM} does not answer: ${cause.message}`, { cause }));
    };
    socket.once('error', fail);
    socket.once('connect', () => {
      socket.off('error', fail);
      resolve(socket);
    });
  });
}

function notStarted(cause: NodeJS.ErrnoException): MigrationError {
  if (limitOfError(cause) !== null) return toMigrationError(cause);
  const remedy = cause.code === 'ENOENT' ? { remedy: 'install qemu-system-common' } : {};
  return new MigrationError('UNSUPPORTED', `${PROGRAM} cannot be started: ${cause.message}`, { cause, ...remedy });
}

function ended(words: string): MigrationError {
  const limit = limitInText(words);
  return new MigrationError('QEMU_FAILED', `${PROGRAM} has ended: ${words}`, {
    details: { output: words, ...(limit === null ? {} : { limit }) },
    ...(limit === null ? {} : { remedy: LIMITS[limit].remedy }),
  });
}

async function endLeftover(socketPath: string): Promise<void> {
  for (const left of await findByArgument(serverArgument(socketPath))) await endProcess(left, 0);
  await rm(socketPath, { force: true });
}

function pathOf(socketPath: string, disk: string): string {
  return `nbd+unix:///${disk}?socket=${encodeURI(socketPath)}`;
}
