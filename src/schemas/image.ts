/** Schemas of images. */
import { z } from 'zod';
import type { FlattenReport, ImageRemoval, ImageView, PruneReport } from '../domain/image.js';
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
    touchedClusters: count.optional(),
    pagesTotal: count,
    pagesDone: count,
    disks: list(text),
    clones: list(text),
    savedFiles: list(text).optional(),
    problem: text.optional(),
    readers: list(hostName).optional(),
    isChecked: z.boolean().optional(),
    served: z.object({ host: hostName, disks: list(text) }).optional(),
  }),
);

export const removeBody = z
  .strictObject({
    /** Merge the layers although a host that may need them cannot be asked. */
    force: z.boolean().default(false),
    /** Give up the files that the image was saved to without its disks. */
    dropSaved: z.boolean().default(false),
    /** Remove it on the other hosts too. */
    allHosts: z.boolean().default(false),
  })
  .nullish();

export const saveBody = fileBody.extend({
  /** Put the disks into the file too. */
  withDisks: z.boolean().default(false),
});

export const loadBody = fileBody.extend({
  /** Take the disks as they are, for a file of an older build, which does not say what they were. */
  assumeDisks: z.boolean().default(false),
  /** Take a file that no host of the cluster has signed, whatever it names. */
  trust: z.boolean().default(false),
});

export const pruneBody = z.strictObject({ dryRun: z.boolean().default(false) }).nullish();

const keptLayers = list(z.object({ path: text, reason: text }));

export const removalView = of<ImageRemoval>(
  z.object({ id: imageId, freedBytes: count, mergedDisks: list(text), keptLayers }),
);

export const pruneView = of<PruneReport>(
  z.object({
    removed: list(removalView),
    kept: list(z.object({ id: imageId, reason: text })),
    freedBytes: count,
  }),
);

export const flattenView = of<FlattenReport>(z.object({ vm: text, mergedDisks: list(text), keptLayers }));
