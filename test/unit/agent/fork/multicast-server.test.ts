import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { MulticastServer } from '../../../../src/agent/fork/pages/multicast-server.js';

const IMAGE = '8'.repeat(16);

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

function scene(state = 'complete') {
  const record = { id: IMAGE, state, readers: ['B', 'C'] };
  const senders: { isStarted: boolean; isClosed: boolean; state: string; onEdge: () => void; group: unknown }[] = [];
  const warnings: string[] = [];
  const context = {
    ...{ host: 'A', dataAddress: '10.0.0.1' },
    rdma: { inventory: async (): Promise<object> => ({ address: '10.0.1.1', problem: null }) },
    clock: { sleep: (ms: number) => new Promise((resolve) => setTimeout(resolve, ms)) },
    multicast: { group: null, port: 7403, ttl: 1, bandwidthBytesPerS: 0 },
    images: { get: () => record, regions: async () => [], touchOrder: async () => new Uint32Array(0) },
    log: { info: () => undefined, error: () => undefined, warn: (_: object, text: string) => void warnings.push(text) },
    native: {
      openMulticastSender: async ({ onEdge, group }: { onEdge: () => void; group: unknown }) => {
        const sender = { isStarted: false, isClosed: false, state: 'waiting', onEdge, group };
        senders.push(sender);
        return {
          start: () => void (sender.isStarted = true),
          snapshot: () => ({ state: sender.state, failure: null, counters: { sentBytes: 5000n } }),
          close: async () => void (sender.isClosed = true),
        };
      },
    },
  };
  return { server: new MulticastServer(context as never), record, senders, warnings, context };
}

const seatOf = (offer: Awaited<ReturnType<MulticastServer['join']>>) => (offer.state === 'joined' ? offer.seat : null);

test('it begins when all readers are there, and each has a number of its own', async () => {
  const { server, senders } = scene();
  const first = seatOf(await server.join(IMAGE, 'B', 'udp', 1500));
  expect(senders[0]?.isStarted).toBe(false);
  const second = seatOf(await server.join(IMAGE, 'C', 'udp', 1500));
  expect(senders).toHaveLength(1);
  expect(senders[0]?.isStarted).toBe(true);
  expect(first?.member).not.toBe(second?.member);
  expect(first?.group).toEqual(second?.group);
  expect(first).toMatchObject({ group: { port: 7403, ttl: 1, mtuBytes: 1500 } });
  expect(first?.group.group).toMatch(/^239\.255\.\d+\.\d+$/);
  expect(senders[0]?.group).toMatchObject({ interfaceAddress: '10.0.0.1', key: first?.group.key });
});

test('what hosts that read by RDMA ask for is sent by the device that they read from', async () => {
  const { server, senders, context } = scene();
  const seat = seatOf(await server.join(IMAGE, 'B', 'verbs', 4148));
  expect(seat).toMatchObject({ group: { provider: 'verbs', mtuBytes: 4148 } });
  expect(senders[0]?.group).toMatchObject({ provider: 'verbs', interfaceAddress: '10.0.1.1' });
  context.rdma.inventory = async () => ({ address: null, problem: { reason: 'it has no RDMA device', remedy: '' } });
  await server.close(IMAGE);
  await expect(server.join(IMAGE, 'B', 'verbs', 4148)).rejects.toMatchObject({
    ...{ code: 'UNSUPPORTED', message: expect.stringContaining('no RDMA device') },
  });
  expect(seatOf(await server.join(IMAGE, 'B', 'udp', 0))).toMatchObject({ group: { provider: 'udp' } });
});

test('it does not wait long for a reader that does not come', async () => {
  const { server, senders } = scene();
  await server.join(IMAGE, 'B', 'udp', 0);
  await vi.advanceTimersByTimeAsync(1_000);
  expect(senders[0]?.isStarted).toBe(true);
});

test('a host waits while the image is copied, and a stranger gets no key', async () => {
  const { server, record, senders } = scene('filling');
  expect(await server.join(IMAGE, 'B', 'udp', 0)).toEqual({ state: 'wait' });
  record.state = 'failed';
  expect(await server.join(IMAGE, 'B', 'udp', 0)).toEqual({ state: 'over' });
  await expect(server.join(IMAGE, 'X', 'udp', 0)).rejects.toMatchObject({ code: 'CONFLICT' });
  expect(senders).toHaveLength(0);
});

test('a host that was in a multicast which is over reads the rest; another one begins a new multicast', async () => {
  const { server, senders } = scene();
  await server.join(IMAGE, 'B', 'udp', 0);
  await vi.advanceTimersByTimeAsync(1_000);
  senders[0]!.state = 'ended';
  senders[0]!.onEdge();
  expect(senders[0]?.isClosed).toBe(true);
  expect(await server.join(IMAGE, 'B', 'udp', 0)).toEqual({ state: 'over' });
  expect(await server.sent(IMAGE)).toEqual({ sentBytes: 5000 });
  expect(seatOf(await server.join(IMAGE, 'C', 'udp', 0))?.member).toBe(1);
  expect(senders).toHaveLength(2);
});

test('hosts that come at once begin one multicast, also after one that is over', async () => {
  const { server, senders } = scene();
  await server.join(IMAGE, 'X', 'udp', 0).catch(() => undefined);
  await Promise.all([server.join(IMAGE, 'B', 'udp', 0), server.join(IMAGE, 'C', 'udp', 0)]);
  expect(senders).toHaveLength(1);
  await server.forget(IMAGE, 'B');
  await server.forget(IMAGE, 'C');
  senders[0]!.state = 'ended';
  senders[0]!.onEdge();
  await Promise.all([server.join(IMAGE, 'B', 'udp', 0), server.join(IMAGE, 'C', 'udp', 0)]);
  expect(senders).toHaveLength(2);
});

test('a host that comes again gets another number, because a number is used once with a key', async () => {
  const { server } = scene();
  const first = seatOf(await server.join(IMAGE, 'B', 'udp', 0));
  const again = seatOf(await server.join(IMAGE, 'B', 'udp', 0));
  expect(again?.group.key).toBe(first?.group.key);
  expect(again?.member).not.toBe(first?.member);
});

test('closing the image ends its multicast', async () => {
  const { server, senders } = scene();
  await server.join(IMAGE, 'B', 'udp', 0);
  await server.close(IMAGE);
  await vi.advanceTimersByTimeAsync(1_000);
  expect(senders[0]).toMatchObject({ isClosed: true, isStarted: false });
  expect(await server.sent(IMAGE)).toEqual({ sentBytes: 5000 });
});
