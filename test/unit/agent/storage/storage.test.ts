import { execFile } from 'node:child_process';
import { chmod, mkdir, mkdtemp, readdir, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { viewFile } from '../../../../src/agent/storage/file-view.js';
import { Markers, markerPath, readMarker } from '../../../../src/agent/storage/markers.js';
import { QemuBackend } from '../../../../src/backends/qemu/backend.js';
import type { StorageFile } from '../../../../src/domain/storage.js';

const run = promisify(execFile);
const PROOF = 'ab'.repeat(16);
const log = { info: () => undefined, warn: () => undefined, error: () => undefined };
let directory: string;
let state: string;
let disks: string;
let disk: string;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-storage-'));
  [state, disks] = [join(directory, 'state'), join(directory, 'disks')];
  for (const path of [state, disks]) await mkdir(path);
  disk = join(disks, 'd.img');
  await writeFile(disk, 'content');
});
afterEach(() => rm(directory, { recursive: true, force: true }));

const fileAt = (path: string, change: Partial<StorageFile> = {}): StorageFile => ({
  ...{ path, use: 'disk', isWritable: false, format: null },
  ...change,
});
const context = { proof: PROOF, diskFiles: new QemuBackend().diskFiles, mountPoints: new Set<string>() };

describe('markers', () => {
  test('hold a secret, can be told, and go with their proof', async () => {
    const markers = await Markers.open(state, log);
    const { secret, problems } = await markers.leave(PROOF, [disk, join(disks, 'e.img')]);
    expect(problems.size).toBe(0);
    const path = markerPath(PROOF, disk);
    expect((await readdir(disks)).sort()).toEqual([`.vmigrate-storage-check-${PROOF}`, 'd.img']);
    expect((await stat(path)).mode & 0o777).toBe(0o600);
    expect(await readFile(path, 'utf8')).toMatch(/it may be deleted/);
    expect(await readMarker(path)).toBe(secret);
    await markers.end(PROOF);
    await markers.end(PROOF);
    expect(await readdir(disks)).toEqual(['d.img']);
    expect(await readdir(join(state, 'storage-checks'))).toEqual([]);
  });

  test('of a daemon that was killed are removed by the next one', async () => {
    await (await Markers.open(state, log)).leave(PROOF, [disk]);
    expect(await readdir(disks)).toHaveLength(2);
    await (await Markers.open(state, log)).swept;
    expect(await readdir(disks)).toEqual(['d.img']);
  });

  test('a record that names another file removes nothing', async () => {
    await mkdir(join(state, 'storage-checks'));
    const record = { version: 1, proof: PROOF, paths: [disk] };
    await writeFile(join(state, 'storage-checks', `${PROOF}.json`), JSON.stringify(record));
    await (await Markers.open(state, log)).swept;
    expect(await readdir(disks)).toEqual(['d.img']);
  });

  test('end with the daemon', async () => {
    const markers = await Markers.open(state, log);
    await markers.leave(PROOF, [disk]);
    await markers.close();
    expect(await readdir(disks)).toEqual(['d.img']);
  });

  test('where none can be written is said, and a file that is there already is left alone', async () => {
    const markers = await Markers.open(state, log);
    const path = markerPath(PROOF, disk);
    await symlink(disk, path);
    const gone = join(directory, 'gone', 'd.img');
    const { problems } = await markers.leave(PROOF, [disk, gone]);
    expect([...problems.keys()]).toEqual([path, markerPath(PROOF, gone)]);
    expect(problems.get(path)).toMatch(/EEXIST/);
    await markers.end(PROOF);
    expect(await readFile(disk, 'utf8')).toBe('content');
    expect(await readMarker(path)).toBeNull();
  });

  test('only a short file with a secret is one', async () => {
    const path = markerPath(PROOF, disk);
    await writeFile(path, 'no secret');
    expect(await readMarker(path)).toBeNull();
    await writeFile(path, 'ab'.repeat(16).padEnd(1000));
    expect(await readMarker(path)).toBeNull();
    await rm(path);
    await run('mkfifo', [path]);
    expect(await readMarker(path)).toBeNull();
  });
});

describe('a view', () => {
  test('of equal copies has one digest, of others another, and another proof has none of them', async () => {
    const other = join(directory, 'd.img');
    await writeFile(other, 'content');
    const [one, copy] = [await viewFile(fileAt(disk), context), await viewFile(fileAt(other), context)];
    expect(one).toMatchObject({ problem: null, kind: 'file', sizeBytes: 7, realName: 'd.img', isSampled: false });
    expect(copy.digest).toBe(one.digest);
    expect(copy.inode).not.toBe(one.inode);
    await writeFile(other, 'CONTENT');
    expect((await viewFile(fileAt(other), context)).digest).not.toBe(one.digest);
    const later = await viewFile(fileAt(disk), { ...context, proof: 'cd'.repeat(16) });
    expect(later.digest).not.toBe(one.digest);
  });

  test('of a long file samples it, its end too', async () => {
    const { open } = await import('node:fs/promises');
    const file = await open(disk, 'r+');
    await file.truncate(65 * 2 ** 20);
    const before = await viewFile(fileAt(disk), context);
    await file.write(Buffer.from('x'), 0, 1, 65 * 2 ** 20 - 1);
    await file.close();
    const after = await viewFile(fileAt(disk), context);
    expect(before.isSampled).toBe(true);
    expect(after.digest).not.toBe(before.digest);
  });

  test('follows links, and finds the marker beside the file itself', async () => {
    const link = join(directory, 'link.img');
    await symlink(disk, link);
    const markers = await Markers.open(state, log);
    const { secret } = await markers.leave(PROOF, [disk]);
    expect(await viewFile(fileAt(link), context)).toMatchObject({ realName: 'd.img', marker: secret });
    await markers.end(PROOF);
    expect(await viewFile(fileAt(link), context)).toMatchObject({ marker: null });
  });

  test('of a disk has its chain', async () => {
    const [base, top] = [join(disks, 'base.qcow2'), join(disks, 'top.qcow2')];
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', base, '16M']);
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', top]);
    const { chain, digest } = await viewFile(fileAt(top, { isWritable: true, format: 'qcow2' }), context);
    expect(chain).toEqual([
      { path: top, format: 'qcow2', virtualSizeBytes: 16 << 20 },
      { path: base, format: 'qcow2', virtualSizeBytes: 16 << 20 },
    ]);
    expect(digest).toBeNull();
  });

  test('of what is no disk says so at once', async () => {
    const fifo = join(disks, 'fifo');
    await run('mkfifo', [fifo]);
    expect((await viewFile(fileAt(fifo), context)).problem).toMatch(/neither a file nor a block device/);
    expect((await viewFile(fileAt(disks), context)).problem).toMatch(/neither/);
    expect((await viewFile(fileAt(join(disks, 'none')), context)).problem).toMatch(/ENOENT/);
    await chmod(disk, 0o400);
    expect((await viewFile(fileAt(disk, { format: 'qcow2' }), context)).problem).toMatch(/qemu-img info/);
    expect((await viewFile(fileAt(disk), { ...context, mountPoints: new Set([disk]) })).isMountPoint).toBe(true);
  });
});
