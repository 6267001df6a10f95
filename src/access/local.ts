/** Who is at the other end of the daemon's unix socket: the kernel knows the uid of the process that has connected. */
import type { Socket } from 'node:net';
import type { Caller, UserRole } from '../domain/caller.js';
import { MigrationError } from '../domain/errors.js';

const ROOT = 0;

/**
 * Root and the daemon's own user are administrators. All others can only connect if the socket belongs to a group of
 * theirs, and have the role of that group. Throws UNAUTHENTICATED if the connection is over already.
 */
export function localCaller(socket: Socket, peerUser: (descriptor: number) => number, groupRole: UserRole): Caller {
  const from = 'unix socket';
  // Node has no public name for the descriptor of a socket.
  const { fd = -1 } = (socket as { _handle?: { fd?: number } })._handle ?? {};
  if (fd < 0) throw new MigrationError('UNAUTHENTICATED', 'the connection is over');
  const uid = peerUser(fd);
  const isAdmin = uid === ROOT || uid === process.geteuid?.();
  return { name: `local/${uid}`, role: isAdmin ? 'admin' : groupRole, from };
}
