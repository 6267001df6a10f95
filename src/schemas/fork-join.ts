/** What a host that joins a fork gets: its share of the clones, and the image of another host. */
import { z } from 'zod';
import type { ForkShare } from '../domain/fork.js';
import type { ForkOrigin } from '../engine/ports/fork.js';
import { vmSpecSchema } from './vm-spec.js';
import { accel, hostName, imageId } from './words.js';

export const forkShare: z.ZodType<ForkShare> = z.strictObject({ first: z.int().min(0), count: z.int().min(0) });

export const forkOrigin: z.ZodType<ForkOrigin> = z.strictObject({
  host: hostName,
  image: imageId,
  spec: vmSpecSchema,
  accel,
  qemuVersion: z.string().max(256),
  allocatedBytes: z.int().min(0),
});
