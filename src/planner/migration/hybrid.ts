/** Checks for modes in which memory is fetched while the VM still runs on the source. Pure. */
import type { HostInventory, VmInventory } from '../../domain/host.js';
import { type MigrationRequest, tracksWrites } from '../../domain/migration.js';
import type { Refusal, RefusalCode } from '../../domain/refusal.js';

const REMEDY = 'use --postcopy';

/** The source must be able to note what the VM writes meanwhile. RAM that is no shared file is refused elsewhere. */
export function* checkTracking(
  { mode, vm: name }: MigrationRequest,
  source: HostInventory,
  { image, spec, escapingDevices = [], discardingDevices, directDisks = [] }: VmInventory,
): Iterable<Refusal> {
  if (!tracksWrites(mode)) return;
  if (image !== null) {
    yield refuse(
      'RAM_NOT_SHARED',
      `${name} runs on image ${image.id}: what it writes is in no file, and cannot be sent while it runs`,
      REMEDY,
    );
  }
  if (!spec.hasPreload) {
    yield refuse(
      'PRELOAD_MISSING',
      `${name} runs without the preload library, so nobody notes what it writes while its memory moves`,
      REMEDY,
    );
  }
  for (const device of escapingDevices) {
    yield refuse(
      'DEVICE_NOT_MIGRATABLE',
      `${device} lets processes other than QEMU write to the memory of ${name}, and nobody notes what they write`,
      "remove the device from the VM, or use QEMU's own migration (--native)",
    );
  }
  for (const device of discardingDevices) {
    yield refuse(
      'DEVICE_NOT_MIGRATABLE',
      `${device} lets ${name} free memory while it runs, and nobody notes that it has become zero`,
      `${REMEDY}, or remove the device from the VM`,
    );
  }
  for (const node of directDisks) {
    yield refuse(
      'DEVICE_NOT_MIGRATABLE',
      `block node ${node} of ${name} reads with cache.direct=on: the bytes come into memory when nobody notes them`,
      `${REMEDY}, or open the disk with cache.direct=off`,
    );
  }
  if (source.canTrackWrites !== true) {
    yield refuse(
      'WRITE_PROTECT_MISSING',
      `the kernel of ${source.host} cannot note which pages a VM writes while its memory moves`,
      `${REMEDY}, or install Linux 6.9 or newer on ${source.host}`,
    );
  }
}

/** A host of an earlier build would refuse the mode when the move has begun. */
export function* checkFetchAhead(
  { mode }: MigrationRequest,
  { host, canFetchAhead }: HostInventory,
): Iterable<Refusal> {
  if (!tracksWrites(mode) || canFetchAhead === true) return;
  yield refuse(
    'PROTOCOL_VERSION',
    `${host} has a build that cannot fetch memory while the VM still runs on its source`,
    `install the same vmigrate on ${host}, or ${REMEDY}`,
  );
}

function refuse(code: RefusalCode, reason: string, remedy: string): Refusal {
  return { code, reason, remedy };
}
