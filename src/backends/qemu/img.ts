/** Calls on disk images, implemented with qemu-img. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import { LIMITS, limitInText, limitOfError } from '../../domain/limits.js';

const run = promisify(execFile);
const TIMEOUT_MS = 10_000;
/** A merge writes the whole content of the overlay, so it may take long. */
const COMMIT_TIMEOUT_MS = 3600_000;

/** Returns the size of the disk as the guest sees it. The file may be in use. */
export async function virtualSizeBytes(path: string, format: string): Promise<number> {
  const text = await qemuImg(['info', '--output=json', '-U', '-f', format, path], TIMEOUT_MS);
  const info: unknown = JSON.parse(text);
  const size = typeof info === 'object' && info !== null && 'virtual-size' in info ? info['virtual-size'] : null;
  if (typeof size === 'number') return size;
  throw new MigrationError('QEMU_FAILED', `qemu-img info ${path} has no virtual-size`);
}

/** Creates a qcow2 without content of its own. It does not open the base, which a QEMU may have open. */
export async function createOverlay(
  path: string,
  base: { path: string; format: string },
  sizeBytes: number,
): Promise<void> {
  const args = ['create', '-q', '-f', 'qcow2', '-u', '-b', base.path, '-F', base.format, path, String(sizeBytes)];
  await qemuImg(args, TIMEOUT_MS);
}

/** Writes the overlay's content into its base. No QEMU may have either file open. */
export async function commitOverlay(path: string): Promise<void> {
  await qemuImg(['commit', '-q', '-f', 'qcow2', path], COMMIT_TIMEOUT_MS);
}

/**
 * Returns the reason why the disk does not open, or null. A qcow2 can be readable as a file and still not open as a
 * disk,
 * if its header is damaged or its backing file is missing. -U ignores the lock, which the QEMU of a VM that is about to
 * migrate here holds.
 */
export async function openProblem(path: string, format: string): Promise<string | null> {
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
    const isMissing = code === 'ENOENT';
    const limit = limitOfError(error) ?? limitInText(message);
    const known: ErrorCode = limit === null ? 'QEMU_FAILED' : LIMITS[limit].code;
    const remedy = isMissing ? 'install qemu-utils' : limit === null ? undefined : LIMITS[limit].remedy;
    throw new MigrationError(isMissing ? 'UNSUPPORTED' : known, `qemu-img ${args[0] ?? ''}: ${message}`, {
      ...(remedy === undefined ? {} : { remedy }),
      ...(limit === null ? {} : { details: { limit } }),
      cause: error,
    });
  }
}
