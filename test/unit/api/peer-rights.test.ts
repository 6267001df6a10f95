/** What another host may call, for each kind of tie between it and the object of the call. */
import { describe, expect, test } from 'vitest';
import { HOST_CALLS } from '../../../src/api/peers/methods.js';
import {
  clonesOfOthers,
  refuseLogOf,
  refuseReaderOf,
  refuseStateOfOthers,
  refuseWithoutRight,
} from '../../../src/api/peers/peer-rights.js';

const SESSION = '1'.repeat(32);
const FORK = '2'.repeat(16);
const OWN_FORK = '3'.repeat(16);
const IMAGE = '4'.repeat(16);
const PRIVATE = '5'.repeat(16);
const UNKNOWN = '6'.repeat(16);

/** On host H: a session from B, a fork of B, a fork of its own that B has joined, an image that is shared with B. */
const ties = {
  sourceOf: (session: string) => (session === SESSION ? 'B' : null),
  rootOf: (fork: string) => ({ [FORK]: 'B', [OWN_FORK]: 'H' })[fork] ?? null,
  joinedOf: (fork: string) => ({ [FORK]: [], [OWN_FORK]: ['H', 'B'] })[fork] ?? null,
  hostsOf: (image: string) => ({ [IMAGE]: ['B'], [PRIVATE]: [] })[image] ?? null,
  imageOf: (vm: string) => ({ clone: IMAGE, ofPrivate: PRIVATE, own: null })[vm],
};

function code(caller: string, name: string, ...args: unknown[]): string {
  try {
    refuseWithoutRight({ caller, host: 'H', ties }, name, args);
    return 'ok';
  } catch (error) {
    return (error as { code: string }).code;
  }
}
const NO = 'NOT_PERMITTED';

test('no call of the coordinator to its own host is made by another one', () => {
  const calls = HOST_CALLS.filter(({ role }) => role === 'source').map(({ name }) => name);
  expect(calls.length).toBeGreaterThan(10);
  const others = ['vmInventory', 'offerStorage', 'endStorage', 'armParent', 'forkPoint', 'sendForkState', 'commitFork'];
  for (const name of [...calls, ...others, 'multicastSent', 'probeMulticast', 'madeUp'])
    expect(code('B', name, FORK, SESSION), name).toBe(NO);
});

describe('a session', () => {
  test('is prepared by its source only, and by nobody else again', () => {
    expect(code('B', 'prepare', { session: SESSION, source: 'B' })).toBe('ok');
    expect(code('C', 'prepare', { session: UNKNOWN, source: 'C' })).toBe('ok');
    expect(code('C', 'prepare', { session: UNKNOWN, source: 'B' })).toBe(NO);
    expect(code('C', 'prepare', { session: SESSION, source: 'C' })).toBe(NO);
  });

  test.each([
    ...['connect', 'fetchAhead', 'takeBack', 'awaitLoaded', 'resume', 'progress', 'reconnect', 'inherit'],
    ...['finish', 'discard'],
  ])('is open to %s of its source only', (name) => {
    expect(code('B', name, SESSION, 1)).toBe('ok');
    expect(code('C', name, SESSION, 1)).toBe(NO);
    expect(code('C', name, UNKNOWN, 1)).toBe('ok');
  });
});

