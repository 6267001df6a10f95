import { describe, expect, test } from 'vitest';
import type { ForkRequest } from '../../../src/domain/fork.js';
import type { ForkInventory } from '../../../src/domain/host.js';
import type { StorageFacts } from '../../../src/planner/compared-files.js';
import { joinDisks, notesOfDisks } from '../../../src/planner/fork/join-disks.js';
import { forkInventory, forkRequest, IMAGE, image } from './fork-facts.js';
import { host } from './planner-facts.js';

const FAILED = { inode: '', deviceId: null, marker: null, markerProblem: null, digest: null, isSampled: false };
const view = { path: '/disks/d0.qcow2', problem: null, kind: 'file', sizeBytes: 1, realName: 'd0.qcow2' } as const;
const file = { path: view.path, use: 'disk d0', isWritable: true, format: 'qcow2' } as const;
const source = { ...view, ...FAILED, isMountPoint: false, chain: [] };
/** B does not have the file. */
const missing: StorageFacts = { kind: 'compared', files: [{ file, source, target: { ...source, problem: 'ENOENT' } }] };

interface Change {
  readonly request?: Partial<ForkRequest>;
  readonly root?: Partial<ForkInventory>;
  readonly fork?: Partial<ForkInventory>;
  readonly storage?: StorageFacts;
}

function joined({ request = {}, root = {}, fork = {}, storage = { kind: 'unasked' } }: Change = {}) {
  const joining = { host: 'B', inventory: host('B'), fork: { ...forkInventory, ...fork }, storage };
  return joinDisks({ ...forkRequest, ...request }, host('A'), { ...forkInventory, ...root }, joining);
}

const ofImage: Partial<ForkRequest> = { vm: null, image: IMAGE };

describe('a host that joins', () => {
  test('is served a disk that it does not see, and the plan says why', () => {
    const { disks, refusals } = joined({ storage: missing, root: { servingProblem: null } });
    expect([disks.map(({ access }) => access), refusals]).toEqual([['served'], []]);
    expect(notesOfDisks('A', 'B', disks)).toEqual([
      'disk d0 is served by A to B, because B cannot use disk d0 (/disks/d0.qcow2): ENOENT',
    ]);
  });

  test('is refused if the root cannot serve the disk', () => {
    const { disks, refusals } = joined({ storage: missing, root: { servingProblem: 'it has no program for that' } });
    expect(disks).toEqual([]);
    expect(refusals).toMatchObject([{ code: 'DISK_NOT_SHARED', reason: expect.stringMatching(/no program.*ENOENT/) }]);
  });

  test('needs nobody to serve disks that are shared', () => {
    const root = { servingProblem: 'it has no program for that' };
    const { disks, refusals } = joined({ request: { sharedStorage: 'assume' }, root });
    expect([disks, refusals]).toEqual([[{ id: 'd0', access: 'shared', reason: null }], []]);
  });
});

describe('an image that is there already', () => {
  test('has its disks served by the root', () => {
    const { disks, refusals } = joined({ request: ofImage });
    expect([disks.map(({ access }) => access), refusals]).toEqual([['served'], []]);
  });

  test('has them shared if the user says so', () => {
    const { disks } = joined({ request: { ...ofImage, sharedStorage: 'assume' } });
    expect(disks.map(({ access }) => access)).toEqual(['shared']);
  });

  test('is refused if arguments name files that nobody has compared', () => {
    const { disks, refusals } = joined({ request: ofImage, root: { argumentFiles: ['/fw/CODE.fd'] } });
    expect(disks).toEqual([]);
    expect(refusals).toMatchObject([{ code: 'STORAGE_NOT_PROVEN', reason: expect.stringContaining('/fw/CODE.fd') }]);
  });

  test.each([
    ['shared', undefined],
    ['served', { host: 'C', disks: ['d0'] }],
  ] as const)('is %s as the joining host has it', (access, served) => {
    const there = { ...image, ...(served === undefined ? {} : { served }) };
    const root = { servingProblem: 'it reads d0 from C itself' };
    const { disks, refusals } = joined({ request: ofImage, root, fork: { image: there } });
    expect([disks, refusals]).toEqual([[{ id: 'd0', access, reason: null }], []]);
    expect(notesOfDisks('A', 'B', disks)).toEqual([]);
  });
});
