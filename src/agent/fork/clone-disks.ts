/**
 * A clone's disks: a qcow2 overlay in the clone's directory on each file that its parent writes to, the same file where
 * the parent only reads. The overlays of all clones of a set begin alike, so one is made for each disk and copied: 200
 * kB take less time than a process.
 */
import { copyFile, rm, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import type { DiskFiles } from '../../backends/backend.js';
import type { CloneDisks } from '../../domain/fork.js';
import type { DiskSpec } from '../../domain/vm.js';

/** Empty overlays on the disks of a parent, by disk id. */
export class OverlayTemplates {
  readonly #paths = new Map<string, string>();

  /** Their paths begin with `prefix`. */
  static async make(files: DiskFiles, disks: readonly DiskSpec[], prefix: string): Promise<OverlayTemplates> {
    const templates = new OverlayTemplates();
    try {
      for (const disk of disks.filter(isOwn)) {
        const path = `${prefix}.${disk.id}.qcow2`;
        templates.#paths.set(disk.id, path);
        await files.createOverlay(path, disk, await files.virtualSizeBytes(disk.path, disk.format));
      }
      return templates;
    } catch (error) {
      await templates.remove();
      throw error;
    }
  }

  async copyTo(disk: DiskSpec, path: string): Promise<void> {
    const template = this.#paths.get(disk.id);
    if (template === undefined) throw new RangeError(`no overlay for disk ${disk.id}`);
    await copyFile(template, path);
  }

  async remove(): Promise<void> {
    for (const path of this.#paths.values()) await rm(path, { force: true });
  }
}

export interface CloneDiskPlan {
  readonly specs: readonly DiskSpec[];
  /** Once the clone's directory is there, and before its QEMU. */
  create(): Promise<void>;
  /** Its QEMU has opened them. */
  afterLaunch(): Promise<void>;
}

export function planCloneDisks(
  disks: readonly DiskSpec[],
  directory: string,
  mode: CloneDisks,
  templates: OverlayTemplates,
): CloneDiskPlan {
  const own = disks.filter(isOwn);
  const pathOf = ({ id }: DiskSpec) => join(directory, `${id}.qcow2`);
  return {
    specs: disks.map((disk) => (isOwn(disk) ? { ...disk, path: pathOf(disk), format: 'qcow2' } : disk)),
    async create() {
      for (const disk of own) await templates.copyTo(disk, pathOf(disk));
    },
    async afterLaunch() {
      // Scratch: whatever is written ends with the QEMU that has the file open.
      if (mode === 'scratch') for (const disk of own) await unlink(pathOf(disk));
    },
  };
}

function isOwn({ isReadOnly }: DiskSpec): boolean {
  return !isReadOnly;
}
