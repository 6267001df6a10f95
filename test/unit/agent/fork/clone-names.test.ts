import { createHash } from 'node:crypto';
import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  type CloneOrder,
  cloneIdentities,
  cloneNames,
  cloneSpec,
  refuseMacsTaken,
  runningNics,
} from '../../../../src/agent/fork/clones/names.js';
import type { CloneNetwork } from '../../../../src/domain/fork.js';
import { checkSpec, parseSpec } from '../../../../src/schemas/vm-spec.js';

const parent = parseSpec({ name: 'parent', memory: { size: '64M' }, nics: [{ bridge: 'br0' }, {}] });

function order(change: Partial<CloneOrder> = {}): CloneOrder {
  return {
    fork: '0123456789abcdef',
    cloneCount: 8,
    namePrefix: null,
    parent,
    network: 'fresh',
    macsTaken: new Set(),
    ...change,
  };
}

test('no two clones have a name, uuid, guid or address in common, nor with the parent', () => {
  const clones = cloneIdentities(order({ cloneCount: 1024 }));
  const values = [parent, ...clones].flatMap((vm) => [vm.name, vm.uuid, vm.vmGenerationId]);
  const macs = [parent.nics[0]?.mac, ...clones.map((clone) => clone.macs['net0'])];
  expect(new Set([...values, ...macs]).size).toBe(4 * 1025);
  for (const mac of macs) expect(mac).toMatch(/^[0-9a-f][26ae](:[0-9a-f]{2}){5}$/);
});

test('the same fork gives the same names, uuids and addresses', () => {
  const known = () => cloneIdentities(order()).map((clone) => ({ ...clone, vmGenerationId: null }));
  expect(known()).toEqual(known());
  expect(cloneIdentities(order({ fork: 'f'.repeat(16) }))[0]?.uuid).not.toBe(known()[0]?.uuid);
});

test('an address that a VM of this host has is not given again', () => {
  const first = cloneIdentities(order())[3]?.macs['net0'] ?? '';
  const macs = cloneIdentities(order({ macsTaken: new Set([first]) })).map((clone) => clone.macs['net0']);
  expect(macs).not.toContain(first);
  expect(new Set(macs).size).toBe(8);
});

test('a clone can compute the addresses of its sisters, as documented', () => {
  const sister = cloneIdentities(order())[3];
  const digits = createHash('sha256').update('mac/0123456789abcdef/3/net0/0').digest('hex');
  expect(sister?.macs['net0']?.replaceAll(':', '')).toBe(`56${digits.slice(0, 10)}`);
});

test('hosts that share a fork agree on its addresses, and refuse one that a VM has', () => {
  const clones = cloneIdentities(order());
  const other = { name: 'db', nics: parent.nics.map((nic) => ({ ...nic, mac: clones[5]?.macs['net0'] ?? '' })) };
  expect(() => refuseMacsTaken(clones, parent, [other])).toThrow(
    expect.objectContaining({ code: 'CONFLICT', message: expect.stringMatching(/parent-012345-5 .* which db has/) }),
  );
  expect(() => refuseMacsTaken(clones, parent, [parent])).not.toThrow();
  // A NIC that shares no link with the parent keeps its address.
  expect(() => refuseMacsTaken(cloneIdentities(order({ network: 'none' })), parent, [parent])).not.toThrow();
});

test('names fit, whatever the prefix', () => {
  expect(cloneNames(order({ namePrefix: 'web', cloneCount: 2 }), 'p')).toEqual(['web-0', 'web-1']);
  expect(cloneNames(order({ cloneCount: 1 }), 'p')).toEqual(['p-012345-0']);
  fc.assert(
    fc.property(
      fc.stringMatching(/^[a-z0-9][a-z0-9-]{0,62}$/),
      fc.integer({ min: 1, max: 1024 }),
      (name, cloneCount) => {
        for (const namePrefix of [name, null]) {
          const names = cloneNames(order({ namePrefix, cloneCount }), name);
          expect(new Set(names).size).toBe(cloneCount);
          for (const clone of names) expect(clone).toMatch(/^[a-z0-9][a-z0-9-]{0,62}$/);
        }
      },
    ),
    { numRuns: 50 },
  );
});

describe('the spec of a clone', () => {
  const specs = (network: CloneNetwork) =>
    cloneIdentities(order({ network })).map((clone) => ({
      start: checkSpec(cloneSpec(parent, '0123456789abcdef', clone, network)),
      nics: runningNics(parent, clone, network),
      macs: clone.macs,
    }));

  test('is its own in name, uuid, guid and number, and its parent’s otherwise', () => {
    const { start } = specs('none')[5] ?? {};
    expect(start).toMatchObject({
      name: 'parent-012345-5',
      clone: { fork: '0123456789abcdef', index: 5, cloneCount: 8 },
    });
    expect(start?.memory).toEqual(parent.memory);
    expect(start?.vmGenerationId).not.toBe(parent.vmGenerationId);
  });

  test('fresh: on no bridge until the NIC has an address of its own', () => {
    for (const { start, nics, macs } of specs('fresh')) {
      expect(start.nics[0]).toEqual({
        id: 'net0',
        type: 'unplugged',
        mac: parent.nics[0]?.mac,
        model: 'virtio-net-pci',
      });
      expect(nics[0]).toEqual({ ...parent.nics[0], mac: macs['net0'] });
      expect(nics[1]).toEqual(parent.nics[1]);
    }
  });

  test('isolated: its parent’s address, on a bridge of its own', () => {
    for (const { start, nics } of specs('isolated')) {
      expect(start.nics).toEqual(nics);
      expect(nics).toEqual([{ ...parent.nics[0], type: 'isolated' }, parent.nics[1]]);
    }
  });

  test('none: on no bridge', () => {
    for (const { start, nics } of specs('none')) {
      expect(start.nics).toEqual(nics);
      expect(nics[0]).not.toHaveProperty('bridge');
    }
  });
});
