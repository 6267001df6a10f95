import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { MigrationRequest } from '../../../src/domain/migration.js';
import type { FileView, StorageFile } from '../../../src/domain/storage.js';
import type { StorageFacts } from '../../../src/planner/migration/facts.js';
import { planMigration } from '../../../src/planner/migration/plan.js';
import { goodFacts, request } from './planner-facts.js';

const disk: StorageFile = { path: '/disks/d0.qcow2', use: 'disk d0', isWritable: true, format: 'qcow2' };
const rawDisk: StorageFile = { ...disk, format: 'raw' };
const kernel: StorageFile = { path: '/boot/vmlinuz', use: 'boot file', isWritable: false, format: null };
const firmware: StorageFile = { path: '/fw/VARS.fd', use: '-drive', isWritable: true, format: null };
const view: FileView = {
  ...{ path: disk.path, problem: null, kind: 'file', sizeBytes: 1 << 20, realName: 'd0.qcow2', isMountPoint: false },
  ...{ inode: '1:2', deviceId: null, marker: 'ab'.repeat(16), markerProblem: null, digest: null, isSampled: false },
  chain: [
    { path: disk.path, format: 'qcow2', virtualSizeBytes: 1 << 30 },
    { path: '/base.qcow2', format: 'qcow2', virtualSizeBytes: 1 << 30 },
  ],
};
const content: FileView = { ...view, marker: null, digest: 'd', chain: [] };
const unmarked = { marker: null };
const elsewhere = { inode: '7:7' };

interface Case {
  readonly file?: StorageFile;
  readonly both?: Partial<FileView>;
  readonly source?: Partial<FileView>;
  readonly target?: Partial<FileView>;
  readonly isOneMachine?: boolean;
  readonly request?: Partial<MigrationRequest>;
  readonly storage?: StorageFacts;
}

function planned({ file = disk, both, source, target, isOneMachine, ...change }: Case) {
  const good = goodFacts();
  const base = { ...(file.isWritable ? view : content), path: file.path, ...both };
  const compared = { file, source: { ...base, ...source }, target: { ...base, ...target } };
  const storage: StorageFacts = change.storage ?? { kind: 'compared', files: [compared] };
  const inventory =
    isOneMachine === true ? { ...good.target.inventory, machineId: 'machine-of-A' } : good.target.inventory;
  return planMigration({ ...request, ...change.request }, { ...good, target: { ...good.target, inventory, storage } });
}

describe('a move goes ahead', () => {
  test.each<[string, Case]>([
    ['the target reads the marker', {}],
    ['a qcow2 grows meanwhile', { target: { sizeBytes: 2 << 20 } }],
    ['the block device says who it is', { both: { ...unmarked, kind: 'block', deviceId: 'naa.6001', chain: [] } }],
    ['both daemons are on one machine, and it is one inode', { both: unmarked, isOneMachine: true }],
    ['the kernel is a copy', { file: kernel, target: elsewhere }],
    ['a long read-only file is shared', { file: kernel, both: { marker: 'cd', digest: 'x' }, target: { digest: 'y' } }],
  ])('%s', (_, change) => {
    const { plan, refusals } = planned(change);
    expect(refusals).toEqual([]);
    expect(plan?.notes[0]).toMatch(/^B sees the same file of vm1/);
  });

  test('the user says that the storage is shared; the plan and its record say so', () => {
    const { plan } = planned({ request: { sharedStorage: 'assume' }, target: unmarked, storage: { kind: 'unasked' } });
    expect(plan?.notes[0]).toMatch(/nobody has checked .*--shared-storage assume/);
    expect(plan?.request.sharedStorage).toBe('assume');
  });

  test('and says where only samples were compared', () => {
    const { plan } = planned({ file: kernel, both: { isSampled: true } });
    expect(plan?.notes[1]).toMatch(/vmlinuz is read-only and long: only samples/);
  });
});

