/**
 * The record of an image, by which a restarted daemon finds the image again. The image's memory is on tmpfs, so the
 * image does not survive a reboot of the machine.
 */

import { z } from 'zod';
import { MigrationError } from '../../domain/errors.js';
import type { ParentMode } from '../../domain/fork.js';
import type { ImageState } from '../../domain/image.js';
import type { Accel, VmSpec } from '../../domain/vm.js';
import type { RecordKind } from '../../durable/record-files.js';
import type { ImageDisk } from '../../engine/ports/fork.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import { accel, diskFormat, hostName, imageId, imageState, parentMode } from '../../schemas/words.js';
import type { DiskLayer } from './layers.js';

/** The file that the parent writes to since the fork point. */
export interface ParentOverlay extends ImageDisk {
  readonly vm: string;
  /** The overlay's backing file: the image's disk. */
  readonly base: ImageDisk;
}

export interface ImageRecord {
  readonly version: 1;
  readonly id: string;
  /** `capturing` until the clones run. A restarted daemon deletes such an image, unless its fork is committed. */
  readonly state: ImageState;
  readonly parentMode: ParentMode;
  /** The parent's spec at the fork. A QEMU started with it can load the device state. */
  readonly spec: VmSpec;
  readonly accel: Accel;
  readonly qemuVersion: string;
  readonly deviceStateBytes: number;
  /**
   * Why the image can never be complete, or which page is damaged; for people. Absent: nothing is wrong, or a build
   * that does not say has given it up.
   */
  readonly problem?: string;
  readonly disks: readonly ImageDisk[];
  readonly overlays: readonly ParentOverlay[];
  /** What the files of the disks were at the fork point. Absent in a record of build 0.1.0 and before the commit. */
  readonly layers?: readonly DiskLayer[];
  /** The files that the image was saved to, and that need its layers. Absent: none. */
  readonly saves?: readonly SavedFile[];
  /** The other hosts that read the image, or mean to. Absent: none. */
  readonly readers?: readonly string[];
  /**
   * Only of an image that was read from another host: every page is what that host's digests say. False: not yet, or
   * the digests never came.
   */
  readonly isChecked?: boolean;
  /** The host that the image was read from. Absent: it was made or loaded here, or is of an earlier build. */
  readonly from?: string;
  /** The other hosts that have been told, by a fork, that they may read the image. Absent: none. */
  readonly sharedWith?: readonly string[];
  /** The disks that another host serves. Absent: this host has the files of all disks. */
  readonly served?: { readonly host: string; readonly disks: readonly string[] };
  /** The hosts that this host has served the disks. Absent: none. */
  readonly servedTo?: readonly string[];
  readonly createdAt: string;
}

/** A file that `image save` has written without the disks in it. It can be started as long as the layers exist. */
export interface SavedFile {
  readonly path: string;
  /** `writing` is recorded first, so that a restarted daemon removes what a broken save has left. */
  readonly state: 'writing' | 'saved';
}

const disk = { id: z.string(), path: z.string().startsWith('/'), format: diskFormat };

const decimal = z.string().regex(/^\d{1,20}$/);
const layerFile = z.strictObject({
  path: z.string().startsWith('/'),
  format: diskFormat,
  sizeBytes: z.int().min(0),
  stamp: z.strictObject({ inode: decimal, mtimeNs: decimal, ctimeNs: decimal }).nullable(),
  digest: z
    .string()
    .regex(/^[0-9a-f]{64}$/)
    .nullable(),
});
const diskLayer = z.strictObject({ id: z.string(), isReadOnly: z.boolean(), files: z.array(layerFile).min(1) });
const savedFile = z.strictObject({
  path: z.string().startsWith('/'),
  state: z.enum(['writing', 'saved']),
});

export const imageRecordSchema: z.ZodType<ImageRecord> = z.strictObject({
  version: z.literal(1),
  id: imageId,
  state: imageState,
  parentMode,
  spec: vmSpecSchema,
  accel,
  qemuVersion: z.string(),
  deviceStateBytes: z.int().min(0),
  problem: z.string().exactOptional(),
  disks: z.array(z.strictObject(disk)),
  overlays: z.array(z.strictObject({ ...disk, vm: z.string(), base: z.strictObject(disk) })),
  layers: z.array(diskLayer).exactOptional(),
  saves: z.array(savedFile).exactOptional(),
  readers: z.array(hostName).exactOptional(),
  isChecked: z.boolean().exactOptional(),
  from: hostName.exactOptional(),
  sharedWith: z.array(hostName).exactOptional(),
  served: z.strictObject({ host: hostName, disks: z.array(z.string()) }).exactOptional(),
  servedTo: z.array(hostName).exactOptional(),
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
