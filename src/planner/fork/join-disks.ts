/** Decides how a host that joins a fork gets at the disks, or why it cannot. Pure. */
import type { ForkRequest } from '../../domain/fork.js';
import type { ForkInventory, HostInventory } from '../../domain/host.js';
import type { ImageView } from '../../domain/image.js';
import type { Refusal } from '../../domain/refusal.js';
import type { VmSpec } from '../../domain/vm.js';
import type { StorageFacts } from '../compared-files.js';
import { type JoinDisk, type JoinStorage, joinStorage } from './join-storage.js';

export interface JoiningHost {
  readonly host: string;
  readonly inventory: HostInventory;
  readonly fork: ForkInventory;
  /** The parent's files. */
  readonly storage: StorageFacts;
}

/** `ofRoot`: what the root, which has the parent or image, says of the fork. */
export function joinDisks(
  request: ForkRequest,
  root: HostInventory,
  ofRoot: ForkInventory,
  joining: JoiningHost,
): JoinStorage {
  const { spec } = ofRoot.vm;
  const { host, fork } = joining;
  if (spec.disks.length === 0) return { disks: [], refusals: [] };
  // Its clones read the disks as the image there says. That host checks them before it makes a clone.
  if (fork.image?.state === 'complete') return { disks: disksThere(spec, fork.image), refusals: [] };
  const { disks, refusals } = storageOf(request, root, ofRoot, joining);
  const { servingProblem = null } = ofRoot;
  if (servingProblem === null) return { disks, refusals };
  const unserved = disks.flatMap(({ id, reason }): Refusal[] => {
    if (reason === null) return [];
    const what = `disk ${id} of ${spec.name} is not shared with ${host}, and ${root.host} cannot serve it`;
    const remedy = `share it, or leave ${host} out`;
    return [{ code: 'DISK_NOT_SHARED', reason: `${what}, because ${servingProblem}: ${reason}`, remedy }];
  });
  return unserved.length === 0 ? { disks, refusals } : { disks: [], refusals: [...refusals, ...unserved] };
}

/** Says of each disk that the root serves why it does. */
export function notesOfDisks(root: string, host: string, disks: readonly JoinDisk[]): string[] {
  return disks.flatMap(({ id, reason }) =>
    reason === null ? [] : [`disk ${id} is served by ${root} to ${host}, because ${reason}`],
  );
}

function disksThere({ disks }: VmSpec, { served }: ImageView): JoinDisk[] {
  return disks.map(({ id }) => ({
    id,
    access: served?.disks.includes(id) === true ? 'served' : 'shared',
    reason: null,
  }));
}

function storageOf(
  { vm, sharedStorage }: ForkRequest,
  root: HostInventory,
  { vm: { spec }, argumentFiles = [] }: ForkInventory,
  { host, inventory, storage }: JoiningHost,
): JoinStorage {
  const isSharingAssumed = sharedStorage === 'assume';
  if (vm !== null || isSharingAssumed)
    return joinStorage({ spec, root, joining: inventory, storage, isSharingAssumed });
  // An image has no VM whose files hosts could compare. The root has checked its disks, and can serve them anywhere.
  const refusals = argumentFiles.map((path): Refusal => {
    const reason = `nothing proves that ${path}, which an argument of ${spec.name} names, is the same file on ${host}`;
    const remedy = `use "--shared-storage assume" if ${root.host} and ${host} share all files, or leave ${host} out`;
    return { code: 'STORAGE_NOT_PROVEN', reason, remedy };
  });
  const reason = 'the hosts compare only the files of a running VM';
  const disks = spec.disks.map(({ id }): JoinDisk => ({ id, access: 'served', reason }));
  return { disks: refusals.length === 0 ? disks : [], refusals };
}
