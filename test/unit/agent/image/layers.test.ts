/**
 * Images with disks, real files and the real qemu-img: an image starts only on the disks of its moment, and a layer
 * stays as long as somebody needs it.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { closeSync, existsSync, openSync, truncateSync } from 'node:fs';
import { chmod, mkdir, mkdtemp, readdir, readFile, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { ForkContext } from '../../../../src/agent/fork/context.js';
import { Images } from '../../../../src/agent/fork/image-calls.js';
import { holdersHere, type OtherHosts } from '../../../../src/agent/fork/layer-holders.js';
import { sealLayers } from '../../../../src/agent/fork/settle.js';
import {
  decodeHead,
  ENTRY,
  ENTRY_HEADER_BYTES,
  encodeEntry,
  encodeHead,
  HEAD_BYTES,
} from '../../../../src/agent/image/file-format.js';
import { clearBrokenSaves } from '../../../../src/agent/image/file-save.js';
import { startProblem } from '../../../../src/agent/image/start-check.js';
import { ImageStore } from '../../../../src/agent/image/store.js';
import { QemuBackend } from '../../../../src/backends/qemu/backend.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const ID = 'a'.repeat(16);
const SILENT = { info: () => undefined, warn: () => undefined, error: () => undefined, debug: () => undefined };
const DROP = { isForced: false, isDroppingSaved: true };
const code = (expected: string) => expect.objectContaining({ code: expected });

interface Host {
  readonly context: ForkContext;
  readonly images: Images;
  readonly vms: { spec: object; state: string; image: string | null; process: object }[];
}

let directory: string;
let golden: string;
let disk: string;
let iso: string;
let overlay: string;
let children: ChildProcess[];
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-layers-'));
  children = [];
  [golden, disk, iso] = ['golden.raw', 'disk.qcow2', 'cd.iso'].map((name) => join(directory, name)) as [
    string,
    string,
    string,
  ];
  overlay = `${disk}.${ID}`;
  await writeFile(golden, Buffer.alloc(1 << 20, 'golden'));
  img('create', '-q', '-f', 'qcow2', '-b', golden, '-F', 'raw', disk);
  write(disk, 'first');
  await writeFile(iso, 'iso');
});
afterEach(async () => {
  for (const child of children) child.kill('SIGKILL');
  await rm(directory, { recursive: true, force: true });
});

function img(...args: string[]): void {
  execFileSync('qemu-img', args);
}

/** Writes to the disk as a guest would. */
function write(path: string, text: string): void {
  const pattern = String(text.charCodeAt(0));
  execFileSync('qemu-io', ['-f', 'qcow2', '-c', `write -P ${pattern} 64k 64k`, path], { stdio: 'ignore' });
}

async function contextOn(name: string, others?: OtherHosts): Promise<Host> {
  const stateDir = join(directory, name);
  const place = { host: name, ramDir: join(stateDir, 'ram') };
  await mkdir(place.ramDir, { recursive: true });
  const { diskFiles } = new QemuBackend();
  const vms: Host['vms'] = [];
  const named = (vm: string) => vms.find(({ spec }) => (spec as { name: string }).name === vm);
  const manager = {
    ...{ place, all: () => vms, has: (vm: string) => named(vm) !== undefined, get: named },
    backend: { installed: async () => ({ machines: ['pc-q35-7.2'], version: '7.2.22' }), diskFiles },
  };
  const native = {
    createRegionFile: ({ path, lengthBytes }: { path: string; lengthBytes: bigint }) => {
      closeSync(openSync(path, 'wx'));
      truncateSync(path, Number(lengthBytes));
    },
  };
  const images = await ImageStore.open({
    ...{ host: name, stateDir, budgetBytes: null, log: SILENT },
    ...{ vms: manager as never, native: native as never },
  });
  const registry = { owner: async () => null };
  const context = { host: name, images, vms: manager, registry, log: SILENT } as unknown as ForkContext;
  return { context, images: new Images(context, () => false, others), vms };
}

