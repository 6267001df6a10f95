/** Who reads an image of this host, and over what; with fakes of native and of the image. */
import { expect, test } from 'vitest';
import { failedImage, isFinal } from '../../../../src/agent/fork/pages/failed-image.js';
import { ImageServers } from '../../../../src/agent/fork/pages/image-servers.js';
import { MigrationError } from '../../../../src/domain/errors.js';

const IMAGE = '8'.repeat(16);
const WHOLE = { filling: null, isFixed: true };
const code = (expected: string) => expect.objectContaining({ code: expected });

function scene() {
  const open: string[] = [];
  let record: { readers?: readonly string[] } | null = {};
  const images = {
    has: () => record !== null,
    get: () => {
      if (record === null) throw new MigrationError('NOT_FOUND', 'no image');
      return record;
    },
    regions: async () => [],
    update: async (_: string, change: object) => void (record = { ...record, ...change }),
    replace: async (_: string, next: object) => void (record = next),
  };
  const native = {
    openSourceSession: async ({ provider, image }: { provider: string; image?: object }) => {
      const name = image === undefined ? provider : `${provider} of the capture`;
      open.push(name);
      const close = async () => void open.splice(open.indexOf(name), 1);
      return { keys: [], scan: () => undefined, close };
    },
  };
  const transports = {
    served: async (provider: string) => ({ provider, listener: {} }),
    registering: (_: string, work: () => Promise<unknown>) => work(),
    place: () => ({ host: 'h', port: 1 }),
  };
  const servers = new ImageServers({ host: 'A', images, native, transports, log: {} } as never);
  return { servers, open, readers: () => record?.readers ?? [], remove: () => void (record = null) };
}

test('a capture is served by TCP, and the complete image as it was asked for', async () => {
  const { servers, open } = scene();
  const capture = { filling: { seal: null } as never, isFixed: false };
  const first = await servers.serve(IMAGE, 'B', 'rdma', capture);
  expect(first.endpoint.transport).toBe('tcp');
  expect(await servers.serve(IMAGE, 'C', 'shm', capture)).toEqual(first);
  const second = await servers.serve(IMAGE, 'B', 'rdma', WHOLE);
  expect(second.endpoint.transport).toBe('rdma');
  await servers.endFilling(IMAGE);
  expect(open).toEqual(['rdma']);
  expect(await servers.serve(IMAGE, 'B', 'rdma', WHOLE)).toEqual(second);
});

test('a host is a reader until it says that it is none, and the last one ends the sessions', async () => {
  const { servers, open, readers } = scene();
  await Promise.all(['B', 'C', 'B'].map((reader) => servers.serve(IMAGE, reader, 'tcp', WHOLE)));
  expect(readers()).toEqual(['B', 'C']);
  await servers.end(IMAGE, 'B');
  await servers.end(IMAGE, 'B');
  expect([readers(), open]).toEqual([['C'], ['tcp']]);
  await servers.end(IMAGE, 'C');
  expect([readers(), open]).toEqual([[], []]);
  await servers.serve(IMAGE, 'B', 'tcp', WHOLE);
  expect([readers(), open]).toEqual([['B'], ['tcp']]);
});

test('many hosts that begin at once are all noted, and all must end', async () => {
  const { servers, open, readers } = scene();
  const names = Array.from({ length: 200 }, (_, index) => `host-${index}`);
  const holders = await Promise.all(names.map((reader) => servers.serve(IMAGE, reader, 'tcp', WHOLE)));
  expect(new Set(holders.map(({ session }) => session)).size).toBe(1);
  expect([...readers()].sort()).toEqual([...names].sort());
  await Promise.all(names.slice(1).map((reader) => servers.end(IMAGE, reader)));
  expect([readers(), open]).toEqual([['host-0'], ['tcp']]);
  await servers.end(IMAGE, 'host-0');
  expect([readers(), open]).toEqual([[], []]);
});

test('an image that is removed takes no reader meanwhile', async () => {
  const { servers, open, remove } = scene();
  await servers.serve(IMAGE, 'B', 'tcp', WHOLE);
  await servers.without(IMAGE, async () => {
    await expect(servers.serve(IMAGE, 'C', 'tcp', WHOLE)).rejects.toThrow(code('NOT_FOUND'));
    remove();
  });
  expect(open).toEqual([]);
  await expect(servers.serve(IMAGE, 'C', 'tcp', WHOLE)).rejects.toThrow(code('NOT_FOUND'));
  await servers.end(IMAGE, 'B');
});

test('nothing is served once all is closed: it would outlive the daemon', async () => {
  const { servers, open } = scene();
  await servers.serve(IMAGE, 'B', 'tcp', WHOLE);
  await servers.closeAll();
  await expect(servers.serve(IMAGE, 'B', 'tcp', WHOLE)).rejects.toMatchObject({
    code: 'UNREACHABLE',
    isRetryable: true,
  });
  expect(open).toEqual([]);
});

test('an image that has failed says so in a way that another host understands', () => {
  const there = MigrationError.fromJSON(failedImage(IMAGE, 'A').toJSON(), 'host A');
  expect([isFinal(there), isFinal(new MigrationError('CONFLICT', 'not complete'))]).toEqual([true, false]);
});
