/**
 * Whether this host's policy allows what users and other hosts name in a spec, down to the files themselves: an allowed
 * path may be a symbolic link, and a disk may be a header that names any other file of the host.
 */
import { realpath } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { DiskFile, DiskFiles, DiskLayerFile } from '../../backends/disk-files.js';
import { MigrationError } from '../../domain/errors.js';
import {
  ANYTHING,
  allowsPath,
  type Forbidden,
  filesIn,
  forbiddenIn,
  type HostPolicy,
  type NamedFile,
  type NamingSpec,
  refuseForbidden,
  refuseForbiddenToPeers,
} from '../../domain/policy.js';
import type { DiskSpec } from '../../domain/vm.js';
import { fileSystemAnswers } from '../../kit/user-file.js';
import type { HostContext } from '../vm/context.js';

/** QEMU itself gives up at 200. */
const LAYERS_MAX = 200;

/**
 * Returns what the policy does not allow. A file that is missing is not looked behind: it cannot be used anyway. A disk
 * that does not open now may open later, so it is not allowed. Throws TIMEOUT if a file system does not answer.
 */
export async function forbiddenOnHost(spec: NamingSpec, policy: HostPolicy, files: DiskFiles): Promise<Forbidden[]> {
  const byWords = forbiddenIn(spec, policy);
  // Nothing is opened of what a stranger has named if its words are refused already.
  if (byWords.length > 0 || policy.paths.includes(ANYTHING)) return byWords;
  const real = await resolved(policy);
  return (await Promise.all(filesIn(spec).map((named) => forbiddenBehind(named, real, files)))).flat();
}

/** A spec that names a single disk. */
export function namingOnly(disk: DiskSpec): NamingSpec {
  return { disks: [disk], nics: [], devices: [], qemuArgs: [] };
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

async function forbiddenBehind(
  { what, path, format }: NamedFile,
  policy: HostPolicy,
  files: DiskFiles,
): Promise<Forbidden[]> {
  const forbid = (how: string, value: string) => [{ what: `${what}, which ${how}`, value, key: 'paths' as const }];
  const other = await otherThanAllowed(path, policy);
  if (other !== null) return forbid('leads to', other);
  // A file is opened only after the policy has allowed it, because its name stands in the one before.
  let next: DiskFile | null = format === null ? null : { path, format };
  for (let count = 0; next !== null; count++) {
    if (count === LAYERS_MAX) return forbid('lies on too many files, from', path);
    const layer = await layerOf(next, files);
    if (layer === 'missing') return [];
    if (layer === 'no file') return forbid('lies on something else than files,', path);
    for (const named of [layer.contentPath, layer.base?.path ?? null]) {
      const forbidden = named === null ? null : await otherThanAllowed(named, policy);
      if (forbidden !== null) return forbid('lies on', forbidden);
    }
    next = layer.base;
  }
  return [];
}

/** Returns what the path leads to if the policy does not allow that, or null. A missing file leads nowhere. */
async function otherThanAllowed(path: string, policy: HostPolicy): Promise<string | null> {
  if (!allowsPath(policy, path)) return path;
  const real = await realPathOf(path);
  return real === null || allowsPath(policy, real) ? null : real;
}

async function layerOf({ path, format }: DiskFile, files: DiskFiles): Promise<DiskLayerFile | 'missing' | 'no file'> {
  if ((await realPathOf(path)) === null) return 'missing';
  try {
    return await files.layer(path, format);
  } catch (error) {
    if (error instanceof MigrationError && (error.code === 'UNSUPPORTED' || error.code === 'QEMU_FAILED'))
      return 'no file';
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

/** Throws NOT_PERMITTED if this host's policy does not allow what another one brings, whoever wants it there. */
export async function refuseSpecOfPeer(
  { host, policy, vms }: Pick<HostContext, 'host' | 'policy' | 'vms'>,
  spec: NamingSpec,
  peer: string,
): Promise<void> {
  refuseForbiddenToPeers(await forbiddenOnHost(spec, policy, vms.backend.diskFiles), peer, host);
}
