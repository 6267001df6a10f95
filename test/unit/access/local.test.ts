import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { groupId } from '../../../src/access/group.js';
import { localCaller } from '../../../src/access/local.js';
import { loadNativeBinding } from '../../../src/native/binding.js';

test('a process on the unix socket is known by the uid that the kernel says', async () => {
  const directory = await mkdtemp(join(tmpdir(), 'vmg-local-'));
  const server = createServer();
  server.listen(join(directory, 'sock'));
  await once(server, 'listening');
  const client = connect(join(directory, 'sock'));
  const [socket] = (await once(server, 'connection')) as [Socket];
  const native = loadNativeBinding();
  const peerUser = (descriptor: number) => native.peerUser(descriptor);
  const uid = process.getuid?.() ?? 0;
  expect(localCaller(socket, peerUser, 'viewer')).toEqual({
    ...{ name: `local/${uid}`, role: 'admin', from: 'unix socket' },
  });
  // Another user gets what the group of the socket has.
  expect(localCaller(socket, () => 65_534, 'operator')).toMatchObject({ name: 'local/65534', role: 'operator' });
  client.destroy();
  socket.destroy();
  await once(socket, 'close');
  expect(() => localCaller(socket, peerUser, 'viewer')).toThrow(expect.objectContaining({ code: 'UNAUTHENTICATED' }));
  server.close();
  await rm(directory, { recursive: true });
});

test('a group is found by its name or number', async () => {
  expect(await groupId('root')).toBe(0);
  expect(await groupId('4711')).toBe(4711);
  await expect(groupId('no-such-group-here')).rejects.toMatchObject({ code: 'SPEC_INVALID' });
});