describe('a move is refused', () => {
  test.each<[string, Case, string, RegExp]>([
    [
      'the marker is not seen',
      { target: unmarked },
      'DISK_NOT_SHARED',
      /B does not see what A has just written beside/,
    ],
    ['another marker is seen', { target: { marker: 'ff' } }, 'DISK_NOT_SHARED', /B does not see/],
    ['no marker can be written', { both: unmarked, source: { markerProblem: 'EROFS' } }, 'DISK_NOT_SHARED', /EROFS/],
    ['the disk itself is a mount', { target: { isMountPoint: true } }, 'DISK_NOT_SHARED', /mount point of its own/],
    ['the links lead elsewhere', { target: { realName: 'd1.qcow2' } }, 'DISK_NOT_SHARED', /another name/],
    ['another length', { file: rawDisk, target: { sizeBytes: 32 << 20 } }, 'DISK_NOT_SHARED', /1 MiB and 32 MiB/],
    [
      'another size in the image',
      { target: { chain: [{ ...view.chain[0]!, virtualSizeBytes: 7 }, view.chain[1]!] } },
      'DISK_NOT_SHARED',
      /7 bytes/,
    ],
    [
      'another backing file',
      { target: { chain: [view.chain[0]!] } },
      'DISK_NOT_SHARED',
      /base.*nothing in the backing chain/,
    ],
    ['a file and a device', { target: { kind: 'block' } }, 'DISK_NOT_SHARED', /other a block device/],
    [
      'devices without an id',
      { both: { ...unmarked, kind: 'block', chain: [] } },
      'DISK_NOT_SHARED',
      /no id that both/,
    ],
    ['one inode on two machines', { both: unmarked }, 'DISK_NOT_SHARED', /nothing proves/],
    [
      'machines that are copies of each other',
      { isOneMachine: true, target: unmarked },
      'DISK_NOT_SHARED',
      /B does not see/,
    ],
    ['another kernel', { file: kernel, target: { digest: 'e' } }, 'FILE_DIFFERS', /content of boot file/],
    ['a kernel of another length', { file: kernel, target: { sizeBytes: 5 } }, 'FILE_DIFFERS', /5 bytes/],
    ['no digests', { file: kernel, both: { digest: null } }, 'FILE_DIFFERS', /content/],
    ['firmware variables', { file: firmware, target: unmarked }, 'DISK_NOT_SHARED', /-drive \(\/fw\/VARS\.fd\)/],
    [
      'a file of an argument is missing',
      { file: firmware, target: { problem: 'ENOENT' } },
      'FILE_MISSING',
      /VARS.*ENOENT/,
    ],
    [
      'the source cannot look',
      { source: { problem: 'replaced' } },
      'STORAGE_NOT_PROVEN',
      /A cannot examine .*replaced/,
    ],
    ['an old target', { storage: { kind: 'unsupported' } }, 'STORAGE_NOT_PROVEN', /B has an older vmigrate/],
    [
      'nobody answers',
      { storage: { kind: 'failed', error: new MigrationError('TIMEOUT', 'late') } },
      'STORAGE_NOT_PROVEN',
      /late/,
    ],
  ])('%s', (_, change, code, reason) => {
    const { plan, refusals } = planned(change);
    expect(plan).toBeNull();
    expect(refusals.map((refusal) => refusal.code)).toEqual([code]);
    expect(refusals[0]?.reason).toMatch(reason);
    expect(refusals[0]?.remedy).not.toBe('');
  });

  test('what is missing is named once', () => {
    const good = goodFacts();
    const storage: StorageFacts = {
      kind: 'compared',
      files: [{ file: disk, source: view, target: { ...view, problem: 'ENOENT' } }],
    };
    const checks = { ...good.target.checks, disks: [] };
    const { refusals } = planMigration(request, { ...good, target: { ...good.target, checks, storage } });
    expect(refusals.map(({ code }) => code)).toEqual(['DISK_MISSING']);
  });
});
