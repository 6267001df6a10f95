/** Schemas of images. */
import { z } from 'zod';
import type { ImageView } from '../domain/image.js';
import { count, list, of, text } from './of.js';
import { hostName, imageId, imageState } from './words.js';

const PATH_MAX = 4096;

export const fileBody = z.strictObject({ path: z.string().min(1).max(PATH_MAX).startsWith('/', 'is not absolute') });

export const imageParams = z.strictObject({ id: imageId });

export const imageView = of<ImageView>(
  z.object({
    id: imageId,
    host: hostName,
    state: imageState,
    parent: text,
    createdAt: text,
    memoryBytes: count,
    allocatedBytes: count,
    pageBytes: count,
    deviceStateBytes: count,
    pagesTotal: count,
    pagesDone: count,
    disks: list(text),
    clones: list(text),
  }),
);