/** Makes an image of a VM that continues in an overlay, as a fork leaves it. */
async function forked({ context }: Host): Promise<void> {
  const { images } = context;
  const disks = [{ id: 'd0', path: disk, format: 'qcow2' as const }];
  const spec = {
    ...parseSpec({
      name: 'web',
      memory: { size: '16M' },
      disks: [
        { id: 'd0', path: disk },
        { id: 'cd', path: iso, format: 'raw', readOnly: true },
      ],
    }),
    machine: 'pc-q35-7.2',
  };
  await images.create(
    {
      ...{ version: 1, id: ID, state: 'complete', parentMode: 'continue', accel: 'tcg', qemuVersion: '7.2.22' },
      ...{ spec, deviceStateBytes: 5, createdAt: '2026-01-01T00:00:00.000Z' },
      disks: spec.disks.map(({ id, path, format }) => ({ id, path, format })),
      overlays: [{ id: 'd0', path: overlay, format: 'qcow2', vm: 'web', base: disks[0]! }],
    },
    null,
  );
  await writeFile(images.statePath(ID), 'state');
  img('create', '-q', '-f', 'qcow2', '-u', '-b', disk, '-F', 'qcow2', overlay, '1M');
  write(overlay, 'later');
  await sealLayers(context, ID);
}

/** Replaces the description of an image's file of format 1. */
function withDescription(file: Buffer, record: object): Buffer {
  const { descriptionBytes } = decodeHead(file);
  const text = Buffer.from(JSON.stringify(record));
  const header = { kind: ENTRY.DESCRIPTION, region: 0, offsetBytes: 0, lengthBytes: text.length };
  const rest = file.subarray(HEAD_BYTES + ENTRY_HEADER_BYTES + descriptionBytes);
  return Buffer.concat([encodeHead(1, text.length), encodeEntry(header, text), text, rest]);
}

async function savedOn(name: string, options: { withDisks?: boolean } = {}): Promise<Host & { file: string }> {
  const host = await contextOn(name);
  await forked(host);
  const file = join(directory, 'saved.img');
  await host.images.save(ID, file, options);
  return { ...host, file };
}

describe('an image starts only on the disks of its moment', () => {
  const changes: [what: string, change: () => Promise<void> | void][] = [
    ['the disk was written to', () => write(disk, 'second')],
    ['the disk has another size', () => img('resize', '-q', disk, '2M')],
    ['the backing file was written to', () => writeFile(golden, Buffer.alloc(1 << 20, 'silver'))],
    ['a read-only disk was replaced', () => writeFile(iso, 'ISO')],
    ['the disk was replaced by a copy of another', () => writeFile(disk, 'x'.repeat(200_000))],
    ['the disk is gone', () => rm(disk)],
    ['the disk is a pipe', () => rm(disk).then(() => void execFileSync('mkfifo', [disk]))],
  ];
  test.each(changes)('%s: refused on its own host and on another', async (_, change) => {
    const source = await contextOn('A');
    await forked(source);
    expect(await startProblem(source.context, ID)).toBeNull();
    const file = join(directory, 'saved.img');
    await source.images.save(ID, file);
    const before = await stat(disk);
    await change();
    expect(await startProblem(source.context, ID)).toMatchObject({ code: 'DISK_CHANGED' });
    const refusal = { code: expect.stringMatching(/^(DISK_CHANGED|NOT_FOUND)$/) as string };
    await expect((await contextOn('B')).images.load(file)).rejects.toMatchObject(refusal);
    expect(await readdir(join(directory, 'B/images'))).toEqual([]);
    // The time of the last write can be set by anybody.
    if (existsSync(disk) && (await stat(disk)).isFile()) await utimes(disk, before.atime, before.mtime);
    expect(await startProblem(source.context, ID)).toMatchObject({ code: 'DISK_CHANGED' });
  });

  test('without a saved file its stamp alone tells', async () => {
    const host = await contextOn('A');
    await forked(host);
    await chmod(disk, 0o600);
    expect(await startProblem(host.context, ID)).toBeNull();
    write(disk, 'second');
    expect(await startProblem(host.context, ID)).toMatchObject({
      code: 'DISK_CHANGED',
      reason: expect.stringMatching(/disk.qcow2 has been written since/) as string,
    });
    await expect(host.images.save(ID, join(directory, 'x.img'))).rejects.toEqual(code('DISK_CHANGED'));
  });

  test('the same content under other times is accepted, and read once', async () => {
    const { context } = await savedOn('A');
    await utimes(disk, 1, 1);
    expect(await startProblem(context, ID)).toBeNull();
    const [layer] = context.images.get(ID).layers ?? [];
    expect(layer?.files[0]?.stamp?.mtimeNs).toBe('1000000000');
  });

  test('nobody may write to a disk while clones start: a VM, another program', async () => {
    const { context, vms } = await savedOn('A');
    vms.push({
      spec: { name: 'other', disks: [{ path: disk, isReadOnly: false }] },
      state: 'running',
      image: null,
      process: {},
    });
    expect(await startProblem(context, ID)).toEqual({ code: 'DISK_IN_USE', reason: `other writes to ${disk}` });
    vms.length = 0;
    const writer = spawn('qemu-io', ['-f', 'qcow2', disk], { stdio: ['pipe', 'pipe', 'inherit'] });
    children.push(writer);
    await new Promise((ready) => writer.stdout.once('data', ready));
    const reason = `another program has ${disk} open for writing`;
    expect(await startProblem(context, ID)).toEqual({ code: 'DISK_IN_USE', reason });
    await expect((await contextOn('B')).images.load(join(directory, 'saved.img'))).rejects.toMatchObject({
      code: 'CONFLICT',
      message: expect.stringContaining(reason) as string,
    });
  });

  test('an image whose disks could not be read is not started', async () => {
    const host = await contextOn('A');
    await forked(host);
    await host.context.images.update(ID, { layers: [] });
    expect(await startProblem(host.context, ID)).toMatchObject({ code: 'DISK_CHANGED' });
  });
});

