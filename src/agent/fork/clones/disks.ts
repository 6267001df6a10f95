/**
 * A clone's disks. For each disk that the parent writes to, the clone's directory has a qcow2 overlay on the parent's
 * file, or on what another host serves of it. A read-only disk is the parent's file itself, or is served. The overlays
 * of all clones of a set start with the same content, so one template is made per disk and copied: copying 200 kB is
 * faster than starting a qemu-img process.
 */
import { copyFile, rm, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import type { VmBackend } from '../../../backends/backend.js';
import type { CloneDisks } from '../../../domain/fork.js';
import type { DiskSpec, ServedDisk } from '../../../domain/vm.js';

/** Holds the empty overlays on the disks of a parent, by disk id. */
export class OverlayTemplates {
  readonly #paths = new Map<string, string>();

  /** The paths of the templates start with `prefix`. */
  static async make(
    { diskFiles, diskExports }: Pick<VmBackend, 'diskFiles' | 'diskExports'>,
    disks: readonly DiskSpec[],
    { prefix, served }: { prefix: string; served: ServedDisks | null },
  ): Promise<OverlayTemplates> {
    const templates = new OverlayTemplates();
    try {
      for (const disk of disks.filter(isOwn)) {
        const path = `${prefix}.${disk.id}.qcow2`;
        templates.#paths.set(disk.id, path);
        const socket = served?.sockets[disk.id];
        const { path: basePath, format } =
          socket === undefined ? disk : { path: diskExports.pathOf(socket, disk.id), format: 'raw' as const };
        const sizeBytes = await diskFiles.virtualSizeBytes(basePath, format);
        await diskFiles.createOverlay(path, { path: basePath, format }, sizeBytes);
      }
      return templates;
    } catch (error) {
      await templates.remove();
      throw error;
    }
  }

  async copyTo(disk: DiskSpec, path: string): Promise<void> {
    const template = this.#paths.get(disk.id);
    if (template === undefined) throw new RangeError(`no overlay template for disk ${disk.id}`);
    await copyFile(template, path);
  }

  async remove(): Promise<void> {
    for (const path of this.#paths.values()) await rm(path, { force: true });
  }
}

/** The disks that another host serves. */
export interface ServedDisks extends ServedDisk {
  /** The sockets that lead there, by the disk's id. */
  readonly sockets: Readonly<Record<string, string>>;
}

export interface CloneDiskPlan {
  readonly specs: readonly DiskSpec[];
  /** To be called when the clone's directory exists, before its QEMU starts. */
  create(): Promise<void>;
  /** To be called when the clone's QEMU has opened the disks. */
  afterLaunch(): Promise<void>;
}

export function planCloneDisks(
  disks: readonly DiskSpec[],
  directory: string,
  mode: CloneDisks,
  { templates, served }: { templates: OverlayTemplates; served: ServedDisks | null },
): CloneDiskPlan {
  const own = disks.filter(isOwn);
  const markOf = ({ id }: DiskSpec): Pick<DiskSpec, 'served'> =>
    served?.sockets[id] === undefined ? {} : { served: { host: served.host, image: served.image } };
  const pathOf = ({ id }: DiskSpec) => join(directory, `${id}.qcow2`);
  return {
    specs: disks.map((disk) => ({
      ...disk,
      ...(isOwn(disk) ? { path: pathOf(disk), format: 'qcow2' } : {}),
      ...markOf(disk),
    })),
    async create() {
      for (const disk of own) await templates.copyTo(disk, pathOf(disk));
    },
    async afterLaunch() {
      // A scratch disk has no name any more: its content is gone when the QEMU that has the file open ends.
      if (mode === 'scratch') for (const disk of own) await unlink(pathOf(disk));
    },
  };
}

function isOwn({ isReadOnly }: DiskSpec): boolean {
  return !isReadOnly;
}
