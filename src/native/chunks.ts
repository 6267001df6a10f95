/** Checks the arguments of the calls that compare memory. */
import { MigrationError } from '../domain/errors.js';
import { CONSTANTS } from '../protocol/wire.js';
import { checkPages, checkPath } from './check.js';
import type { ArrivalTags, ChunkRequest } from './chunk-types.js';

const KEY = /^[0-9a-f]{64}$/;

export function checkChunkRequest({ key, region, first, count }: ChunkRequest): void {
  checkKey(key);
  checkPages(region, first, count);
  if (count <= CONSTANTS.MEMORY_CHUNKS_MAX) return;
  throw new MigrationError('USAGE', `native argument: at most ${CONSTANTS.MEMORY_CHUNKS_MAX} chunks in one call`);
}

export function checkTags({ key, paths }: ArrivalTags, regionCount: number): void {
  checkKey(key);
  for (const path of paths) checkPath(path, 'path of tags');
  if (paths.length === regionCount && new Set(paths).size === paths.length) return;
  throw new MigrationError('USAGE', 'native argument: tags must have a file for each region');
}

function checkKey(key: string): void {
  if (typeof key !== 'string' || !KEY.test(key))
    throw new MigrationError('USAGE', 'native argument: key must have 64 hex digits');
}
