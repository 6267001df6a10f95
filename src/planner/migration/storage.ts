/** Judges whether source and target of a move see the same files of the VM. */
import type { HostInventory } from '../../domain/host.js';
import type { MigrationRequest } from '../../domain/migration.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';
import { ASSUME, checkFile, type StorageFacts, sharesMarker } from '../compared-files.js';

export interface StorageQuestion {
  readonly request: MigrationRequest;
  readonly source: HostInventory;
  readonly target: HostInventory;
  readonly storage: StorageFacts;
  /** Files that another check has refused already. */
  readonly refusedPaths: ReadonlySet<string>;
}

export function* checkStorage({ request, source, target, storage, refusedPaths }: StorageQuestion): Iterable<Refusal> {
  if (request.sharedStorage === 'assume' || storage.kind === 'unasked') return;
  if (storage.kind === 'unsupported') {
    yield refuse(
      'STORAGE_NOT_PROVEN',
      `${target.host} has an older vmigrate, which cannot show that it sees the same disks as ${source.host}`,
      `upgrade vmigrate on ${target.host}, or use ${ASSUME} if both hosts do share the disks`,
    );
  } else if (storage.kind === 'failed') {
    yield refuse(
      'STORAGE_NOT_PROVEN',
      `the files of ${request.vm} cannot be compared between the hosts: ${storage.error.message}`,
      storage.error.remedy ?? `try again, or use ${ASSUME} if both hosts do share the disks`,
    );
  } else {
    for (const compared of storage.files) {
      if (refusedPaths.has(compared.file.path)) continue;
      const refusal = checkFile(compared, source, target);
      if (refusal !== null) yield refusal;
    }
  }
}

/** For the plan: what is known of the VM's files. */
export function storageNotes(request: MigrationRequest, storage: StorageFacts): string[] {
  if (request.sharedStorage === 'assume')
    return ['nobody has checked that both hosts see the same disks and files: --shared-storage assume'];
  if (storage.kind !== 'compared' || storage.files.length === 0) return [];
  const count = storage.files.length;
  const sampled = storage.files.filter((compared) => compared.source.isSampled && !sharesMarker(compared));
  return [
    `${request.target} sees the same ${count === 1 ? 'file' : `${count} files`} of ${request.vm} (disks, boot files)`,
    ...sampled.map(({ file }) => `${file.path} is read-only and long: only samples of its content were compared`),
  ];
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}
