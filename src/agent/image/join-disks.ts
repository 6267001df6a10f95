/** What a host that joins a fork checks of the disks of the image, which are files of another host. */
import { MigrationError } from '../../domain/errors.js';
import type { ForkOrigin, ImageDisk } from '../../engine/ports/fork.js';
import type { ImageContext } from './context.js';
import type { ImageRecord } from './record.js';

/** Throws UNSUPPORTED if this host cannot get at a disk of the image. */
export function refuseDisks({ images, host }: Pick<ImageContext, 'images' | 'host'>, origin: ForkOrigin): void {
  // What lies there is removed with this host's image.
  const own = `${images.disksDirectory(origin.image)}/`;
  for (const { id, path } of origin.spec.disks) {
    const access = accessTo(origin, id);
    if (access === 'served' || (access === 'shared' && !path.startsWith(own))) continue;
    throw new MigrationError('UNSUPPORTED', `${host} does not see disk ${id} (${path}) of ${origin.spec.name}`, {
      remedy: `put the disk on storage that ${origin.host} and ${host} both mount there`,
    });
  }
}

function accessTo({ disks = [] }: ForkOrigin, id: string) {
  return disks.find((disk) => disk.id === id)?.access;
}

/** Returns the member of the image's record that says which disks the other host serves. */
export function servedOf(origin: ForkOrigin | undefined): Pick<ImageRecord, 'served'> {
  if (origin === undefined) return {};
  const disks = origin.spec.disks.map(({ id }) => id).filter((id) => accessTo(origin, id) === 'served');
  return disks.length === 0 ? {} : { served: { host: origin.host, disks } };
}

/**
 * Throws CONFLICT if the image has other disks than this host was told. The parent may have changed its files since the
 * fork was planned, and an older file under the same path is the disk of another moment.
 */
export function refuseOtherDisks({ id, disks }: ImageRecord, told: readonly ImageDisk[] = []): void {
  const nameAll = (all: readonly ImageDisk[]) => all.map(({ id: disk, path, format }) => [disk, path, format]);
  if (JSON.stringify(nameAll(disks)) === JSON.stringify(nameAll(told))) return;
  throw new MigrationError('CONFLICT', `image ${id} has other disks than this fork was planned with`, {
    remedy: 'fork again',
  });
}
