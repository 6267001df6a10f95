/** The owner records that the memory directory has kept since this boot (cluster/mirror.ts). */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { memoryDirectoryInUse } from '../agent/memory/mark.js';
import { decodeOwnerChange } from '../cluster/file.js';
import { decodePieces } from '../durable/frames.js';
import { OWNERS_MIRROR } from '../durable/state-format.js';
import type { OwnerRecord } from '../engine/ports/registry.js';

/** Returns none if the memory directory is of an earlier boot or cannot be read, or if its copy is damaged. */
export async function mirroredOwners(directory: string): Promise<readonly OwnerRecord[]> {
  const bootId = (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
  const ramDir = await memoryDirectoryInUse({ stateDir: directory, bootId }).catch(() => null);
  if (ramDir === null) return [];
  const path = join(ramDir, OWNERS_MIRROR);
  const bytes = await readFile(path).catch(() => Buffer.alloc(0));
  const owners = new Map<string, OwnerRecord>();
  for (const piece of decodePieces(bytes, decodeOwnerChange, path)) {
    if (piece.kind === 'damaged') return [];
    if (piece.kind === 'torn') continue;
    if (piece.record.type === 'swap') owners.set(piece.record.record.vm, piece.record.record);
    else owners.delete(piece.record.vm);
  }
  return [...owners.values()];
}