describe('a fork', () => {
  const request = (host: string, fork = UNKNOWN, image = UNKNOWN) => ({ fork, vm: null, origin: { host, image } });

  test('is prepared by its root only, and not on an image that came from elsewhere', () => {
    expect(code('B', 'prepareClones', request('B', FORK, IMAGE))).toBe('ok');
    expect(code('C', 'prepareClones', request('C'))).toBe('ok');
    expect(code('C', 'prepareClones', request('B'))).toBe(NO);
    expect(code('C', 'prepareClones', request('C', FORK))).toBe(NO);
    expect(code('C', 'prepareClones', request('C', UNKNOWN, PRIVATE))).toBe(NO);
    expect(code('C', 'prepareClones', request('C', UNKNOWN, IMAGE))).toBe(NO);
    expect(code('B', 'prepareClones', { fork: UNKNOWN, vm: 'own' })).toBe(NO);
    // A fork that names a VM here would end it, or let it run on, when the daemon starts again.
    expect(code('B', 'prepareClones', { ...request('B'), vm: 'own' })).toBe(NO);
    expect(code('B', 'forkInventory', { vm: 'own' })).toBe(NO);
    expect(code('B', 'forkInventory', request('B'))).toBe('ok');
  });

  test.each(['connectImage', 'loadClones', 'runClones', 'forkProgress', 'finishFork', 'discardFork'])(
    'is open to %s of its root only',
    (name) => {
      expect(code('B', name, FORK)).toBe('ok');
      expect(code('C', name, FORK)).toBe(NO);
      expect(code('B', name, OWN_FORK)).toBe(NO);
      expect(code('C', name, UNKNOWN)).toBe('ok');
    },
  );

  test('is decided for those that have joined it', () => {
    expect(code('B', 'forkDecision', OWN_FORK)).toBe('ok');
    expect(code('C', 'forkDecision', OWN_FORK)).toBe(NO);
    expect(code('B', 'forkDecision', FORK)).toBe(NO);
    expect(code('C', 'forkDecision', UNKNOWN)).toBe('ok');
  });
});

describe('an image', () => {
  test.each(['serveImage', 'imageDigests', 'digestsHash', 'serveHeld', 'joinMulticast', 'touchOrder'])(
    'is open to %s of hosts that share it, each for itself',
    (name) => {
      expect(code('B', name, IMAGE, 'B')).toBe('ok');
      expect(code('B', name, IMAGE, 'C')).toBe(NO);
      expect(code('C', name, IMAGE, 'C')).toBe(NO);
      expect(code('B', name, PRIVATE, 'B')).toBe(NO);
      expect(code('B', name, UNKNOWN, 'B')).toBe('ok');
    },
  );

  test.each(['heldDigests', 'completeImage', 'removeImage'])('is open to %s of hosts that share it', (name) => {
    expect(code('B', name, IMAGE)).toBe('ok');
    expect(code('C', name, IMAGE)).toBe(NO);
    expect(code('B', name, PRIVATE)).toBe(NO);
  });

  test('is given back by whoever reads it', () => {
    expect(code('C', 'endImage', IMAGE, 'C')).toBe('ok');
    expect(code('C', 'endImage', IMAGE, 'B')).toBe(NO);
  });

  test('has clones that only those hosts may stop, and whose output only they read', () => {
    const call = (caller: string) => ({ caller, host: 'H', ties });
    const asked = ['clone', 'gone', 'own', 'ofPrivate'].map((name) => ({ name, uuid: 'u' }));
    const refused = (caller: string) => clonesOfOthers(call(caller), asked).map(({ name }) => name);
    expect(refused('B')).toEqual(['own', 'ofPrivate']);
    expect(refused('C')).toEqual(['clone', 'own', 'ofPrivate']);
    expect(() => refuseLogOf(call('B'), 'clone')).not.toThrow();
    expect(() => refuseLogOf(call('B'), 'gone')).not.toThrow();
    expect(() => refuseLogOf(call('C'), 'clone')).toThrow('share');
    expect(() => refuseReaderOf(call('B'), IMAGE)).not.toThrow();
    expect(() => refuseReaderOf(call('C'), IMAGE)).toThrow('share');
  });
});

test('device state comes from the source or the root only', () => {
  const call = (caller: string) => ({ caller, host: 'H', ties });
  for (const of of [{ session: SESSION }, { fork: FORK }]) {
    expect(() => refuseStateOfOthers(call('B'), of)).not.toThrow();
    expect(() => refuseStateOfOthers(call('C'), of)).toThrow(expect.objectContaining({ code: NO }));
  }
});
