/** The files that images with disks are saved to, with and without the disks. */
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import {
  decodeHead,
  ENTRY,
  ENTRY_HEADER_BYTES,
  encodeEntry,
  encodeHead,
  HEAD_BYTES,
} from '../../../../src/agent/image/file-format.js';
import { clearBrokenSaves } from '../../../../src/agent/image/file-save.js';
import { sealDisks } from '../../../../src/agent/image/layers.js';
import { startProblem } from '../../../../src/agent/image/start-check.js';
import { QemuBackend } from '../../../../src/backends/qemu/backend.js';
import { ID, ImageScene, img, write } from '../../../support/image-scene.js';
import { mountSilent } from '../../../support/silent-mount.js';

const DROP = { isForced: false, isDroppingSaved: true };
const code = (expected: string) => expect.objectContaining({ code: expected });

let scene: ImageScene;
beforeEach(() => {
  scene = new ImageScene();
});
const cleanups: (() => void)[] = [];
afterEach(() => {
  for (const cleanup of cleanups.splice(0)) cleanup();
  return scene.end();
});

/** Replaces the description of an image's file of format 1. */
function withDescription(file: Buffer, record: object): Buffer {
  const { descriptionBytes } = decodeHead(file);
  const text = Buffer.from(JSON.stringify(record));
  const header = { kind: ENTRY.DESCRIPTION, region: 0, offsetBytes: 0, lengthBytes: text.length };
  const rest = file.subarray(HEAD_BYTES + ENTRY_HEADER_BYTES + descriptionBytes);
  return Buffer.concat([
    encodeHead({ version: 1, hasOrder: false, isSigned: false, descriptionBytes: text.length }),
    encodeEntry(header, text),
    text,
    rest,
  ]);
}

test('a file whose disks another host would serve is none that anybody has saved', async () => {
  const { file } = await scene.savedOn('A');
  const good = await readFile(file);
  const text = good.subarray(
    HEAD_BYTES + ENTRY_HEADER_BYTES,
    HEAD_BYTES + ENTRY_HEADER_BYTES + decodeHead(good).descriptionBytes,
  );
  const record = JSON.parse(text.toString('utf8')) as { spec: { disks: object[] } };
  const { images } = await scene.contextOn('B');
  const spec = {
    ...record.spec,
    disks: record.spec.disks.map((disk) => ({ ...disk, served: { host: 'A', image: ID } })),
  };
  for (const change of [{ served: { host: 'victim', disks: ['d0'] } }, { spec }]) {
    const bytes = withDescription(good, { ...record, ...change });
    // The head of a file with the digests of its layers.
    good.copy(bytes, 8, 8, 12);
    await writeFile(file, bytes);
    await expect(images.load(file)).rejects.toMatchObject({ code: 'CORRUPT' });
  }
});

describe('a file with the disks in it', () => {
  test('needs no disk of its host, holds nothing, and takes its disks along when it goes', async () => {
    const source = await scene.savedOn('A', { withDisks: true });
    expect(source.images.find(ID).savedFiles).toBeUndefined();
    await source.images.remove(ID);
    write(scene.disk, 'second');
    await rm(scene.golden);
    const { images, context } = await scene.contextOn('B');
    const view = await images.load(source.file);
    expect(await startProblem(context, ID)).toBeNull();
    const own = join(scene.directory, `B/images/${ID}.disks`);
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
    await images.save(ID, join(scene.directory, 'again.img'));
    await images.remove(ID);
    expect(existsSync(own)).toBe(true);
    await images.load(join(scene.directory, 'again.img'));
    await images.remove(ID, DROP);
    expect(await readdir(join(scene.directory, 'B/images'))).toEqual([]);
  });

  test('that was changed anywhere in its disks or its format is refused, and leaves nothing', async () => {
    const { file } = await scene.savedOn('A', { withDisks: true });
    const good = await readFile(file);
    const { images } = await scene.contextOn('B');
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
    expect(await readdir(join(scene.directory, 'B/images'))).toEqual([]);
  });

  test('whose disk names a file of the host as its content is refused', async () => {
    const secret = join(scene.directory, 'secret.raw');
    await writeFile(secret, Buffer.alloc(1 << 20, 'secret'));
    const host = await scene.contextOn('A');
    await scene.forked(host);
    const { layers = [] } = host.context.images.get(ID);
    // The description says that the disk has no backing file; its header names one.
    img('rebase', '-q', '-u', '-b', secret, '-F', 'raw', scene.disk);
    const [top] =
      (await sealDisks(new QemuBackend().diskFiles, host.context.images.get(ID).spec.disks))[0]?.files ?? [];
    await host.context.images.update(ID, { layers: [{ ...layers[0]!, files: [top!] }, layers[1]!] });
    const file = join(scene.directory, 'hostile.img');
    await host.images.save(ID, file, { withDisks: true });
    const { images } = await scene.contextOn('B');
    await expect(images.load(file)).rejects.toMatchObject({
      code: 'CORRUPT',
      message: expect.stringContaining(`lies on ${secret}`) as string,
    });
    expect(await readdir(join(scene.directory, 'B/images'))).toEqual([]);
  });

  test('of fingerprints alone is not taken for one with disks', async () => {
    const { file } = await scene.savedOn('A');
    const bytes = await readFile(file);
    expect(bytes[8]).toBe(2);
    bytes[8] = 3;
    await writeFile(file, bytes);
    await expect((await scene.contextOn('B')).images.load(file)).rejects.toEqual(code('CORRUPT'));
    bytes[8] = 1;
    await writeFile(file, bytes);
    await expect((await scene.contextOn('B')).images.load(file)).rejects.toEqual(code('CORRUPT'));
  });
});

