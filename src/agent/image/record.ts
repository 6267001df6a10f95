/**
 * The record of an image, by which a restarted daemon finds the image again. The image's memory is on tmpfs, so the
 * image does not survive a reboot of the machine.
 */

import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { ParentMode } from '../../domain/fork.js';
import type { ImageState } from '../../domain/image.js';
import type { Accel, DiskFormat, VmSpec } from '../../domain/vm.js';
import type { RecordKind } from '../../durable/record-files.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import { accel, diskFormat, imageId, imageState, parentMode } from '../../schemas/words.js';

/** A disk of the image's guest, as it was at the fork point. No VM writes to the file any more. */
export interface ImageDisk {
  readonly id: string;
  readonly path: string;
  readonly format: DiskFormat;
}

/** The file that the parent writes to since the fork point. */
export interface ParentOverlay extends ImageDisk {
  readonly vm: string;
  /** The overlay's backing file: the image's disk. */
  readonly base: ImageDisk;
}

export interface ImageRecord {
  readonly version: 1;
  readonly id: string;
  /** The image is `capturing` until its fork is committed. A restarted daemon deletes such an image. */
  readonly state: ImageState;
  readonly parentMode: ParentMode;
  /** The parent's spec at the fork. A QEMU started with it can load the device state. */
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

export const IMAGE_RECORD: RecordKind<ImageRecord> = {
  what: 'image record',
  schema: imageRecordSchema,
  version: 1,
  nameOf: ({ id }) => id,
};

/** Throws USAGE for an invalid id. Ids come from clients, and files are named after them. */
export function checkImageId(id: string): void {
  if (!imageId.safeParse(id).success)
    throw new MigrationError('USAGE', 'the id of an image or fork must be 16 hex digits');
}
