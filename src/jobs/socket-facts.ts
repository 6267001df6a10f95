/** Asks the target of a move on one machine whether it sees the socket that it would connect to. */
import type { HostInventory } from '../domain/host.js';
import type { InventoryPort } from '../engine/ports/inventory.js';

/** The file is no disk and has no marker, so no proof is under way. */
const NO_PROOF = '0'.repeat(32);

/**
 * Returns false if the target has another file under the path of the source's mark, or none. Undefined: one of the
 * hosts cannot tell. Never throws.
 */
export async function seesSocket(
  { socketMark }: Pick<HostInventory, 'socketMark'>,
  target: InventoryPort,
  bounded: <T>(work: Promise<T>, what: string) => Promise<T>,
): Promise<boolean | undefined> {
  if (socketMark === undefined) return undefined;
  const { path, inode } = socketMark;
  const file = { path, use: 'mark of the data socket', isWritable: true, format: null };
  const looking = bounded(target.viewStorage(NO_PROOF, [file]), 'asking whether the data socket is seen');
  const [view] = await looking.catch(() => []);
  return view === undefined ? undefined : view.problem === null && view.inode === inode;
}
