/** What a host checks that joins a fork with an image that it has already. */
import { expect, test } from 'vitest';
import { namedHere, refuseOtherDisks, refuseOtherOrigin } from '../../../../src/agent/image/join-disks.js';
import type { ImageRecord } from '../../../../src/agent/image/record.js';
import type { ForkOrigin } from '../../../../src/engine/ports/fork.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const IMAGE = 'a'.repeat(16);
const spec = parseSpec({
  name: 'web',
  memory: { size: '64M' },
  disks: [
    { id: 'd0', path: '/disks/d0.qcow2' },
    { id: 'cd', path: '/disks/cd.iso', format: 'raw', readOnly: true },
  ],
});
const disks = spec.disks.map(({ id, path, format }) => ({ id, path, format }));
const record = { id: IMAGE, spec, disks } as unknown as ImageRecord;
const origin: ForkOrigin = {
  ...{ host: 'B', image: IMAGE, spec, accel: 'tcg', qemuVersion: '7.2.22', allocatedBytes: 0 },
  disks: spec.disks.map(({ id }) => ({ id, access: 'served' })),
};
const CONFLICT = expect.objectContaining({ code: 'CONFLICT' });

test('an image is forked here only by the host that it came from, or where it was made', () => {
  expect(() => refuseOtherOrigin({ id: IMAGE }, 'B', 'H')).not.toThrow();
  expect(() => refuseOtherOrigin({ id: IMAGE, from: 'B' }, 'B', 'H')).not.toThrow();
  expect(() => refuseOtherOrigin({ id: IMAGE, from: 'C' }, 'B', 'H')).toThrow(CONFLICT);
});

test('its disks must be those that the other host names, also in how they may be used', () => {
  expect(() => refuseOtherDisks(record, disks)).not.toThrow();
  expect(() => refuseOtherDisks(record, spec.disks)).not.toThrow();
  for (const told of [
    disks.slice(1),
    [...disks, disks[0]!],
    spec.disks.map((disk) => ({ ...disk, isReadOnly: false })),
    disks.map((disk) => ({ ...disk, path: '/disks/other' })),
    undefined,
  ])
    expect(() => refuseOtherDisks(record, told)).toThrow(CONFLICT);
});

test('the policy looks at the disks that are opened here, whatever the other host says of them', () => {
  const opened = (brought: Parameters<typeof namedHere>[1]) => namedHere(origin, brought).disks.map(({ id }) => id);
  expect(opened(null)).toEqual([]);
  expect(opened({})).toEqual(['d0', 'cd']);
  expect(opened({ served: { host: 'B', disks: ['d0'] } })).toEqual(['cd']);
});
