/** Disk images, by qemu-img. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { MigrationError, toMigrationError } from '../../domain/errors.js';

const run = promisify(execFile);
const TIMEOUT_MS = 10_000;
/** Merging an overlay writes all of it. */
const COMMIT_TIMEOUT_MS = 3600_000;

/** The size that a guest sees. The file may be in use. */
export async function virtualSizeBytes(path: string, format: string): Promise<number> {
  const text = await qemuImg(['info', '--output=json', '-U', '-f', format, path], TIMEOUT_MS);
  const info: unknown = JSON.parse(text);
  const size = typeof info === 'object' && info !== null && 'virtual-size' in info ? info['virtual-size'] : null;
  if (typeof size === 'number') return size;
  throw new MigrationError('QEMU_FAILED', `qemu-img does not say how large ${path} is`);
}

/** A qcow2 without content of its own. Its base is not opened: a QEMU may have it. */
export async function createOverlay(
  path: string,
  base: { path: string; format: string },
  sizeBytes: number,
): Promise<void> {
  const args = ['create', '-q', '-f', 'qcow2', '-u', '-b', base.path, '-F', base.format, path, String(sizeBytes)];
  await qemuImg(args, TIMEOUT_MS);
}

/** What is in the overlay goes into its base. No QEMU may have either. */
export async function commitOverlay(path: string): Promise<void> {
  await qemuImg(['commit', '-q', '-f', 'qcow2', path], COMMIT_TIMEOUT_MS);
}

/**
 * null: it opens. A qcow2 whose header or backing file is missing opens as a file and not as a disk. -U: the QEMU of a
 * VM that is to come here holds the lock.
 */
export async function whyNot(path: string, format: string): Promise<string | null> {
  if (format === 'raw') return null;
  const args = ['info', '--output=json', '-U', '--backing-chain', '-f', format, path];
  try {
    await run('qemu-img', args, { timeout: TIMEOUT_MS });
    return null;
  } catch (error) {
    const stderr = (error as { stderr?: unknown }).stderr;
    return typeof stderr === 'string' && stderr !== '' ? stderr.trim() : toMigrationError(error).message;
  }
}

async function qemuImg(args: readonly string[], timeoutMs: number): Promise<string> {
  try {
    return (await run('qemu-img', args, { timeout: timeoutMs })).stdout;
  } catch (error) {
    const { stderr, code } = error as { stderr?: string; code?: unknown };
    const message = stderr?.trim() || (error instanceof Error ? error.message : String(error));
    const isFull = /No space left/i.test(message);
    throw new MigrationError(
      code === 'ENOENT' ? 'UNSUPPORTED' : isFull ? 'NO_SPACE' : 'QEMU_FAILED',
      `qemu-img ${args[0] ?? ''}: ${message}`,
      { cause: error, ...(code === 'ENOENT' ? { remedy: 'install qemu-utils' } : {}) },
    );
  }
}
