import { describe, expect, test } from 'vitest';
import { PageSession } from '../../../../src/agent/migration/page-session.js';

const FULL = { code: 4, errno: 28, what: 'region file system is full' };

/** A page session whose native part reports what the test sets, and the errors that were logged. */
function sessionWithLog() {
  const errors: string[] = [];
  let edge = (): void => undefined;
  const now = { state: 'filling', failure: null as typeof FULL | null, counters: { pagesPresent: 0n } };
  const handle = { snapshot: () => ({ ...now }), connect: async () => undefined, start: () => undefined };
  const native = {
    openTargetSession: (_: unknown, { onEdge }: { onEdge: () => void }) => {
      edge = onEdge;
      return { ...handle, close: async () => undefined };
    },
  };
  const log = { warn: () => undefined, debug: () => undefined, error: (_: object, text: string) => errors.push(text) };
  const vm = { memory: {}, regions: [], spec: { name: 'v', memory: { regions: [] } } };
  const session = new PageSession({ native, vms: {}, log } as never, vm as never, {
    ...{ session: 's', token: 't', bandwidthBytesPerS: 0, isResume: false },
    onComplete: () => undefined,
  });
  const fail = (failure: typeof FULL, pagesPresent: bigint): void => {
    Object.assign(now, { state: 'failed', failure, counters: { pagesPresent } });
    edge();
  };
  return { session, errors, fail };
}

test('a failure that each try meets again is logged once, and again after progress or for another reason', async () => {
  const { session, errors, fail } = sessionWithLog();
  for (let tries = 0; tries < 100; tries++) fail(FULL, 7n);
  expect(errors).toHaveLength(1);
  fail(FULL, 8n);
  expect(errors).toHaveLength(2);
  fail({ ...FULL, errno: 122 }, 8n);
  expect(errors).toHaveLength(3);
  await session.close();
});

/** A page session that is connected, whose native part is in the state that the test sets. */
async function connected() {
  const calls: string[] = [];
  let edge = (): void => undefined;
  const now = {
    state: 'idle',
    failure: null as typeof FULL | null,
    counters: { pageCount: 9n, pagesPresent: 5n, pagesZero: 4n },
  };
  const reach = (state: string, failure: typeof FULL | null = null): void => {
    Object.assign(now, { state, failure });
    edge();
  };
  const handle = {
    snapshot: () => ({ ...now }),
    connect: async () => void Object.assign(now, { state: 'idle' }),
    fetchAhead: () => {
      calls.push('fetchAhead');
      now.state = 'ahead';
    },
    holdAhead: () => void calls.push('holdAhead'),
    takeBack: async (round: number) => (calls.push(`takeBack ${round}`), { pages: round }),
    serveDemand: () => void calls.push('serveDemand'),
    close: async () => undefined,
  };
  const native = {
    openTargetSession: (_: unknown, { onEdge }: { onEdge: () => void }) => {
      edge = onEdge;
      return handle;
    },
  };
  const log = { warn: () => undefined, debug: () => undefined, error: () => undefined, info: () => undefined };
  const vm = { memory: {}, regions: [], spec: { name: 'v', memory: { regions: [] } } };
  const transports = {
    connecting: async (_: object, __: object, call: (source: object, ms: number) => Promise<void>) => call({}, 1000),
  };
  const session = new PageSession({ native, vms: {}, log, transports } as never, vm as never, {
    ...{ session: 's', token: 't', bandwidthBytesPerS: 0, isResume: false },
    onComplete: () => undefined,
  });
  const connect = () => session.connect({ transport: 'tcp', host: '10.0.0.1', port: 1, keys: [] });
  return { session, calls, reach, connect, now };
}

