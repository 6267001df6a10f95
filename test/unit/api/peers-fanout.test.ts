/** The calls by which an image gets to many hosts: what their schemas let through. */
import { expect, test } from 'vitest';
import { HOST_CALLS } from '../../../src/api/peers/methods.js';
import type { FanoutPort } from '../../../src/engine/ports/fanout.js';
import { IMAGE } from '../planner/fork-facts.js';

const GROUP = {
  ...{ provider: 'udp', group: '239.255.1.2', port: 7403, ttl: 1, mtuBytes: 1500 },
  ...{ key: 'ab'.repeat(32), session: 'cd'.repeat(8) },
};
const SEAT = { group: GROUP, member: 3 };

const call = (name: keyof FanoutPort) => {
  const found = HOST_CALLS.find((line) => line.name === name);
  if (found === undefined) throw new Error(`no call ${name}`);
  return found;
};
const takes = (name: keyof FanoutPort, ...args: unknown[]) => call(name).args.safeParse(args).success;
const answers = (name: keyof FanoutPort, result: unknown) => call(name).result.safeParse(result).success;

test('a seat in a multicast', () => {
  expect(takes('joinMulticast', IMAGE, 'B', 'verbs', 1500)).toBe(true);
  expect(takes('joinMulticast', IMAGE, 'B', 'tcp', 1500)).toBe(false);
  expect(takes('joinMulticast', IMAGE, 'B', 'udp')).toBe(false);
  expect(answers('joinMulticast', { state: 'wait' })).toBe(true);
  expect(answers('joinMulticast', { state: 'joined', seat: SEAT })).toBe(true);
  expect(answers('joinMulticast', { state: 'joined' })).toBe(false);
  expect(answers('joinMulticast', { state: 'joined', seat: { ...SEAT, member: 0 } })).toBe(false);
});

test.each([
  ['a short key', { key: 'ab' }],
  ['no address', { group: 'example.org' }],
  ['another provider', { provider: 'tcp' }],
  ['no port', { port: 0 }],
  ['a size that no datagram has', { mtuBytes: 70_000 }],
])('a group with %s is refused', (_, change) => {
  expect(takes('hearMulticast', GROUP, 200)).toBe(true);
  expect(takes('hearMulticast', { ...GROUP, ...change }, 200)).toBe(false);
});

test('what a probe and round trips have found', () => {
  expect(answers('probeMulticast', [{ host: 'B', largestBytes: 0 }])).toBe(true);
  expect(answers('probeMulticast', [{ host: 'B', largestBytes: -1 }])).toBe(false);
  expect(answers('roundTrips', [{ host: 'B', us: null }])).toBe(true);
  expect(answers('roundTrips', [{ host: 'B', us: -1 }])).toBe(false);
});
