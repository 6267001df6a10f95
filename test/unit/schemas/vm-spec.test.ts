import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import { checkSpec, parseSpec, readSpec } from '../../../src/schemas/vm-spec.js';

const MINIMAL = { name: 'web-1', memory: { size: '512M' } };

function problems(input: unknown): string[] {
  try {
    parseSpec(input);
  } catch (error) {
    return issuesOf(error);
  }
  return [];
}

async function problemsOfText(text: unknown): Promise<string[]> {
  return readSpec(text).then(() => [], issuesOf);
}

function issuesOf(error: unknown): string[] {
  if (!(error instanceof MigrationError) || error.code !== 'SPEC_INVALID') throw error;
  const details = error.details as { path: string; message: string }[] | undefined;
  return details === undefined ? [error.message] : details.map((issue) => issue.path);
}

test('defaults are filled in', () => {
  const spec = parseSpec(MINIMAL);
  expect(spec).toMatchObject({
    name: 'web-1',
    machine: 'q35',
    accel: 'auto',
    cpuModel: 'qemu64',
    cpus: 1,
    memory: {
      sizeBytes: 512 * 1024 * 1024,
      pageBytes: 4096,
      regions: [{ id: 'ram0', lengthBytes: 512 * 1024 * 1024 }],
      backing: 'shared',
    },
    disks: [],
    nics: [],
    hasSerial: true,
    hasPreload: true,
  });
  expect(spec.uuid).toMatch(/^[0-9a-f-]{36}$/);
  expect(parseSpec(MINIMAL).uuid).not.toBe(spec.uuid);
});

test('YAML and JSON text', async () => {
  const yaml = 'name: a\nmemory:\n  size: 1G\n  pageSize: 2M\nnics:\n  - bridge: br0\n';
  const spec = await readSpec(yaml);
  expect(spec.memory).toMatchObject({ sizeBytes: 2 ** 30, pageBytes: 2 ** 21 });
  expect(spec.nics[0]).toMatchObject({ id: 'net0', type: 'tap', bridge: 'br0', model: 'virtio-net-pci' });
  expect((await readSpec(JSON.stringify({ ...MINIMAL, uuid: spec.uuid }))).uuid).toBe(spec.uuid);
});

test('regions become NUMA nodes and give the size', () => {
  const spec = parseSpec({ name: 'a', memory: { regions: [{ size: '64M' }, { id: 'far', size: '32M' }] } });
  expect(spec.memory.sizeBytes).toBe(96 * 1024 * 1024);
  expect(spec.memory.regions.map((region) => region.id)).toEqual(['ram0', 'far']);
});

test('the address of a NIC follows from uuid and id, and is unicast', () => {
  const uuid = '11111111-2222-3333-4444-555555555555';
  const mac = () => parseSpec({ ...MINIMAL, uuid, nics: [{}] }).nics[0]?.mac;
  expect(mac()).toBe(mac());
  expect(mac()).toMatch(/^52:54:00:/);
  expect(parseSpec({ ...MINIMAL, uuid: '11111111-2222-3333-4444-555555555556', nics: [{}] }).nics[0]?.mac).not.toBe(
    mac(),
  );
});

test('what has been filled in is accepted again, unchanged', () => {
  const spec = parseSpec({
    ...MINIMAL,
    kernel: '/k',
    initrd: '/i',
    append: 'a,b',
    disks: [{ path: '/d.qcow2' }],
    nics: [{}],
  });
  expect(checkSpec(JSON.parse(JSON.stringify(spec)))).toEqual(spec);
  expect(spec.disks[0]).toMatchObject({ format: 'qcow2', isReadOnly: false });
});

describe('unknown keys are named with their place', () => {
  test.each([
    [{ ...MINIMAL, memroy: 1 }, ['memroy']],
    [{ ...MINIMAL, memory: { size: '1G', sise: 1, x: 2 } }, ['memory.sise', 'memory.x']],
    [{ ...MINIMAL, nics: [{}, { brige: 'b' }] }, ['nics[1].brige']],
    [{ ...MINIMAL, disks: [{ path: '/d', cache: 'none' }] }, ['disks[0].cache']],
    [{ ...MINIMAL, isReadOnly: true }, ['isReadOnly']],
  ])('%j', (input, paths) => {
    expect(problems(input)).toEqual(paths);
  });

  test('the message names them too', () => {
    expect(() => parseSpec({ ...MINIMAL, memroy: 1 })).toThrow(/memroy: unknown key/);
  });
});

