/** Unix sockets in directories that somebody else may write to. */
import { once } from 'node:events';
import { closeSync, constants, fstatSync, openSync } from 'node:fs';
import { unlink } from 'node:fs/promises';
import { connect, type Server, Socket, type SocketConstructorOpts } from 'node:net';
import { isOutOfDescriptors } from './spare-descriptor.js';

/** Opens a name without what it stands for. Node has no name for it. */
const O_PATH = 0o10000000;

/**
 * Connects to the socket of that name. A symbolic link is refused: it could lead to a socket of somebody who takes this
 * process for a friend. An error comes as the socket's event, but that
 * this process may open no more files, which is thrown as net.connect does.
 */
export function connectUnix(path: string, options: Pick<SocketConstructorOpts, 'allowHalfOpen'> = {}): Socket {
  let descriptor: number;
  try {
    descriptor = openSync(path, O_PATH | constants.O_NOFOLLOW);
  } catch (error) {
    if (isOutOfDescriptors(error)) throw error;
    return new Socket(options).destroy(error as Error);
  }
  try {
    if (!fstatSync(descriptor).isSocket())
      return new Socket(options).destroy(Object.assign(new Error(`${path} is no socket`), { code: 'ENOTSOCK' }));
    // The name is looked up before the call returns.
    return connect({ path: `/proc/self/fd/${descriptor}`, ...options });
  } finally {
    closeSync(descriptor);
  }
}

/** Listens at the path, in the place of what was there. Whoever may enter the directory may connect. */
export async function listenUnix(server: Server, path: string): Promise<void> {
  await unlink(path).catch(() => undefined);
  server.listen({ path, readableAll: true, writableAll: true });
  await once(server, 'listening');
}
