/**
 * Loads an image from a file, on the host that saved it or another one. What a file names is trusted only if a host of
 * the cluster has signed it, or an administrator says so. If a file is damaged, everything that was loaded from it is
 * removed.
 *
 * A file without disks is loaded only where the disks have the content of its moment. A file with disks brings them
 * along (brought-disks.ts).
 */
import { open, statfs } from 'node:fs/promises';
import { dirname } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import { describeForbidden, remedyFor } from '../../domain/policy.js';
import { forbiddenOnHost } from '../policy/policy.js';
import { BroughtDisks } from './brought-disks.js';
import type { ImageContext } from './context.js';
import { FILE_VERSIONS } from './file-format.js';
import { ImageFileReader } from './file-reader.js';
import { asNoSpace } from './file-save.js';
import { checkLayers, type DiskLayer, withFile } from './layers.js';
import type { ImageRecord } from './record.js';
import { sealImage, writerOf } from './start-check.js';

export interface LoadOptions {
  /** Takes the disks as they are, for a file of build 0.1.0, which does not say what they were. */
  readonly isAssumed?: boolean;
  /** Takes a file that no host of the cluster has signed, whatever it names. */
  readonly isTrusted?: boolean;
}

/**
 * Loads an image and returns its id. Throws CONFLICT if this host has the image already or somebody writes to a disk of
 * it, DISK_CHANGED if a disk has another content than at the image's moment, CORRUPT or SPEC_INVALID if the file is not
 * as `saveImage` has written it.
 */
export async function loadImage(context: ImageContext, path: string, options: LoadOptions = {}): Promise<string> {
  return withFile(path, async (file) => {
    const { images, vms } = context;
    const reader = new ImageFileReader(file);
    const { version, hasOrder, record: described, signer } = await reader.begin(context.signer);
    const { id } = described;
    if (signer === null && options.isTrusted !== true) await refuseUntrusted(context, described, path);
    context.log.info({ image: id, path, signer, isTrusted: options.isTrusted === true }, 'an image is loaded');
    const before = images.has(id) ? images.get(id) : null;
    if (before !== null && before.state !== 'unloaded') {
      throw new MigrationError('CONFLICT', `image ${id} is already on ${context.host}`);
    }
    const { machines, version: qemuVersion } = await vms.backend.installed();
    if (!machines.includes(described.spec.machine)) {
      throw new MigrationError('UNSUPPORTED', `QEMU ${qemuVersion} has no machine ${described.spec.machine}`);
    }
    const isBrought = version === FILE_VERSIONS.WITH_DISKS;
    const layers = await layersHere(context, described, { before, isBrought, ...options });
    const brought = isBrought ? new BroughtDisks(images.disksDirectory(id), described) : null;
    await checkRoom(context, described, (await file.stat()).size, brought);
    await images.create(
      {
        ...{ ...described, layers, overlays: before?.overlays ?? [] },
        ...(before?.saves === undefined ? {} : { saves: before.saves }),
        state: before === null ? 'capturing' : 'unloaded',
      },
      null,
    );
    try {
      await brought?.create();
      const order = hasOrder ? images.orders.path(id) : null;
      if (order !== null) await (await open(order, 'w', 0o600)).close();
      const deviceStateBytes = await reader.rest(described, {
        state: images.statePath(id),
        order,
        regions: (await images.regions(described)).map((region) => region.path),
        disks: brought?.files ?? [],
      });
      if (hasOrder) await images.orders.read(described);
      const disks = (await brought?.finish(vms.backend.diskFiles, images.get(id))) ?? {};
      await images.update(id, { ...disks, state: 'complete', deviceStateBytes });
    } catch (error) {
      await brought?.remove();
      if (before === null) await images.delete(id);
      else await images.unload(id, before);
      throw asNoSpace(error);
    }
    return id;
  });
}

