/**
 * What a daemon must know of an image to find it again. Its memory is on tmpfs: after a reboot of the machine the image
 * is gone.
 */

import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { ParentMode } from '../../domain/fork.js';
import type { ImageState } from '../../domain/image.js';
import type { Accel, DiskFormat, VmSpec } from '../../domain/vm.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import { accel, diskFormat, imageId, imageState, parentMode } from '../../schemas/words.js';

/** A disk that the image's guest had, as it was at the fork point: nobody writes to the file any more. */
export interface ImageDisk {
  readonly id: string;
  readonly path: string;
  readonly format: DiskFormat;
}

/** Where the parent writes since the fork point. */
export interface ParentOverlay extends ImageDisk {
  readonly vm: string;
  /** What it lies on: the image's disk. */
  readonly base: ImageDisk;
}

export interface ImageRecord {
  readonly version: 1;
  readonly id: string;
  /** capturing: before the fork is committed; a next daemon takes it away. */
  readonly state: ImageState;
  readonly parentMode: ParentMode;
  /** Of the parent at the fork, by which QEMUs are made that can load the state. */
  readonly spec: VmSpec;
  readonly accel: Accel;
  readonly qemuVersion: string;
  readonly deviceStateBytes: number;
  readonly disks: readonly ImageDisk[];
  readonly overlays: readonly ParentOverlay[];
  readonly createdAt: string;
}

const disk = { id: z.string(), path: z.string().startsWith('/'), format: diskFormat };

export const imageRecordSchema: z.ZodType<ImageRecord> = z.strictObject({
  version: z.literal(1),
  id: imageId,
  state: imageState,
  parentMode,
  spec: vmSpecSchema,
  accel,
  qemuVersion: z.string(),
  deviceStateBytes: z.int().min(0),
  disks: z.array(z.strictObject(disk)),
  overlays: z.array(z.strictObject({ ...disk, vm: z.string(), base: z.strictObject(disk) })),
  createdAt: z.string(),
});

/** The id of an image or fork names files, and it comes from a client. */
export function checkImageId(id: string): void {
  if (!imageId.safeParse(id).success) throw new MigrationError('USAGE', 'the id of an image or fork is 16 hex digits');
}
