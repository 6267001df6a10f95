/**
 * Whether this host's policy allows a spec, down to the files themselves: an allowed path may be a symbolic link, and a
 * disk may be a header that names any other file of the host.
 */
import { realpath } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { DiskFiles } from '../../backends/disk-files.js';
import { MigrationError } from '../../domain/errors.js';
import {
  ANYTHING,
  allowsPath,
  type Forbidden,
  forbiddenIn,
  type HostPolicy,
  pathsIn,
  refuseForbidden,
} from '../../domain/policy.js';
import type { DiskFormat, VmSpec } from '../../domain/vm.js';
import { fileSystemAnswers } from '../../kit/user-file.js';

/**
 * Returns what the policy does not allow. A file that is missing is not looked behind: it cannot be used anyway. A disk
 * that does not open now may open later, so it is not allowed. Throws TIMEOUT if a file system does not answer.
 */
export async function forbiddenOnHost(spec: VmSpec, policy: HostPolicy, files: DiskFiles): Promise<Forbidden[]> {
  const byWords = forbiddenIn(spec, policy);
  // Nothing is opened of what a stranger has named if its words are refused already.
  if (byWords.length > 0) return byWords;
  const real = await resolved(policy);
  const formats = new Map(spec.disks.map(({ path, format }) => [path, format]));
  const behind = await Promise.all(
    pathsIn(spec).map(({ what, path }) => forbiddenBehind({ what, path, format: formats.get(path) }, real, files)),
  );
  return behind.flat();
}

/** The policy, with the real paths of its directories, which may be links, beside those that are written. */
async function resolved(policy: HostPolicy): Promise<HostPolicy> {
  const written = policy.paths.filter((path) => path !== ANYTHING);
  const real = await Promise.all(written.map((path) => realPathOf(path)));
  return { ...policy, paths: [...policy.paths, ...real.filter((path) => path !== null)] };
}

/** Null: there is no such file. */
async function realPathOf(path: string): Promise<string | null> {
  await fileSystemAnswers(path);
  return realpath(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT' || error.code === 'ENOTDIR') return null;
    throw error;
  });
}

interface NamedFile {
  readonly what: string;
  readonly path: string;
  /** Undefined: it is no disk. */
  readonly format: DiskFormat | undefined;
}

async function forbiddenBehind({ what, path, format }: NamedFile, policy: HostPolicy, files: DiskFiles) {
  const real = await realPathOf(path);
  if (real === null) return [];
  if (!allowsPath(policy, real)) return [{ what: `${what}, which leads to`, value: real, key: 'paths' as const }];
  if (format === undefined || format === 'raw') return [];
  const chain = await chainOf(path, format, files);
  if (chain === null)
    return [{ what: `${what}, which lies on something else than files,`, value: path, key: 'paths' as const }];
  const found: Forbidden[] = [];
  for (const { path: layer } of chain.slice(1)) {
    const behind = allowsPath(policy, layer) ? await realPathOf(layer) : layer;
    if (behind !== null && !allowsPath(policy, behind))
      found.push({ what: `${what}, which lies on`, value: behind, key: 'paths' });
  }
  return found;
}

/** Null: a part of it is no file with an absolute path, or does not open as a disk. */
async function chainOf(
  path: string,
  format: DiskFormat,
  files: DiskFiles,
): Promise<readonly { path: string }[] | null> {
  try {
    return await files.chain(path, format);
  } catch (error) {
    if (error instanceof MigrationError && (error.code === 'UNSUPPORTED' || error.code === 'QEMU_FAILED')) return null;
    throw error;
  }
}

/** Throws NOT_PERMITTED if the policy does not allow `who` a file, which may be missing, to read or to write. */
export async function refuseForbiddenPath(
  path: string,
  { policy, who, host }: { readonly policy: HostPolicy; readonly who: string; readonly host: string },
): Promise<void> {
  const whole = await resolved(policy);
  const real = allowsPath(policy, path) ? ((await realPathOf(path)) ?? (await realPathOf(dirname(path)))) : path;
  if (real !== null && (allowsPath(whole, real) || allowsPath(whole, `${real}/`))) return;
  refuseForbidden([{ what: 'the file', value: real ?? path, key: 'paths' }], who, host);
}
