/** The device state of a fork on its way to a host that joins. It is a file on both hosts, named after the image. */
import { createReadStream, createWriteStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { MigrationError } from '../../domain/errors.js';
import type { ForkContext } from './context.js';

/** Sends the state to the host. It has accepted all of it when this resolves. */
export async function sendDeviceState(
  { images, peers }: ForkContext,
  fork: string,
  image: string,
  host: string,
): Promise<void> {
  if (images.get(image).deviceStateBytes === 0) {
    throw new MigrationError('CONFLICT', `image ${image} has no device state yet`);
  }
  await peers.sendForkState(host, fork, createReadStream(images.statePath(image)));
}

/** Writes the state to the file that the waiting QEMUs have opened. Returns its length. 0 stays recorded until then. */
export async function acceptDeviceState({ images }: ForkContext, image: string, stream: Readable): Promise<number> {
  const path = images.statePath(image);
  if (images.get(image).deviceStateBytes !== 0) await images.update(image, { deviceStateBytes: 0 });
  await pipeline(stream, createWriteStream(path));
  const { size } = await stat(path);
  await images.update(image, { deviceStateBytes: size });
  return size;
}
