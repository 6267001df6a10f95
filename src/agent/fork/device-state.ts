/** The device state of a fork on its way to a host that joins. It is a file on both hosts, named after the image. */
import { createReadStream, createWriteStream } from 'node:fs';
import { copyFile, rm, stat } from 'node:fs/promises';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { MigrationError } from '../../domain/errors.js';
import type { LoadClonesReply } from '../../engine/ports/fork.js';
import type { ForkContext } from './context.js';

/** Most states fit: few reads, in the time in which all clones wait for the state. */
const READ_BYTES = 2 ** 20;

/** Sends the state to the host. Its clones have loaded it when this resolves. */
export async function sendDeviceState(
  { images, peers, host: self }: ForkContext,
  fork: string,
  image: string,
  host: string,
): Promise<LoadClonesReply> {
  if (host === self) throw new MigrationError('USAGE', `${host} has the device state already`);
  if (images.get(image).deviceStateBytes === 0) {
    throw new MigrationError('CONFLICT', `image ${image} has no device state yet`);
  }
  return peers.sendForkState(host, fork, createReadStream(images.statePath(image), { highWaterMark: READ_BYTES }));
}

/**
 * Writes the state to the file that the waiting QEMUs have opened, when all of it is here. Returns its length. The
 * state of an image that is complete on this host stays as it is.
 */
export async function acceptDeviceState({ images }: ForkContext, image: string, stream: Readable): Promise<number> {
  const path = images.statePath(image);
  const arriving = `${path}.arriving`;
  try {
    await pipeline(stream, createWriteStream(arriving));
    const { state, deviceStateBytes } = images.get(image);
    if (state === 'complete') return deviceStateBytes;
    await copyFile(arriving, path);
  } finally {
    await rm(arriving, { force: true });
  }
  const { size } = await stat(path);
  await images.update(image, { deviceStateBytes: size });
  return size;
}
