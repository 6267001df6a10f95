/** Calls on disk images, implemented with qemu-img. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { z } from 'zod';
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import { LIMITS, limitInText, limitOfError } from '../../domain/limits.js';
import type { ChainLink } from '../../domain/storage.js';
import { DISK_FORMATS, type DiskFormat } from '../../domain/vm.js';
import type { DiskFile, DiskLayerFile } from '../disk-files.js';

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

const chainAnswer = z.array(z.object({ filename: z.string(), format: z.string(), 'virtual-size': z.number() }));

/** Returns the image and the images behind it, the front one first. The files may be in use. */
export async function chainLinks(path: string, format: string): Promise<ChainLink[]> {
  const text = await qemuImg(['info', '--output=json', '-U', '--backing-chain', '-f', format, path], TIMEOUT_MS);
  return chainAnswer.parse(JSON.parse(text)).map((link) => ({
    path: link.filename,
    format: link.format,
    virtualSizeBytes: link['virtual-size'],
  }));
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
export async function commitOverlay(path: string, basePath: string): Promise<void> {
  // A guest that has broken out may have written another name into its overlay, and qemu-img obeys.
  const [top, base] = await layersOf(path, 'qcow2');
  if (top?.length !== 1 || base?.[0]?.path !== basePath) {
    throw new MigrationError(
      'CORRUPT',
      `${path} does not lie on ${basePath}, but says ${base?.[0]?.path ?? 'nothing'}`,
      {
        remedy: 'do not trust the guest that has written it; if nobody needs its disk, remove the file',
      },
    );
  }
  try {
    await qemuImg(['commit', '-q', '-f', 'qcow2', path], COMMIT_TIMEOUT_MS);
  } catch (error) {
    if (!isLocked(error)) throw error;
    throw new MigrationError('CONFLICT', `${path} or its backing file is open in another program`, {
      cause: error,
      remedy: 'end the VM or the program that has it open',
    });
  }
}

/**
 * Returns the reason why the disk does not open, or null. A qcow2 can be readable as a file and still not open as a
 * disk, if its header is damaged or its backing file is missing. -U ignores the lock, which the QEMU of a VM that is
 * about to migrate here holds.
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

const layerInfo = z.object({
  filename: z.string(),
  format: z.string(),
  'full-backing-filename': z.string().optional(),
  'backing-filename-format': z.string().optional(),
  // A qcow2 may keep its content in another file.
  'format-specific': z.object({ data: z.object({ 'data-file': z.string().optional() }).optional() }).optional(),
});
const chainInfo = z.array(layerInfo).min(1);

/** Returns the file and its backing files, the top first. -U: the files may be in use. */
export async function chain(path: string, format: DiskFormat): Promise<readonly DiskFile[]> {
  return (await layersOf(path, format)).flat();
}

/** Returns the layers, the top first; of each its file, and the one that has its content if that is another. */
export async function layersOf(path: string, format: DiskFormat): Promise<readonly (readonly DiskFile[])[]> {
  if (format === 'raw') return [[{ path, format }]];
  const text = await qemuImg(['info', '--output=json', '-U', '--backing-chain', '-f', format, path], TIMEOUT_MS);
  const links = chainInfo.parse(JSON.parse(text));
  return links.map((file, index) => {
    const behind = file['full-backing-filename'];
    // The name of a layer may have options (`json:...`), which `filename` does not show, and which name other files.
    if (behind !== undefined && behind !== links[index + 1]?.filename) throw notFiles(path, behind, 'with options');
    const own = { path: index === 0 ? path : file.filename, format: file.format };
    const content = file['format-specific']?.data?.['data-file'];
    return (content === undefined ? [own] : [own, { path: content, format: 'raw' }]).map((each) => {
      const known = DISK_FORMATS.find((name) => name === each.format);
      if (known !== undefined && each.path.startsWith('/')) return { path: each.path, format: known };
      throw notFiles(path, each.path, each.format);
    });
  });
}

/** Opens this file alone, not those that it names: a stranger may have written their names. */
export async function layer(path: string, format: DiskFormat): Promise<DiskLayerFile> {
  if (format === 'raw') return { contentPath: null, base: null };
  const info = layerInfo.parse(
    JSON.parse(await qemuImg(['info', '--output=json', '-U', '-f', format, path], TIMEOUT_MS)),
  );
  const contentPath = info['format-specific']?.data?.['data-file'] ?? null;
  if (contentPath !== null && !contentPath.startsWith('/')) throw notFiles(path, contentPath, 'raw');
  const behind = info['full-backing-filename'];
  if (behind === undefined) return { contentPath, base: null };
  const named = info['backing-filename-format'] ?? 'a format that it does not name';
  const known = DISK_FORMATS.find((name) => name === named);
  if (known === undefined || !behind.startsWith('/')) throw notFiles(path, behind, named);
  return { contentPath, base: { path: behind, format: known } };
}

function notFiles(path: string, layer: string, how: string): MigrationError {
  return new MigrationError('UNSUPPORTED', `${path} lies on ${layer} (${how}), which is not a disk file`, {
    remedy: 'use backing files of format raw or qcow2 with absolute paths',
  });
}

/** Without -U qemu-img fails where another process has locked the file for writing. */
export async function isWritten(path: string, format: string): Promise<boolean> {
  try {
    await qemuImg(['info', '--output=json', '-f', format, path], TIMEOUT_MS);
    return false;
  } catch (error) {
    if (isLocked(error)) return true;
    throw error;
  }
}

function isLocked(error: unknown): boolean {
  return error instanceof MigrationError && /Failed to get .*lock/i.test(error.message);
}

/** -u: only the header is written; nobody compares the old backing file with the new one. */
export async function rebase(path: string, base: DiskFile): Promise<void> {
  await qemuImg(['rebase', '-q', '-u', '-f', 'qcow2', '-b', base.path, '-F', base.format, path], TIMEOUT_MS);
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