describe('a layer stays as long as somebody needs it', () => {
  test('a saved file keeps it; given up, the overlay is merged and the file is refused', async () => {
    const { images, file, context } = await savedOn('A');
    expect(await images.remove(ID)).toMatchObject({
      mergedDisks: [],
      keptLayers: [{ path: disk, reason: `needed by saved image ${file}` }, { path: iso }, { path: golden }],
    });
    expect(images.find(ID)).toMatchObject({ state: 'unloaded', allocatedBytes: 0, savedFiles: [file] });
    expect(existsSync(overlay)).toBe(true);
    await expect(
      images.refuseWritesToImages({ name: 'web', disks: context.images.get(ID).spec.disks }),
    ).rejects.toEqual(code('CONFLICT'));
    expect(await images.load(file)).toMatchObject({ id: ID, state: 'complete' });
    expect(context.images.get(ID).overlays).toHaveLength(1);
    await images.remove(ID);
    expect(await images.remove(ID, DROP)).toMatchObject({ mergedDisks: [overlay], keptLayers: [] });
    expect(images.list()).toEqual([]);
    expect(existsSync(overlay)).toBe(false);
    await expect(images.load(file)).rejects.toEqual(code('DISK_CHANGED'));
  });

  test('also after a reboot and in the next daemon, which merges then', async () => {
    const before = await contextOn('A');
    await forked(before);
    await rm(join(directory, 'A/ram'), { recursive: true });
    const after = await contextOn('A');
    expect(after.images.list()).toMatchObject([{ id: ID, state: 'unloaded' }]);
    expect(await startProblem(after.context, ID)).toBeNull();
    const { spec } = after.context.images.get(ID);
    await expect(after.images.refuseWritesToImages(spec)).rejects.toEqual(code('CONFLICT'));
    expect(await after.images.remove(ID)).toMatchObject({ mergedDisks: [overlay] });
    await after.images.refuseWritesToImages(spec);
  });

  test('a load that fails leaves the unloaded image as it was', async () => {
    const { images, file, context } = await savedOn('A');
    await images.remove(ID);
    const unloaded = context.images.get(ID);
    const good = await readFile(file);
    const bad = Buffer.from(good);
    bad[good.length - 70]! ^= 1;
    await writeFile(file, bad);
    await expect(images.load(file)).rejects.toEqual(code('CORRUPT'));
    expect(context.images.get(ID)).toEqual(unloaded);
    await writeFile(file, good);
    await images.load(file);
  });

  const answers: [string, () => Promise<{ holders: string[] }>, RegExp | null][] = [
    ['does not need it', async () => ({ holders: [] }), null],
    ['has loaded a saved image of it', async () => ({ holders: [`image ${ID}`] }), /image a{16} on B/],
    ['cannot be asked', () => Promise.reject(new MigrationError('UNREACHABLE', 'down')), /B, which cannot be asked/],
    [
      'is of build 0.1.0 and has it',
      () => Promise.reject(new MigrationError('USAGE', 'Route not found')),
      /older build/,
    ],
  ];
  test.each(answers)('another host %s', async (_, layerHolders, reason) => {
    const checkTarget = async () => ({ disks: [{ path: disk, isReadable: true, isWritable: true }] });
    const others = { names: ['B'], agent: () => ({ inventory: { layerHolders, checkTarget } as never }) };
    const host = await contextOn('A', others);
    await forked(host);
    const removal = await host.images.remove(ID);
    if (reason === null) return expect(removal).toMatchObject({ mergedDisks: [overlay], keptLayers: [] });
    expect(removal.keptLayers[0]?.reason).toMatch(reason);
    expect(existsSync(overlay)).toBe(true);
    expect((await host.images.prune({ isDryRun: false })).kept).toMatchObject([{ id: ID }]);
    const forced = await host.images.remove(ID, { isForced: true, isDroppingSaved: false });
    return expect(forced).toMatchObject({ mergedDisks: [overlay] });
  });

  test('a host of build 0.1.0 that does not have the file needs nothing', async () => {
    const inventory = {
      layerHolders: () => Promise.reject(new MigrationError('USAGE', 'Route not found')),
      checkTarget: async () => ({ disks: [{ path: disk, isReadable: false, isWritable: false }] }),
    };
    const host = await contextOn('A', { names: ['B'], agent: () => ({ inventory: inventory as never }) });
    await forked(host);
    expect(await host.images.remove(ID)).toMatchObject({ mergedDisks: [overlay] });
  });

  test('a VM is not run on a disk of an image on another host; a host that is down does not matter', async () => {
    const { context, images, file } = await savedOn('B');
    const asked = { layerHolders: async (paths: string[]) => ({ holders: await holdersHere(context, paths) }) };
    const others = { names: ['B'], agent: () => ({ inventory: asked as never }) };
    const { spec } = context.images.get(ID);
    await images.remove(ID);
    const refused = (await contextOn('A', others)).images.refuseWritesToImages(spec);
    await expect(refused).rejects.toMatchObject({ message: expect.stringContaining(`${file} on B`) as string });
    const down = { layerHolders: () => Promise.reject(new MigrationError('UNREACHABLE', 'down')) };
    const silent = { names: ['B'], agent: () => ({ inventory: down as never }) };
    await (await contextOn('A', silent)).images.refuseWritesToImages(spec);
  });

  test('prune removes what nobody needs, and says what it would remove', async () => {
    const host = await contextOn('A');
    await forked(host);
    expect(await host.images.prune({ isDryRun: true })).toMatchObject({ removed: [{ id: ID }], kept: [] });
    host.vms.push({ spec: { name: 'c', disks: [] }, state: 'running', image: ID, process: {} });
    expect((await host.images.prune({ isDryRun: false })).kept[0]?.reason).toMatch(/has clones: c/);
    host.vms.length = 0;
    expect(await host.images.prune({ isDryRun: false })).toMatchObject({ removed: [{ mergedDisks: [overlay] }] });
    expect(host.images.list()).toEqual([]);
  });
});

