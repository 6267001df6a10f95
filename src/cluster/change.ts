/** The lines of the logs of owner records: `owners.log`, and its copy in the memory directory. */
import { z } from 'zod';
import { parseKept } from '../kit/unknown-keys.js';

const id = z.string().regex(/^[0-9a-f]{32}$/);

export const ownerRecord = z.strictObject({
  vm: z.string().min(1).max(255),
  owner: z.string().min(1).max(255),
  epoch: z.int().min(1),
  session: id.nullable(),
  leaving: id.exactOptional(),
  incarnation: id.exactOptional(),
});
/**
 * `swap` replaces the record of a VM. `remove` ends it at `epoch`, which logs of earlier builds lack. The last line of
 * a VM counts.
 */
const change = z.discriminatedUnion('type', [
  z.strictObject({ type: z.literal('swap'), record: ownerRecord }),
  z.strictObject({ type: z.literal('remove'), vm: z.string().min(1), epoch: z.int().min(1).optional() }),
]);
export type OwnerChange = z.infer<typeof change>;

/** Decodes a line. Throws for anything else. */
export function decodeOwnerChange(json: unknown): OwnerChange {
  return parseKept(change, json);
}

export function vmOf(entry: OwnerChange): string {
  return entry.type === 'swap' ? entry.record.vm : entry.vm;
}

/** 0: a line of an earlier build, which does not say it. */
export function epochOf(entry: OwnerChange): number {
  return entry.type === 'swap' ? entry.record.epoch : (entry.epoch ?? 0);
}
