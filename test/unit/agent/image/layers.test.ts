/**
 * Images with disks, real files and the real qemu-img: an image starts only on the disks of its moment, and a layer
 * stays as long as somebody needs it.
 */
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { chmod, readdir, readFile, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { sealLayers } from '../../../../src/agent/fork/settle.js';
import { holdersHere } from '../../../../src/agent/image/layer-holders.js';
import { fileFailure } from '../../../../src/agent/image/layers.js';
import { startProblem } from '../../../../src/agent/image/start-check.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import { ID, ImageScene, img, write } from '../../../support/image-scene.js';

const DROP = { isForced: false, isDroppingSaved: true };
const code = (expected: string) => expect.objectContaining({ code: expected });

let scene: ImageScene;
beforeEach(() => {
  scene = new ImageScene();
});
afterEach(() => scene.end());

describe('an image starts only on the disks of its moment', () => {
  const changes: [what: string, change: () => Promise<void> | void][] = [
    ['the disk was written to', () => write(scene.disk, 'second')],
    ['the disk has another size', () => img('resize', '-q', scene.disk, '2M')],
    ['the backing file was written to', () => writeFile(scene.golden, Buffer.alloc(1 << 20, 'silver'))],
    ['a CD that only an argument names was replaced', () => writeFile(scene.cd, 'other')],
    ['the code of the firmware was replaced', () => writeFile(scene.firmware, 'other')],
    ['a read-only disk was replaced', () => writeFile(scene.iso, 'ISO')],
    ['the disk was replaced by a copy of another', () => writeFile(scene.disk, 'x'.repeat(200_000))],
    ['the disk is gone', () => rm(scene.disk)],
    ['the disk is a pipe', () => rm(scene.disk).then(() => void execFileSync('mkfifo', [scene.disk]))],
  ];
  test.each(changes)('%s: refused on its own host and on another', async (_, change) => {
    const source = await scene.contextOn('A');
    await scene.forked(source);
    expect(await startProblem(source.context, ID)).toBeNull();
    const file = join(scene.directory, 'saved.img');
    await source.images.save(ID, file);
    const before = await stat(scene.disk);
    await change();
    expect(await startProblem(source.context, ID)).toMatchObject({ code: 'DISK_CHANGED' });
    const refusal = { code: expect.stringMatching(/^(DISK_CHANGED|NOT_FOUND)$/) as string };
    await expect((await scene.contextOn('B')).images.load(file)).rejects.toMatchObject(refusal);
    expect(await readdir(join(scene.directory, 'B/images'))).toEqual([]);
    // The time of the last write can be set by anybody.
    if (existsSync(scene.disk) && (await stat(scene.disk)).isFile())
      await utimes(scene.disk, before.atime, before.mtime);
    expect(await startProblem(source.context, ID)).toMatchObject({ code: 'DISK_CHANGED' });
  });

  test('a kernel does not count: a clone has it in its memory, and its process never opens it', async () => {
    const { context, file } = await scene.savedOn('A');
    await writeFile(scene.kernel, 'other');
    expect(await startProblem(context, ID)).toBeNull();
    await rm(scene.kernel);
    await (await scene.contextOn('B')).images.load(file);
  });

  test('without a saved file its stamp alone tells', async () => {
    const host = await scene.contextOn('A');
    await scene.forked(host);
    await chmod(scene.disk, 0o600);
    expect(await startProblem(host.context, ID)).toBeNull();
    write(scene.disk, 'second');
    expect(await startProblem(host.context, ID)).toMatchObject({
      code: 'DISK_CHANGED',
      reason: expect.stringMatching(/disk.qcow2 has been written since/) as string,
    });
    await expect(host.images.save(ID, join(scene.directory, 'x.img'))).rejects.toEqual(code('DISK_CHANGED'));
  });

  test('the same content under other times is accepted, and read once', async () => {
    const { context } = await scene.savedOn('A');
    await utimes(scene.disk, 1, 1);
    expect(await startProblem(context, ID)).toBeNull();
    const [layer] = context.images.get(ID).layers ?? [];
    expect(layer?.files[0]?.stamp?.mtimeNs).toBe('1000000000');
  });

  test('nobody may write to a disk while clones start: a VM, another program', async () => {
    const { context, vms } = await scene.savedOn('A');
    vms.push({
      spec: { name: 'other', disks: [{ path: scene.disk, isReadOnly: false }] },
      state: 'running',
      image: null,
      process: {},
    });
    expect(await startProblem(context, ID)).toEqual({ code: 'DISK_IN_USE', reason: `other writes to ${scene.disk}` });
    vms.length = 0;
    await scene.writer(scene.disk);
    const reason = `another program has ${scene.disk} open for writing`;
    expect(await startProblem(context, ID)).toEqual({ code: 'DISK_IN_USE', reason });
    await expect((await scene.contextOn('B')).images.load(join(scene.directory, 'saved.img'))).rejects.toMatchObject({
      code: 'CONFLICT',
      message: expect.stringContaining(reason) as string,
    });
  });

  test('what the host or its disk fails at is no changed disk', async () => {
    const host = await scene.contextOn('A');
    await scene.forked(host);
    const { images } = host.context;
    const [layer, ...others] = images.get(ID).layers ?? [];
    // A regular file of length 0 whose first byte cannot be read: EIO.
    const unreadable = { ...layer!.files[0]!, path: '/proc/self/mem', sizeBytes: 0, digest: 'f'.repeat(64) };
    await images.update(ID, { layers: [{ ...layer!, files: [unreadable] }, ...others] });
    await expect(startProblem(host.context, ID)).rejects.toMatchObject({
      code: 'IO_FAILED',
      message: expect.stringContaining('/proc/self/mem cannot be read') as string,
      remedy: expect.stringContaining('disk or file server') as string,
    });
  });

  const errnos: [errno: string, code: string, limit?: string][] = [
    ['EMFILE', 'OUT_OF_MEMORY', 'openFiles'],
    ['ENFILE', 'OUT_OF_MEMORY', 'openFilesOfHost'],
    ['ENOMEM', 'OUT_OF_MEMORY', 'memory'],
    ['EIO', 'IO_FAILED'],
    ['ESTALE', 'IO_FAILED'],
    ['EACCES', 'NOT_PERMITTED'],
    ['ENOTDIR', 'NOT_FOUND'],
  ];
  test.each(errnos)('%s keeps its meaning', (errno, expected, limit) => {
    const error = fileFailure('/d', 'opened', Object.assign(new Error(errno), { code: errno, syscall: 'open' }));
    expect(error).toMatchObject({ code: expected, ...(limit === undefined ? {} : { details: { limit } }) });
    expect(error.message).toContain('/d');
  });

  test('disks that could not be described for want of descriptors are described at the next start', async () => {
    const host = await scene.contextOn('A');
    await scene.forked(host);
    const { images, vms } = host.context;
    const { layers: sealed, ...bare } = images.get(ID);
    await images.replace(ID, bare);
    const { diskFiles } = vms.backend;
    const chain = () => Promise.reject(new MigrationError('OUT_OF_MEMORY', 'too many open files'));
    Object.assign(vms.backend, { diskFiles: { ...diskFiles, chain } });
    await sealLayers(host.context, ID);
    await expect(startProblem(host.context, ID)).rejects.toEqual(code('OUT_OF_MEMORY'));
    Object.assign(vms.backend, { diskFiles });
    expect(await startProblem(host.context, ID)).toBeNull();
    expect(images.get(ID).layers).toEqual(sealed);
  });

  test('an image whose disks could not be read is not started', async () => {
    const host = await scene.contextOn('A');
    await scene.forked(host);
    await host.context.images.update(ID, { layers: [] });
    expect(await startProblem(host.context, ID)).toMatchObject({ code: 'DISK_CHANGED' });
  });
});

describe('a layer stays as long as somebody needs it', () => {
  test('a saved file keeps it; given up, the overlay is merged and the file is refused', async () => {
    const { images, file, context } = await scene.savedOn('A');
    expect(await images.remove(ID)).toMatchObject({
      mergedDisks: [],
      keptLayers: [
        { path: scene.disk, reason: `needed by saved image ${file}` },
        { path: scene.iso },
        { path: scene.golden },
        { path: scene.cd },
        { path: scene.firmware },
      ],
    });
    expect(images.find(ID)).toMatchObject({ state: 'unloaded', allocatedBytes: 0, savedFiles: [file] });
    expect(existsSync(scene.overlay)).toBe(true);
    await expect(
      images.refuseWritesToImages({ name: 'web', disks: context.images.get(ID).spec.disks }),
    ).rejects.toEqual(code('CONFLICT'));
    expect(await images.load(file)).toMatchObject({ id: ID, state: 'complete' });
    expect(context.images.get(ID).overlays).toHaveLength(1);
    await images.remove(ID);
    expect(await images.remove(ID, DROP)).toMatchObject({ mergedDisks: [scene.overlay], keptLayers: [] });
    expect(images.list()).toEqual([]);
    expect(existsSync(scene.overlay)).toBe(false);
    await expect(images.load(file)).rejects.toEqual(code('DISK_CHANGED'));
  });

  test('also after a reboot and in the next daemon, which merges then', async () => {
    const before = await scene.contextOn('A');
    await scene.forked(before);
    await rm(join(scene.directory, 'A/ram'), { recursive: true });
    const after = await scene.contextOn('A');
    expect(after.images.list()).toMatchObject([{ id: ID, state: 'unloaded' }]);
    expect(await startProblem(after.context, ID)).toBeNull();
    const { spec } = after.context.images.get(ID);
    await expect(after.images.refuseWritesToImages(spec)).rejects.toEqual(code('CONFLICT'));
    expect(await after.images.remove(ID)).toMatchObject({ mergedDisks: [scene.overlay] });
    await after.images.refuseWritesToImages(spec);
  });

  test('a load that fails leaves the unloaded image as it was', async () => {
    const { images, file, context } = await scene.savedOn('A');
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
    ['is of build 0.1.0 and has it', () => Promise.reject(new MigrationError('NOT_FOUND', 'no route')), /older build/],
  ];
  test.each(answers)('another host %s', async (_, layerHolders, reason) => {
    const checkTarget = async () => ({ disks: [{ path: scene.disk, isReadable: true, isWritable: true }] });
    const others = { names: ['B'], agent: () => ({ inventory: { layerHolders, checkTarget } as never }) };
    const host = await scene.contextOn('A', others);
    await scene.forked(host);
    const removal = await host.images.remove(ID);
    if (reason === null) return expect(removal).toMatchObject({ mergedDisks: [scene.overlay], keptLayers: [] });
    expect(removal.keptLayers[0]?.reason).toMatch(reason);
    expect(existsSync(scene.overlay)).toBe(true);
    expect((await host.images.prune({ isDryRun: false })).kept).toMatchObject([{ id: ID }]);
    const forced = await host.images.remove(ID, { isForced: true, isDroppingSaved: false });
    return expect(forced).toMatchObject({ mergedDisks: [scene.overlay] });
  });

  const force = { isForced: true, isDroppingSaved: false };

  test('a host that has read its served disks, and is no peer any more, keeps it unless forced', async () => {
    const asked: string[] = [];
    const agent = (name: string) => {
      asked.push(name);
      return { inventory: { layerHolders: async () => ({ holders: [] }) } as never };
    };
    const host = await scene.contextOn('A', { names: ['B'], agent });
    await scene.forked(host);
    await host.context.images.update(ID, { servedTo: ['B', 'gone'] });
    const { keptLayers, mergedDisks } = await host.images.remove(ID);
    expect([keptLayers[0]?.reason, mergedDisks]).toEqual(['needed by host gone, no peer', []]);
    expect([asked.includes('gone'), existsSync(scene.overlay)]).toEqual([false, true]);
    expect(host.images.find(ID).state).toBe('unloaded');
    expect((await host.images.prune({ isDryRun: false })).kept).toMatchObject([
      { id: ID, reason: expect.stringContaining('host gone, no peer') as string },
    ]);
    expect(await host.images.remove(ID, force)).toMatchObject({ mergedDisks: [scene.overlay], keptLayers: [] });
    expect(host.images.list()).toEqual([]);
  });

  test('whoever overrules a host that reads the image is told next who needs its layers', async () => {
    const layerHolders = async () => ({ holders: [`VM clone of ${ID}`] });
    const others = { names: ['B'], agent: () => ({ inventory: { layerHolders } as never }) };
    const host = await scene.contextOn('A', others);
    await scene.forked(host);
    await host.context.images.update(ID, { readers: ['B', 'C'], servedTo: ['B'] });
    await expect(host.images.remove(ID)).rejects.toMatchObject({
      code: 'CONFLICT',
      message: `hosts B, C still read image ${ID}`,
    });
    expect(host.images.find(ID).state).toBe('complete');
    const { keptLayers, mergedDisks } = await host.images.remove(ID, force);
    expect([keptLayers[0]?.reason, mergedDisks]).toEqual([`needed by VM clone of ${ID} on B`, []]);
    expect([host.context.images.get(ID).readers, existsSync(scene.overlay)]).toEqual([undefined, true]);
    expect(await host.images.remove(ID, force)).toMatchObject({ mergedDisks: [scene.overlay] });
  });

  test('a host of build 0.1.0 that does not have the file needs nothing', async () => {
    const inventory = {
      layerHolders: () => Promise.reject(new MigrationError('NOT_FOUND', 'no route')),
      checkTarget: async () => ({ disks: [{ path: scene.disk, isReadable: false, isWritable: false }] }),
    };
    const host = await scene.contextOn('A', { names: ['B'], agent: () => ({ inventory: inventory as never }) });
    await scene.forked(host);
    expect(await host.images.remove(ID)).toMatchObject({ mergedDisks: [scene.overlay] });
  });

  test('a VM is not run on a disk of an image on another host; a host that is down does not matter', async () => {
    const { context, images, file } = await scene.savedOn('B');
    const asked = { layerHolders: async (paths: string[]) => ({ holders: await holdersHere(context, paths) }) };
    const others = { names: ['B'], agent: () => ({ inventory: asked as never }) };
    const { spec } = context.images.get(ID);
    await images.remove(ID);
    const refused = (await scene.contextOn('A', others)).images.refuseWritesToImages(spec);
    await expect(refused).rejects.toMatchObject({ message: expect.stringContaining(`${file} on B`) as string });
    const down = { layerHolders: () => Promise.reject(new MigrationError('UNREACHABLE', 'down')) };
    const silent = { names: ['B'], agent: () => ({ inventory: down as never }) };
    await (await scene.contextOn('A', silent)).images.refuseWritesToImages(spec);
  });

  test('the overlay of a parent that has moved stays until its host has merged it', async () => {
    const host = await scene.contextOn('A');
    await scene.forked(host);
    Object.assign(host.context, { registry: { owner: async () => ({ owner: 'B' }) } });
    const reason = 'web belongs to B: "vmctl flatten web" there merges it';
    expect(await host.images.remove(ID)).toMatchObject({ keptLayers: [{ path: scene.overlay, reason }] });
    expect(host.images.find(ID).state).toBe('unloaded');
    const saves = [{ path: join(scene.directory, 'x.img'), state: 'saved' as const }];
    await host.context.images.update(ID, { saves });
    expect(await holdersHere(host.context, [scene.disk], 'web')).toHaveLength(1);
    await host.images.remove(ID, DROP);
    // It does not stand in the way of that host, but in everybody else's.
    const paths = [scene.disk];
    expect(await holdersHere(host.context, paths)).toEqual([`image ${ID}`]);
    expect(await holdersHere(host.context, paths, 'web')).toEqual([]);
    await rm(scene.overlay);
    expect(await host.images.remove(ID)).toEqual({ id: ID, freedBytes: 0, mergedDisks: [], keptLayers: [] });
    expect(host.images.list()).toEqual([]);
  });

  test('prune removes what nobody needs, and says what it would remove', async () => {
    const host = await scene.contextOn('A');
    await scene.forked(host);
    expect(await host.images.prune({ isDryRun: true })).toMatchObject({ removed: [{ id: ID }], kept: [] });
    host.vms.push({ spec: { name: 'c', disks: [] }, state: 'running', image: ID, process: {} });
    expect((await host.images.prune({ isDryRun: false })).kept[0]?.reason).toMatch(/has clones: c/);
    host.vms.length = 0;
    expect(await host.images.prune({ isDryRun: false })).toMatchObject({ removed: [{ mergedDisks: [scene.overlay] }] });
    expect(host.images.list()).toEqual([]);
  });
});
