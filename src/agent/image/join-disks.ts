/** What a host that joins a fork checks of the disks of the image, which are files of another host. */
import { MigrationError } from '../../domain/errors.js';
import type { NamingSpec } from '../../domain/policy.js';
import type { DiskSpec } from '../../domain/vm.js';
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

/**
 * Throws CONFLICT if the image that is here came from a third host, which may have brought anything under its id. One
 * that was made here is what it is.
 */
export function refuseOtherOrigin({ id, from }: Pick<ImageRecord, 'id' | 'from'>, origin: string, host: string): void {
  if (from === undefined || from === origin) return;
  throw new MigrationError('CONFLICT', `${host} has image ${id} from ${from}, and not from ${origin}`, {
    remedy: `remove it there first: "vmctl image rm ${id}" on ${host}`,
  });
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
 * What the clones of another host's VM open here: not the disks that it serves. `brought`: the image, if it is here
 * already, which knows better than the other host which disks are served. The bridges count also if these clones
 * have no NICs, because users of this host may fork the image later.
 */
export function namedHere(origin: ForkOrigin, brought: Pick<ImageRecord, 'served'> | null): NamingSpec {
  const { spec } = origin;
  const { served } = brought ?? servedOf(origin);
  return { ...spec, disks: spec.disks.filter(({ id }) => served?.disks.includes(id) !== true) };
}

/** A disk as the other host names it. It may not say whether the disk is only read. */
type ToldDisk = ImageDisk & Partial<Pick<DiskSpec, 'isReadOnly'>>;

/**
 * Throws CONFLICT if the image has other disks than this host was told. The parent may have changed its files since the
 * fork was planned, and an older file under the same path is the disk of another moment.
 */
export function refuseOtherDisks({ id, spec, disks }: ImageRecord, told: readonly ToldDisk[] = []): void {
  const isSame = disks.every((disk, index) => {
    const other = told[index];
    const isReadOnly = spec.disks.find((each) => each.id === disk.id)?.isReadOnly;
    const isSameFile = other?.id === disk.id && other.path === disk.path && other.format === disk.format;
    return isSameFile && (other.isReadOnly ?? isReadOnly) === isReadOnly;
  });
  if (isSame && disks.length === told.length) return;
  throw new MigrationError('CONFLICT', `image ${id} has other disks than this fork was planned with`, {
    remedy: 'fork again',
  });
}