describe('pages that are fetched while the VM runs elsewhere', () => {
  test('are all here when the native session is idle again, and the next call begins anew', async () => {
    const { session, calls, reach, connect } = await connected();
    await connect();
    expect(await session.fetchAhead(1, false)).toEqual({ isDone: false, isHeld: false });
    const going = session.fetchAhead(10_000, false);
    reach('idle');
    expect(await going).toEqual({ isDone: true, isHeld: true });
    expect(calls).toEqual(['fetchAhead']);
    expect(await session.takeBack(1)).toEqual({ pages: 1 });
    const again = session.fetchAhead(10_000, false);
    reach('idle');
    expect(await again).toEqual({ isDone: true, isHeld: true });
    expect(calls).toEqual(['fetchAhead', 'takeBack 1', 'fetchAhead']);
    await session.close();
  });

  test('are held when the time is over, and may be taken back as soon as none is in flight', async () => {
    const { session, calls, reach, connect, now } = await connected();
    now.counters.pagesPresent = 3n;
    await connect();
    const held = session.fetchAhead(1, true);
    await expect.poll(() => calls).toEqual(['fetchAhead', 'holdAhead']);
    await expect(session.takeBack(1)).rejects.toMatchObject({ code: 'CONFLICT' });
    reach('idle');
    expect(await held).toEqual({ isDone: false, isHeld: true });
    await session.takeBack(1);
    const going = session.fetchAhead(10_000, true);
    now.counters.pagesPresent = 5n;
    reach('idle');
    expect(await going).toEqual({ isDone: true, isHeld: true });
    expect(calls).toEqual(['fetchAhead', 'holdAhead', 'takeBack 1', 'fetchAhead']);
    await session.close();
  });

  test('are held no more when they are asked for again', async () => {
    const { session, calls, reach, connect } = await connected();
    await connect();
    const held = session.fetchAhead(1, true);
    await expect.poll(() => calls).toEqual(['fetchAhead', 'holdAhead']);
    const going = session.fetchAhead(10_000, false);
    expect(calls).toEqual(['fetchAhead', 'holdAhead', 'fetchAhead']);
    reach('idle');
    expect([await held, await going]).toEqual(Array.from({ length: 2 }, () => ({ isDone: true, isHeld: true })));
    await session.close();
  });

  test('are fetched on over a new connection', async () => {
    const { session, calls, reach, connect } = await connected();
    await connect();
    const going = session.fetchAhead(10_000, false);
    reach('disconnected');
    await expect.poll(() => calls).toEqual(['fetchAhead', 'fetchAhead']);
    reach('idle');
    expect(await going).toEqual({ isDone: true, isHeld: true });
    await session.close();
  });

  test('are not fetched without a connection, nor taken back while they come or once faults are served', async () => {
    const { session, connect, reach } = await connected();
    const code = (expected: string) => expect.objectContaining({ code: expected });
    await expect(session.fetchAhead(1, false)).rejects.toEqual(code('DISCONNECTED'));
    await connect();
    await session.fetchAhead(1, false);
    await expect(session.takeBack(1)).rejects.toEqual(code('CONFLICT'));
    reach('idle');
    // The native session would let the daemon's main thread wait for the other call.
    const taking = session.takeBack(1);
    await expect(session.fetchAhead(1, false)).rejects.toEqual(code('CONFLICT'));
    await taking;
    session.serveDemand();
    await expect(session.takeBack(1)).rejects.toEqual(code('CONFLICT'));
    await expect(session.fetchAhead(1, false)).rejects.toEqual(code('CONFLICT'));
    await session.close();
  });

  test('are given up if the session fails or is closed', async () => {
    const failed = await connected();
    await failed.connect();
    const failing = expect(failed.session.fetchAhead(10_000, false)).rejects.toMatchObject({ code: 'NO_SPACE' });
    failed.reach('failed', FULL);
    await failing;
    const closed = await connected();
    await closed.connect();
    const closing = expect(closed.session.fetchAhead(10_000, false)).rejects.toMatchObject({ code: 'CONFLICT' });
    await closed.session.close();
    await closing;
    await failed.session.close();
  });
});
