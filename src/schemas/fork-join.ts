/** What a host that joins a fork gets: its share of the clones, and the image of another host. */
import { z } from 'zod';
import { DISK_ACCESSES, type ForkShare } from '../domain/fork.js';
import type { ForkOrigin, ImageDisk } from '../engine/ports/fork.js';
import { DISKS_MAX, vmSpecSchema } from './vm-spec.js';
import { accel, dataSecurity, diskFormat, hostName, imageId } from './words.js';

export const forkShare: z.ZodType<ForkShare> = z.strictObject({ first: z.int().min(0), count: z.int().min(0) });

export const forkOrigin: z.ZodType<ForkOrigin> = z.strictObject({
  host: hostName,
  image: imageId,
  spec: vmSpecSchema,
  accel,
  qemuVersion: z.string().max(256),
  allocatedBytes: z.int().min(0),
  disks: z
    .array(z.strictObject({ id: z.string().max(64), access: z.enum(DISK_ACCESSES) }))
    .max(DISKS_MAX)
    .exactOptional(),
  dataSecurity: dataSecurity.exactOptional(),
});

export const imageDisks: z.ZodType<readonly ImageDisk[]> = z
  .array(z.strictObject({ id: z.string().max(64), path: z.string().startsWith('/').max(4096), format: diskFormat }))
  .max(DISKS_MAX);
