/**
 * The writable disks that an image's file brings along. They are unpacked below the image's own directory, and removed
 * with the image.
 */
import { randomBytes } from 'node:crypto';
import { mkdir, open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { DiskFiles } from '../../backends/disk-files.js';
import { damaged } from './file-format.js';
import { digestOf, type LayerFile, sealDisks, withFile } from './layers.js';
import type { ImageRecord } from './record.js';

interface BroughtFile extends LayerFile {
  /** The id of its disk. */
  readonly disk: string;
  readonly target: string;
  /** The number of its disk's files above it. */
  readonly depth: number;
}

export class BroughtDisks {
  /** A directory for each load: that of an earlier load may still be in use by an unloaded image's other file. */
  readonly #directory: string;
  readonly #files: readonly BroughtFile[];

  constructor(directory: string, { layers = [] }: ImageRecord) {
    const target = join(directory, randomBytes(4).toString('hex'));
    this.#directory = target;
    this.#files = layers
      .filter(({ isReadOnly }) => !isReadOnly)
      .flatMap(({ id, files }, disk) =>
        files.map((file, depth) => ({
          ...{ ...file, disk: id, depth },
          target: join(target, `${disk}-${depth}.${file.format}`),
        })),
      );
  }

  /** The unpacked files, in the order of their regions in the image's file. */
  get files(): readonly { readonly path: string; readonly lengthBytes: number }[] {
    return this.#files.map(({ target, sizeBytes }) => ({ path: target, lengthBytes: sizeBytes }));
  }

  get sizeBytes(): number {
    return this.#files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
  }

  /** Creates empty files of the right length. */
  async create(): Promise<void> {
    await mkdir(this.#directory, { recursive: true, mode: 0o700 });
    for (const { target, sizeBytes } of this.#files) {
      const file = await open(target, 'wx', 0o600);
      await file.truncate(sizeBytes);
      await file.close();
    }
  }

  /** Checks the unpacked files and ties them together. Returns the members of the image's record that change. */
  async finish(
    diskFiles: DiskFiles,
    record: ImageRecord,
  ): Promise<Pick<ImageRecord, 'disks' | 'spec'> & Required<Pick<ImageRecord, 'layers'>>> {
    for (const { target, digest } of this.#files) {
      if ((await withFile(target, digestOf)) !== digest) throw damaged('a disk lacks content');
    }
    for (const [index, file] of this.#files.entries()) {
      const base = this.#files[index + 1];
      if (base?.disk !== file.disk) continue;
      await diskFiles.rebase(file.target, { path: base.target, format: base.format });
    }
    const tops = this.#files.filter(({ depth }) => depth === 0);
    const pathOf = (id: string, path: string) => tops.find(({ disk }) => disk === id)?.target ?? path;
    const disks = record.spec.disks.map((disk) => ({ ...disk, path: pathOf(disk.id, disk.path) }));
    const brought = disks.filter(({ id }) => tops.some(({ disk }) => disk === id));
    const sealed = await sealDisks(diskFiles, brought);
    // A header may name any file of this host as the content below.
    const own = new Set(this.#files.map(({ target }) => target));
    const foreign = sealed.flatMap(({ files }) => files).find(({ path }) => !own.has(path));
    if (foreign !== undefined) throw damaged(`a disk lies on ${foreign.path}, which is not in the file`);
    for (const { target } of this.#files) {
      const file = await open(target, 'r');
      await file.sync();
      await file.close();
    }
    return {
      spec: { ...record.spec, disks },
      disks: disks.map(({ id, path, format }) => ({ id, path, format })),
      layers: (record.layers ?? []).map((layer) => sealed.find(({ id }) => id === layer.id) ?? layer),
    };
  }

  async remove(): Promise<void> {
    await rm(this.#directory, { recursive: true, force: true });
  }
}