describe('saving', () => {
  test('twice to one file is refused in plain words, and what a broken save has left is replaced', async () => {
    const { images, file, context } = await scene.savedOn('A');
    await expect(images.save(ID, file)).rejects.toMatchObject({
      code: 'CONFLICT',
      message: `${file} exists`,
      remedy: expect.stringContaining('another name') as string,
    });
    expect(context.images.get(ID).saves).toEqual([{ path: file, state: 'saved' }]);
    const other = join(scene.directory, 'other.img');
    await writeFile(`${other}.${ID}.A.part`, 'half');
    await images.save(ID, other);
    await expect(images.save(ID, join(scene.directory, 'none/x.img'))).rejects.toEqual(code('NOT_FOUND'));
    expect(context.images.get(ID).saves).toHaveLength(2);
    expect((await readdir(scene.directory)).filter((name) => name.endsWith('.part'))).toEqual([]);
  });

  test('that ended with the daemon is cleared by the next one', async () => {
    const { context } = await scene.savedOn('A');
    const lost = join(scene.directory, 'lost.img');
    const saves = [...(context.images.get(ID).saves ?? []), { path: lost, state: 'writing' as const }];
    await context.images.update(ID, { saves });
    await writeFile(`${lost}.${ID}.A.part`, 'half');
    const next = await scene.contextOn('A');
    await clearBrokenSaves(next.context);
    expect(existsSync(`${lost}.${ID}.A.part`)).toBe(false);
    expect(next.context.images.get(ID).saves).toEqual([{ path: join(scene.directory, 'saved.img'), state: 'saved' }]);
  });

  test('that cannot be cleared is left to a later start, and does not keep the daemon from this one', async () => {
    const { context } = await scene.savedOn('A');
    const file = join(scene.directory, 'a-file');
    await writeFile(file, '');
    const [lost, cleared] = [join(file, 'lost.img'), join(scene.directory, 'cleared.img')];
    const saves = [lost, cleared].map((path) => ({ path, state: 'writing' as const }));
    await context.images.update(ID, { saves });
    const next = await scene.contextOn('A');
    await clearBrokenSaves(next.context);
    expect(next.context.images.get(ID).saves).toEqual([{ path: lost, state: 'writing' }]);
  });

  test('that fails and cannot be cleared says why it has failed', async () => {
    const { images, context } = await scene.contextOn('A');
    await scene.forked({ images, context, vms: [] });
    const folder = join(scene.directory, 'folder');
    await mkdir(folder);
    // Somebody moves the folder away while the file is written.
    const regions = context.images.regions.bind(context.images);
    context.images.regions = async (record) => {
      if (existsSync(join(folder, `saved.img.${ID}.A.part`))) {
        await rename(folder, `${folder}.moved`);
        await writeFile(folder, '');
      }
      return regions(record);
    };
    const failed = images.save(ID, join(folder, 'saved.img'));
    await expect(failed).rejects.toMatchObject({ code: 'NOT_FOUND', message: expect.stringContaining('there is no') });
    expect(context.images.get(ID).saves).toEqual([{ path: join(folder, 'saved.img'), state: 'writing' }]);
  });

  test('that ended with the daemon on a file system that is away now does not hold up the next one', async (ctx) => {
    if (!existsSync('/dev/fuse')) ctx.skip('needs fuse');
    const { context } = await scene.savedOn('A');
    const away = join(scene.directory, 'away');
    await mkdir(away);
    const [here, there] = [join(scene.directory, 'here.img'), join(away, 'there.img')];
    const saves = [there, here].map((path) => ({ path, state: 'writing' as const }));
    await context.images.update(ID, { saves });
    const next = await scene.contextOn('A');
    cleanups.push(mountSilent(away));
    await clearBrokenSaves(next.context);
    expect(next.context.images.get(ID).saves).toEqual([{ path: there, state: 'writing' }]);
  });
});

test('an image of which something cannot be removed does not keep the daemon from starting', async () => {
  const { context } = await scene.contextOn('A');
  await scene.forked({ context, images: {} as never, vms: [] });
  await context.images.update(ID, { state: 'unloaded' });
  await rm(context.images.statePath(ID));
  await mkdir(context.images.statePath(ID));
  const next = await scene.contextOn('A');
  expect(next.context.images.get(ID).state).toBe('unloaded');
});

test('a file of build 0.1.0 says nothing of its disks: it is loaded only if a user vouches for them', async () => {
  const host = await scene.contextOn('A');
  await scene.forked(host);
  const { layers: _, ...old } = host.context.images.get(ID);
  // Build 0.1.0 wrote the record without layers, in format 1.
  await host.context.images.replace(ID, { ...old, disks: [], spec: { ...old.spec, disks: [], qemuArgs: [] } });
  const file = join(scene.directory, 'old.img');
  await host.images.save(ID, file);
  const bytes = await readFile(file);
  expect(bytes[8]).toBe(1);
  await writeFile(file, withDescription(bytes, { ...old, overlays: [] }));
  const { images, context } = await scene.contextOn('B');
  await expect(images.load(file)).rejects.toMatchObject({
    code: 'DISK_CHANGED',
    remedy: expect.stringContaining('--disks assume') as string,
  });
  await images.load(file, { isAssumed: true });
  expect(await startProblem(context, ID)).toBeNull();
});