/** Throws NOT_PERMITTED if the file names what this host does not allow strangers: nobody knows who has written it. */
async function refuseUntrusted(context: ImageContext, { spec, layers = [] }: ImageRecord, path: string): Promise<void> {
  const { vms, policy, host } = context;
  const behind = layers.flatMap(({ id, files }) =>
    files.map((file) => ({ id, path: file.path, format: 'raw' as const, isReadOnly: true })),
  );
  const named = { ...spec, disks: [...spec.disks, ...behind] };
  const forbidden = await forbiddenOnHost(named, policy, vms.backend.diskFiles);
  if (forbidden.length === 0) return;
  const what = `${path} is not signed by a host of this cluster, and names ${describeForbidden(forbidden)}`;
  throw new MigrationError('NOT_PERMITTED', what, {
    remedy: `if you trust whoever has written it, load it with --trust; or ${remedyFor(forbidden, host)}`,
    details: { forbidden },
  });
}

/** Returns the id of the image in the file. Throws as `loadImage` does. */
export async function imageIdIn(path: string): Promise<string> {
  return withFile(path, async (file) => (await new ImageFileReader(file).begin(null)).record.id);
}

/**
 * Returns the layers that the image starts on, with stamps of this host. The writable disks that the file brings are
 * not checked here.
 */
async function layersHere(
  context: ImageContext,
  described: ImageRecord,
  { before, isBrought, isAssumed = false }: LoadOptions & { before: ImageRecord | null; isBrought: boolean },
): Promise<readonly DiskLayer[]> {
  if (described.layers === undefined) {
    if (described.disks.length > 0 && !isAssumed) {
      throw new MigrationError('DISK_CHANGED', 'the file is of an older build: it does not say what its disks held', {
        remedy: 'if nobody has written to the disks since, load it with --disks assume',
      });
    }
    const layers = await sealImage(context, described);
    await refuseWriters(context, layers);
    return layers;
  }
  const isHere = ({ isReadOnly }: DiskLayer) => isReadOnly || !isBrought;
  const { layers, problem } = await checkLayers(withOwnStamps(described.layers, before).filter(isHere));
  if (problem !== null) {
    throw new MigrationError(
      problem.isMissing ? 'NOT_FOUND' : 'DISK_CHANGED',
      `the image cannot run: ${problem.reason}`,
      {
        remedy: problem.isReadOnly
          ? 'bring back that file as it was at the image’s moment'
          : 'bring back the disk of the image’s moment; a file saved with --with-disks needs none',
      },
    );
  }
  await refuseWriters(context, layers);
  return described.layers.map((layer) => layers.find(({ id }) => id === layer.id) ?? layer);
}

/** The stamps in a file count on another host, or never. Those of the unloaded image are our own. */
function withOwnStamps(layers: readonly DiskLayer[], before: ImageRecord | null): DiskLayer[] {
  const known = (before?.layers ?? []).flatMap(({ files }) => files);
  return layers.map((layer) => ({
    ...layer,
    files: layer.files.map((file) => {
      const own = known.find(({ path, digest }) => path === file.path && digest !== null && digest === file.digest);
      return { ...file, stamp: own?.stamp ?? null };
    }),
  }));
}

async function refuseWriters({ vms }: ImageContext, layers: readonly DiskLayer[]): Promise<void> {
  const writer = await writerOf(vms, layers);
  if (writer === null) return;
  throw new MigrationError('CONFLICT', `the image cannot run: ${writer.reason}`, {
    remedy: 'end the VM or the program that has the disk open',
  });
}

/** The lengths are upper bounds: zeros take no room. */
async function checkRoom(
  { images }: ImageContext,
  { id, spec }: ImageRecord,
  fileBytes: number,
  brought: BroughtDisks | null,
): Promise<void> {
  const memoryBytes = Math.min(fileBytes, spec.memory.sizeBytes);
  const freeBytes = await images.bytesFree();
  if (memoryBytes > freeBytes) {
    throw new MigrationError(
      'NO_SPACE',
      `image ${id} needs up to ${memoryBytes} bytes, ${freeBytes} are free for images`,
    );
  }
  if (brought === null) return;
  const folder = dirname(images.disksDirectory(id));
  const { bavail, bsize } = await statfs(folder);
  const diskBytes = Math.min(fileBytes, brought.sizeBytes);
  if (diskBytes <= bavail * bsize) return;
  throw new MigrationError(
    'NO_SPACE',
    `the disks of image ${id} need up to ${diskBytes} bytes in ${folder}, which has ${bavail * bsize}`,
  );
}
