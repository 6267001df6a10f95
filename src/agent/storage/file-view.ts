/** Describes what this host sees under a path that a VM uses. Nothing is changed. */
import { constants } from 'node:fs';
import { access, type FileHandle, readFile, realpath } from 'node:fs/promises';
import { basename, join } from 'node:path';
import type { DiskFiles } from '../../backends/disk-files.js';
import { toMigrationError } from '../../domain/errors.js';
import type { FileView, StorageFile } from '../../domain/storage.js';
import { openUserFile } from '../../kit/user-file.js';
import { contentDigest } from './content.js';
import { markerPath, readMarker } from './markers.js';

const SECTOR_BYTES = 512;
/** After this time the answer is that the file cannot be opened: a hung network file system answers never. */
const VIEW_MS_MAX = 15_000;

export interface ViewContext {
  readonly proof: string;
  readonly diskFiles: DiskFiles;
  /** The mount points of this process's mount namespace. */
  readonly mountPoints: ReadonlySet<string>;
}

const UNUSABLE: Omit<FileView, 'path' | 'problem'> = {
  ...{ kind: 'file', sizeBytes: 0, realName: '', isMountPoint: false, inode: '', deviceId: null },
  ...{ marker: null, markerProblem: null, digest: null, isSampled: false, chain: [] },
};

/** `problem`: why the file cannot be used here. */
export function unusable(path: string, problem: string): FileView {
  return { ...UNUSABLE, path, problem };
}

/** Never throws, and answers in time whatever the path leads to. */
export async function viewFile(file: StorageFile, context: ViewContext): Promise<FileView> {
  const { path } = file;
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<FileView>((resolve) => {
    const problem = `opening it takes longer than ${VIEW_MS_MAX / 1000} s`;
    timer = setTimeout(() => resolve(unusable(path, problem)), VIEW_MS_MAX);
  });
  const view = look(file, context).catch((error: unknown): FileView => {
    return unusable(path, toMigrationError(error).message);
  });
  try {
    return await Promise.race([view, late]);
  } finally {
    clearTimeout(timer);
  }
}

async function look(file: StorageFile, context: ViewContext): Promise<FileView> {
  const { path, isWritable, format } = file;
  const handle = await openUserFile(path, 'read');
  try {
    const real = await realpath(path);
    const stat = await handle.stat({ bigint: true });
    const isBlock = stat.isBlockDevice();
    if (isWritable) await access(real, constants.W_OK);
    const number = isBlock ? deviceNumber(stat.rdev) : '';
    const sizeBytes = isBlock ? await deviceBytes(number) : Number(stat.size);
    const version = `${stat.dev}:${stat.ino}:${number}:${sizeBytes}:${stat.mtimeNs}:${stat.ctimeNs}`;
    return {
      path,
      problem: null,
      kind: isBlock ? 'block' : 'file',
      sizeBytes,
      realName: basename(real),
      isMountPoint: context.mountPoints.has(real),
      inode: isBlock ? `device ${number}` : `${stat.dev}:${stat.ino}`,
      deviceId: isBlock ? await deviceId(number) : null,
      marker: await readMarker(markerPath(context.proof, real)),
      markerProblem: null,
      ...(await content(handle, { isWritable, sizeBytes, version, key: context.proof })),
      chain: format === null ? [] : await context.diskFiles.chainLinks(path, format),
    };
  } finally {
    await handle.close();
  }
}

async function content(
  handle: FileHandle,
  file: { isWritable: boolean; sizeBytes: number; version: string; key: string },
): Promise<Pick<FileView, 'digest' | 'isSampled'>> {
  // The VM writes to it while it is read, so a digest says nothing.
  if (file.isWritable) return { digest: null, isSampled: false };
  return contentDigest(handle, file.sizeBytes, file.version, file.key);
}

/** Major and minor number, as in /sys/dev/block. The kernel's layout of a 64-bit device number. */
function deviceNumber(rdev: bigint): string {
  const major = ((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & ~0xfffn);
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & 0xffffff00n);
  return `${major}:${minor}`;
}

async function deviceBytes(number: string): Promise<number> {
  return Number(await readFile(`/sys/dev/block/${number}/size`, 'utf8')) * SECTOR_BYTES;
}

/**
 * Returns the id that the device itself has, on every host that is attached to it: the WWID of a SCSI or NVMe disk, or
 * the UUID of a logical volume or multipath device. Null for a device whose id comes from this host, such as a loop
 * device or DRBD.
 */
async function deviceId(number: string): Promise<string | null> {
  const read = async (path: string): Promise<string | null> =>
    readFile(path, 'utf8').then(
      (text) => (text.trim() === '' ? null : text.trim()),
      () => null,
    );
  const base = `/sys/dev/block/${number}`;
  const mapped = await read(`${base}/dm/uuid`);
  if (mapped !== null) return /^(LVM|mpath)-/.test(mapped) ? mapped : null;
  const partition = await read(`${base}/partition`);
  const disk = partition === null ? base : await realpath(join(await realpath(base), '..'));
  const wwid = (await read(`${disk}/wwid`)) ?? (await read(`${disk}/device/wwid`));
  if (wwid === null) return null;
  return partition === null ? wwid : `${wwid} partition ${partition} from ${(await read(`${base}/start`)) ?? '?'}`;
}

/** Returns the mount points that this process sees. */
export async function mountPoints(): Promise<ReadonlySet<string>> {
  const text = await readFile('/proc/self/mountinfo', 'utf8');
  const unescape = (path: string) =>
    path.replace(/\\([0-7]{3})/g, (_, code: string) => String.fromCharCode(Number.parseInt(code, 8)));
  return new Set(
    text.split('\n').flatMap((line) => {
      const path = line.split(' ')[4];
      return path === undefined ? [] : [unescape(path)];
    }),
  );
}
