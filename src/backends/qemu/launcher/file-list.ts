/**
 * The list of the files that are opened for a contained QEMU (native/launcher/file_opener.c). It is the daemon's own
 * file, which QEMU cannot reach, and it is read anew at each open, so a change needs nobody's consent. A QEMU that is
 * not contained has no list, and opens its files itself.
 */
import { access, readFile, rename, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { MigrationError } from '../../../domain/errors.js';
import { KeyedLocks } from '../../../kit/locks.js';
import type { VmPlace } from '../../backend.js';

/** `copied`: memory that QEMU maps copy-on-write. It asks for writing, and gets the file for reading. */
export type FileUse = 'read' | 'write' | 'copied';

/** The absolute paths, as QEMU names them. */
export type FileList = Map<string, FileUse>;

const LETTERS: Readonly<Record<FileUse, string>> = { read: 'r', write: 'w', copied: 'p' };
const NAME = 'files';
const PATH_BYTES_MAX = 4094;

const locks = new KeyedLocks();

export function fileListPath({ directory }: Pick<VmPlace, 'directory'>): string {
  return join(directory, NAME);
}

/** Adds a use of the file: what may be written may be read. */
export function addFile(list: FileList, path: string, use: FileUse): void {
  if (list.get(path) !== 'write') list.set(path, use);
}

/** Throws SPEC_INVALID for a path that the list cannot hold. */
export async function writeFileList(place: VmPlace, list: FileList): Promise<void> {
  const path = fileListPath(place);
  const lines = [...list].map(([file, use]) => `${LETTERS[use]} ${checked(file)}\n`);
  await writeFile(`${path}.new`, lines.join(''), { mode: 0o600 });
  await rename(`${path}.new`, path);
}

/** Allows a QEMU that runs to open more files, or no longer some that are not open. Nothing if it is not contained. */
export async function changeFileList(place: VmPlace, change: (list: FileList) => void): Promise<void> {
  const path = fileListPath(place);
  await locks.hold(path, async () => {
    const isContained = await access(path).then(
      () => true,
      () => false,
    );
    if (!isContained) return;
    const list = parse(await readFile(path, 'utf8'));
    change(list);
    await writeFileList(place, list);
  });
}

function parse(text: string): FileList {
  const list: FileList = new Map();
  for (const line of text.split('\n')) {
    const use = (Object.keys(LETTERS) as FileUse[]).find((each) => LETTERS[each] === line[0]);
    if (use !== undefined) list.set(line.slice(2), use);
  }
  return list;
}

function checked(path: string): string {
  if (path.startsWith('/') && !path.includes('\n') && Buffer.byteLength(path) <= PATH_BYTES_MAX) return path;
  throw new MigrationError('SPEC_INVALID', `a contained QEMU opens no file by the name ${JSON.stringify(path)}`, {
    remedy: 'use an absolute path without line breaks',
  });
}
