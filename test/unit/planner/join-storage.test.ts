import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { FileView, StorageFile } from '../../../src/domain/storage.js';
import type { ComparedFile, StorageFacts } from '../../../src/planner/compared-files.js';
import { type JoinStorage, joinStorage } from '../../../src/planner/fork/join-storage.js';
import { host, spec } from './planner-facts.js';

const disk: StorageFile = { path: '/disks/d0.qcow2', use: 'disk d0', isWritable: true, format: 'qcow2' };
const base: StorageFile = { path: '/base.qcow2', use: 'backing file of disk d0', isWritable: false, format: null };
const kernel: StorageFile = { path: '/boot/vmlinuz', use: 'boot file', isWritable: false, format: null };
const firmware: StorageFile = { path: '/fw/CODE.fd', use: '-drive', isWritable: false, format: null };
const view: FileView = {
  ...{ path: disk.path, problem: null, kind: 'file', sizeBytes: 1 << 20, realName: 'd0.qcow2', isMountPoint: false },
  ...{ inode: '1:2', deviceId: null, marker: 'ab'.repeat(16), markerProblem: null, digest: null, isSampled: false },
  chain: [
    { path: disk.path, format: 'qcow2', virtualSizeBytes: 1 << 30 },
    { path: base.path, format: 'qcow2', virtualSizeBytes: 1 << 30 },
  ],
};

function compared(file: StorageFile, source: Partial<FileView> = {}, target: Partial<FileView> = source): ComparedFile {
  const common = { ...view, path: file.path, ...(file === disk ? {} : { marker: null, digest: 'd', chain: [] }) };
  return { file, source: { ...common, ...source }, target: { ...common, ...target } };
}

const ofFiles = (...files: readonly ComparedFile[]): StorageFacts => ({ kind: 'compared', files });

function join(storage: StorageFacts, isSharingAssumed = false): JoinStorage {
  return joinStorage({ spec, root: host('A'), joining: host('B'), storage, isSharingAssumed });
}

const codes = ({ refusals }: JoinStorage) => refusals.map(({ code }) => code);

describe('a host that joins', () => {
  test('shares a disk whose files are proven to be the same', () => {
    const { disks, refusals } = join(ofFiles(compared(disk), compared(base), compared(kernel)));
    expect([disks, refusals]).toEqual([[{ id: 'd0', access: 'shared', reason: null }], []]);
  });

  test.each<[string, StorageFacts, RegExp]>([
    ['the file is missing', ofFiles(compared(disk, {}, { problem: 'ENOENT' })), /B cannot use disk d0.*ENOENT/],
    ['it is another file', ofFiles(compared(disk, {}, { marker: null })), /B does not see what A has just written/],
    ['nothing proves it', ofFiles(compared(disk, { marker: null, markerProblem: 'EROFS' })), /EROFS/],
    [
      'a file behind it differs',
      ofFiles(compared(disk), compared(base, {}, { digest: 'e' })),
      /content of backing file/,
    ],
    ['its chain differs', ofFiles(compared(disk, {}, { chain: view.chain.slice(0, 1) })), /backing chain/],
  ])('is served a disk of which %s', (_, storage, reason) => {
    const { disks, refusals } = join(storage);
    expect(refusals).toEqual([]);
    expect(disks).toMatchObject([{ id: 'd0', access: 'served', reason: expect.stringMatching(reason) }]);
  });

  test('needs no kernel, but the files of arguments', () => {
    const missing = { problem: 'ENOENT' };
    expect(codes(join(ofFiles(compared(disk), compared(kernel, {}, missing))))).toEqual([]);
    const refused = join(ofFiles(compared(disk), compared(firmware, {}, missing)));
    expect([codes(refused), refused.disks]).toEqual([['FILE_MISSING'], []]);
    expect(codes(join(ofFiles(compared(disk), compared(firmware, {}, { digest: 'e' }))))).toEqual(['FILE_DIFFERS']);
    expect(codes(join(ofFiles(compared(disk), compared(firmware, {}, { inode: '7:7' }))))).toEqual([]);
  });

  test.each<[string, StorageFacts, RegExp]>([
    ['cannot be asked', { kind: 'failed', error: new MigrationError('TIMEOUT', 'late') }, /late/],
    ['is too old', { kind: 'unsupported' }, /too old/],
    ['was not asked', { kind: 'unasked' }, /nobody has asked/],
    ['was not told of the disk', ofFiles(compared(kernel)), /A has not said/],
    ['is told that the root lost its file', ofFiles(compared(disk, { problem: 'replaced' })), /A cannot examine/],
  ])('is refused if it %s', (_, storage, reason) => {
    const refused = join(storage);
    expect([codes(refused), refused.disks]).toEqual([['STORAGE_NOT_PROVEN'], []]);
    expect(refused.refusals[0]?.reason).toMatch(reason);
  });
});

describe('where the user says that the disks are shared', () => {
  test('they are, also without proof', () => {
    const shared = [{ id: 'd0', access: 'shared', reason: null }];
    expect(join({ kind: 'unasked' }, true)).toEqual({ disks: shared, refusals: [] });
    expect(join(ofFiles(compared(disk, {}, { marker: null })), true)).toEqual({ disks: shared, refusals: [] });
  });

  test.each<[string, Partial<FileView>]>([
    ['missing', { problem: 'ENOENT' }],
    ['a device', { kind: 'block' }],
    ['another chain', { chain: [] }],
  ])('a file that is %s is refused', (_, target) => {
    expect(codes(join(ofFiles(compared(disk, {}, target)), true))).toEqual(['DISK_NOT_SHARED']);
  });
});