describe('a file with the disks in it', () => {
  test('needs no disk of its host, holds nothing, and takes its disks along when it goes', async () => {
    const source = await savedOn('A', { withDisks: true });
    expect(source.images.find(ID).savedFiles).toBeUndefined();
    await source.images.remove(ID);
    write(disk, 'second');
    await rm(golden);
    const { images, context } = await contextOn('B');
    const view = await images.load(source.file);
    expect(await startProblem(context, ID)).toBeNull();
    const own = join(directory, `B/images/${ID}.disks`);
    expect(view.disks[0]).toMatch(new RegExp(`^${own}/`));
    const read = execFileSync('qemu-io', [
      '-f',
      'qcow2',
      '-r',
      '-c',
      'read -P 102 64k 64k',
      '-c',
      'read -P 103 0 1',
      view.disks[0]!,
    ]);
    expect(read.toString()).not.toMatch(/fail/i);
    // What was unpacked can be saved again, without the disks too.
    await images.save(ID, join(directory, 'again.img'));
    await images.remove(ID);
    expect(existsSync(own)).toBe(true);
    await images.load(join(directory, 'again.img'));
    await images.remove(ID, DROP);
    expect(await readdir(join(directory, 'B/images'))).toEqual([]);
  });

  test('that was changed anywhere in its disks or its format is refused, and leaves nothing', async () => {
    const { file } = await savedOn('A', { withDisks: true });
    const good = await readFile(file);
    const { images } = await contextOn('B');
    const places = [8, good.indexOf('golden', 4096) + 9, Math.floor(good.length * 0.9), good.length - 60];
    for (const place of places) {
      for (const bit of [1, 2]) {
        const bad = Buffer.from(good);
        bad[place]! ^= bit;
        await writeFile(file, bad);
        await expect(images.load(file), `byte ${place}`).rejects.toMatchObject({
          code: expect.stringMatching(/^(CORRUPT|SPEC_INVALID)$/) as string,
        });
      }
    }
    expect(await readdir(join(directory, 'B/images'))).toEqual([]);
  });

  test('of fingerprints alone is not taken for one with disks', async () => {
    const { file } = await savedOn('A');
    const bytes = await readFile(file);
    expect(bytes[8]).toBe(2);
    bytes[8] = 3;
    await writeFile(file, bytes);
    await expect((await contextOn('B')).images.load(file)).rejects.toEqual(code('CORRUPT'));
    bytes[8] = 1;
    await writeFile(file, bytes);
    await expect((await contextOn('B')).images.load(file)).rejects.toEqual(code('CORRUPT'));
  });
});