describe('impossible values are refused with their place', () => {
  test.each([
    ['no name', { memory: { size: '1G' } }, ['name']],
    ['upper case', { ...MINIMAL, name: 'Web' }, ['name']],
    ['a path as name', { ...MINIMAL, name: '../../etc' }, ['name']],
    ['a long name', { ...MINIMAL, name: 'a'.repeat(64) }, ['name']],
    ['size 0', { name: 'a', memory: { size: 0 } }, ['memory.size']],
    ['negative', { name: 'a', memory: { size: -1 } }, ['memory.size']],
    ['a fraction', { name: 'a', memory: { size: 1.5 } }, ['memory.size']],
    ['not a number', { name: 'a', memory: { size: Number.NaN } }, ['memory.size']],
    ['no size', { name: 'a', memory: { size: 'lots' } }, ['memory.size']],
    ['beyond 2^53', { name: 'a', memory: { size: '999999999T' } }, ['memory.size']],
    ['17 TiB', { name: 'a', memory: { size: '17T' } }, ['memory.size']],
    ['1 KiB', { name: 'a', memory: { size: '1K' } }, ['memory.size']],
    ['not whole pages', { name: 'a', memory: { size: '33M', pageSize: '2M' } }, ['memory.regions[0]']],
    ['sum of regions', { name: 'a', memory: { size: '1G', regions: [{ size: '64M' }] } }, ['memory.regions']],
    ['cpus 0', { ...MINIMAL, cpus: 0 }, ['cpus']],
    ['cpus 1e9', { ...MINIMAL, cpus: 1e9 }, ['cpus']],
    ['relative kernel', { ...MINIMAL, kernel: 'vmlinuz' }, ['kernel']],
    ['initrd alone', { ...MINIMAL, initrd: '/i' }, ['initrd']],
    ['multicast MAC', { ...MINIMAL, nics: [{ mac: '53:54:00:00:00:01' }] }, ['nics[0].mac']],
    ['tap without bridge', { ...MINIMAL, nics: [{ type: 'tap' }] }, ['nics[0].bridge']],
    ['bridge name', { ...MINIMAL, nics: [{ bridge: 'a b' }] }, ['nics[0].bridge']],
    ['an id twice', { ...MINIMAL, nics: [{ id: 'x' }, { id: 'x' }] }, ['nics[1].id']],
    ['options in a model', { ...MINIMAL, nics: [{ model: 'virtio-net-pci,romfile=/etc/shadow' }] }, ['nics[0].model']],
    ['options in a machine', { ...MINIMAL, machine: 'q35,dumpdtb=/x' }, ['machine']],
    ['control characters', { ...MINIMAL, append: 'a\nb' }, ['append']],
    ['our own argument', { ...MINIMAL, qemuArgs: ['-qmp', 'tcp::1'] }, ['qemuArgs[0]']],
    ['our own argument, two dashes', { ...MINIMAL, qemuArgs: ['--incoming'] }, ['qemuArgs[0]']],
    ['too many NICs', { ...MINIMAL, nics: Array.from({ length: 9 }, () => ({})) }, ['nics']],
  ])('%s', (_what, input, paths) => {
    expect(problems(input)).toEqual(paths);
  });

  test('text that is neither YAML nor JSON, and text that is far too long', async () => {
    expect(await problemsOfText('{name: [')).toHaveLength(1);
    expect((await problemsOfText(`name: ${'a'.repeat(300_000)}`))[0]).toContain('longer');
    expect(await problemsOfText('a: &a [*a]')).not.toEqual([]);
  });
});

test('whatever comes in, the only error is SPEC_INVALID', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.oneof(
        fc.anything(),
        fc.string(),
        fc.object().map((extra) => ({ ...MINIMAL, ...extra })),
      ),
      async (input) => {
        await problemsOfText(input);
      },
    ),
  );
});

test('a filled-in spec from a peer is held to the same limits', () => {
  const spec = parseSpec(MINIMAL);
  const hostile = (change: object) => () => checkSpec({ ...spec, ...change });
  expect(hostile({ name: '../x' })).toThrow(MigrationError);
  expect(hostile({ memory: { ...spec.memory, pageBytes: 1 } })).toThrow(MigrationError);
  expect(hostile({ memory: { ...spec.memory, regions: [] } })).toThrow(MigrationError);
  expect(hostile({ memory: { ...spec.memory, regions: [{ id: 'ram0,share=off', lengthBytes: 2 ** 29 }] } })).toThrow(
    MigrationError,
  );
  // A peer of a newer version may have keys that this one does not know. They are kept, unchanged.
  const newer = { ...spec, extra: { of: [1] }, memory: { ...spec.memory, extra: 2 } };
  expect(checkSpec(newer)).toEqual(newer);
});
