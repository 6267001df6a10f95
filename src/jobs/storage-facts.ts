/** Lets two hosts compare the files of a VM. The source's markers are removed however it ends. */
import { toMigrationError } from '../domain/errors.js';
import type { InventoryPort } from '../engine/ports/inventory.js';
import type { StorageFacts } from '../planner/migration/facts.js';

export interface StorageSources {
  readonly vm: string;
  readonly source: InventoryPort;
  readonly target: InventoryPort;
  readonly targetHost: string;
  /** Gives a call a deadline. */
  readonly bounded: <T>(work: Promise<T>, what: string) => Promise<T>;
}

/** Never throws. */
export async function compareStorage({
  vm,
  source,
  target,
  targetHost,
  bounded,
}: StorageSources): Promise<StorageFacts> {
  let proof: string | null = null;
  try {
    const offer = await bounded(source.offerStorage(vm), `examining the files of ${vm}`);
    proof = offer.proof;
    const { files } = offer;
    if (files.length === 0) return { kind: 'compared', files: [] };
    const views = await bounded(target.viewStorage(proof, files), `asking ${targetHost} about the files of ${vm}`);
    return {
      kind: 'compared',
      files: files.map((file, index) => {
        const [own, other] = [offer.views[index], views[index]];
        if (own?.path !== file.path || other?.path !== file.path)
          throw new Error(`${targetHost} has not answered for ${file.path}`);
        return { file, source: own, target: other };
      }),
    };
  } catch (thrown) {
    const error = toMigrationError(thrown, 'PEER_PROTOCOL');
    // A daemon of an earlier build does not have the call.
    return proof !== null && error.code === 'NOT_FOUND' ? { kind: 'unsupported' } : { kind: 'failed', error };
  } finally {
    if (proof !== null) await source.endStorage(proof).catch(() => undefined);
  }
}