describe('saving', () => {
  test('twice to one file is refused in plain words, and what a broken save has left is replaced', async () => {
    const { images, file, context } = await savedOn('A');
    await expect(images.save(ID, file)).rejects.toMatchObject({
      code: 'CONFLICT',
      message: `${file} exists`,
      remedy: expect.stringContaining('another name') as string,
    });
    expect(context.images.get(ID).saves).toEqual([{ path: file, state: 'saved' }]);
    const other = join(directory, 'other.img');
    await writeFile(`${other}.${ID}.A.part`, 'half');
    await images.save(ID, other);
    await expect(images.save(ID, join(directory, 'none/x.img'))).rejects.toEqual(code('NOT_FOUND'));
    expect(context.images.get(ID).saves).toHaveLength(2);
    expect((await readdir(directory)).filter((name) => name.endsWith('.part'))).toEqual([]);
  });

  test('that ended with the daemon is cleared by the next one', async () => {
    const { context } = await savedOn('A');
    const lost = join(directory, 'lost.img');
    const saves = [...(context.images.get(ID).saves ?? []), { path: lost, state: 'writing' as const }];
    await context.images.update(ID, { saves });
    await writeFile(`${lost}.${ID}.A.part`, 'half');
    const next = await contextOn('A');
    await clearBrokenSaves(next.context);
    expect(existsSync(`${lost}.${ID}.A.part`)).toBe(false);
    expect(next.context.images.get(ID).saves).toEqual([{ path: join(directory, 'saved.img'), state: 'saved' }]);
  });
});

test('a file of build 0.1.0 does not say what its disks were: it is loaded only where a user vouches for them', async () => {
  const host = await contextOn('A');
  await forked(host);
  const { layers: _, ...old } = host.context.images.get(ID);
  // Build 0.1.0 wrote the record without layers, in format 1.
  await host.context.images.replace(ID, { ...old, disks: [], spec: { ...old.spec, disks: [] } });
  const file = join(directory, 'old.img');
  await host.images.save(ID, file);
  const bytes = await readFile(file);
  expect(bytes[8]).toBe(1);
  await writeFile(file, withDescription(bytes, { ...old, overlays: [] }));
  const { images, context } = await contextOn('B');
  await expect(images.load(file)).rejects.toMatchObject({
    code: 'DISK_CHANGED',
    remedy: expect.stringContaining('--disks assume') as string,
  });
  await images.load(file, { isAssumed: true });
  expect(await startProblem(context, ID)).toBeNull();
});
