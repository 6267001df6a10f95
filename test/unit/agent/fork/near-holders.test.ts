import { setTimeout as sleep } from 'node:timers/promises';
import { expect, test, vi } from 'vitest';
import { NearHolders } from '../../../../src/agent/fork/pages/near-holders.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import { NATIVE_ERROR } from '../../../../src/protocol/wire.js';

const IMAGE = '8'.repeat(16);

interface Near {
  readonly id: number;
  readonly level: number;
  isConnected: boolean;
  bytes: bigint;
}

function scene(levels: readonly (readonly string[])[], strangers: readonly string[] = []) {
  const asked: string[] = [];
  const silent = new Set<string>();
  const nears = new Map<number, Near>();
  const place = { isComplete: false, hosts: new Map<number, string>() };
  const reader = {
    snapshot: () => ({ state: place.isComplete ? 'complete' : 'copying' }),
    nears: () => [...nears.values()],
    removeNear: (id: number) => void nears.delete(id),
    addNear: async ({ host }: { host: string }, { id, level }: { id: number; level: number }) => {
      if (silent.has(host)) throw new MigrationError('UNREACHABLE', 'no');
      nears.set(id, { id, level, isConnected: true, bytes: 0n });
      place.hosts.set(id, host);
    },
  };
  const holderOf = (host: string) => ({
    ...{ session: 's', token: 't', endpoint: { transport: 'tcp', host, port: 1, keys: [] } },
  });
  const context = {
    ...{ host: 'A', clock: { sleep: (ms: number) => sleep(ms) } },
    ...{ log: { debug: () => undefined, error: () => undefined } },
    peers: {
      isPeer: (host: string) => !strangers.includes(host),
      agent: (host: string) => ({
        fanout: {
          serveHeld: async (_image: string, self: string, transport: string) => {
            asked.push(`${host} ${self} ${transport}`);
            if (silent.has(host)) throw new MigrationError('CONFLICT', 'not yet');
            return holderOf(host);
          },
        },
      }),
    },
    transports: {
      connecting: async (endpoint: object, _: object, connect: (source: object, timeoutMs: number) => Promise<void>) =>
        connect(endpoint, 1),
    },
  };
  const holders = new NearHolders(context as never, {
    ...{ image: IMAGE, levels, origin: { transport: 'tcp' as const, raised: (holder) => holder } },
    reader: () => reader as never,
  });
  const of = (host: string) => [...nears.values()].find(({ id }) => place.hosts.get(id) === host);
  return { holders, asked, silent, nears, place, of };
}

test('it connects to all levels, and leaves out itself and hosts that are no peers', async () => {
  const { holders, asked, of } = scene(
    [
      ['B', 'A'],
      ['C', 'X'],
    ],
    ['X'],
  );
  await holders.start();
  await vi.waitFor(() => expect(asked).toHaveLength(2));
  expect(asked.sort()).toEqual(['B A tcp', 'C A tcp']);
  await vi.waitFor(() => expect([of('B')?.level, of('C')?.level]).toEqual([0, 1]));
});

test('a host that comes late is asked again, and its start does not wait longer than a second', async () => {
  const { holders, silent, of } = scene([['B']]);
  silent.add('B');
  await holders.start();
  expect(of('B')).toBeUndefined();
  silent.delete('B');
  await vi.waitFor(() => expect(of('B')?.isConnected).toBe(true), 5_000);
});

test('a connection that is lost is made again, and its bytes are counted on', async () => {
  const { holders, of } = scene([['B']]);
  await holders.start();
  Object.assign(of('B')!, { bytes: 100n, isConnected: false });
  await vi.waitFor(() => expect(of('B')).toMatchObject({ isConnected: true, bytes: 0n }), 5_000);
  of('B')!.bytes = 7n;
  expect(holders.bytes).toEqual({ B: 107 });
  holders.close();
  expect(holders.bytes).toEqual({ B: 107 });
});

test('a session that replaces the last one gets the connections too', async () => {
  const { holders, nears, of } = scene([['B'], ['C']]);
  await holders.start();
  await vi.waitFor(() => expect(nears.size).toBe(2));
  of('C')!.bytes = 5n;
  holders.forgetReader();
  nears.clear();
  await vi.waitFor(() => expect(nears.size).toBe(2), 5_000);
  expect(holders.bytes).toEqual({ C: 5 });
});

test('a host whose pages are wrong is not asked again', async () => {
  const { holders, asked, of } = scene([['B']]);
  await holders.start();
  const failure = { code: NATIVE_ERROR.DAMAGED, errno: 0, what: 'flipped' };
  Object.assign(of('B')!, { isConnected: false, failure });
  await vi.waitFor(() => expect(of('B')).toBeUndefined(), 5_000);
  await sleep(500);
  expect(asked).toHaveLength(1);
});

test('nobody is asked any more when all pages are here', async () => {
  const { holders, asked, silent, place } = scene([['B']]);
  silent.add('B');
  void holders.start();
  await vi.waitFor(() => expect(asked.length).toBeGreaterThan(1));
  place.isComplete = true;
  const count = asked.length;
  await sleep(500);
  expect(asked.length).toBeLessThanOrEqual(count + 1);
});
