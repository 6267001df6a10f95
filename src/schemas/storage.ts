/** Schemas of the files that a move compares between two hosts. */
import { z } from 'zod';
import { type FileView, SHARED_STORAGES, type StorageFile, type StorageOffer } from '../domain/storage.js';
import { count, list, of, text } from './of.js';
import { diskFormat, sessionId } from './words.js';

export const sharedStorage = z.enum(SHARED_STORAGES);

/** A proof has the form of a session id. */
export const proofId = sessionId;

export const storageFile = of<StorageFile>(
  z.object({
    path: text.regex(/^\//, 'must be an absolute path'),
    use: text,
    isWritable: z.boolean(),
    format: diskFormat.nullable(),
  }),
);

export const fileView = of<FileView>(
  z.object({
    path: text,
    problem: text.nullable(),
    kind: z.enum(['file', 'block']),
    sizeBytes: count,
    realName: text,
    isMountPoint: z.boolean(),
    inode: text,
    deviceId: text.nullable(),
    marker: text.nullable(),
    markerProblem: text.nullable(),
    digest: text.nullable(),
    isSampled: z.boolean(),
    chain: list(z.object({ path: text, format: text, virtualSizeBytes: count })),
  }),
);

export const storageOffer = of<StorageOffer>(
  z.object({ proof: proofId, files: list(storageFile), views: list(fileView) }),
);
