import { describe, expect, test } from 'vitest';
import { type CaseOptions, caseOf } from '../../../bench/lib/scale/case.js';
import { EventQueue } from '../../../bench/lib/scale/events.js';
import { clusterOf, predict, quiet, SCALE_KINDS, type ScaleKind, simulate } from '../../../bench/lib/scale/model.js';
import { type Pacing, standInPacing } from '../../../bench/lib/scale/pacing.js';
import { randomOf } from '../../../bench/lib/scale/random.js';
import { FANOUTS } from '../../../src/domain/fanout.js';
import { fanoutSeconds } from '../../../src/planner/fanout/estimate.js';

const GIB = 2 ** 30;
const LINK = 1.25e9;
const ONCE_S = GIB / LINK;

function run(kind: ScaleKind, hosts: number, change: Partial<CaseOptions> = {}, pacing: Pacing = standInPacing) {
  const figures = simulate(kind, { ...quiet(GIB, LINK), ...clusterOf(hosts, 8, 4), ...change }, pacing);
  return { ...figures, images: figures.rootEgressBytes / GIB };
}

test('events come in the order of their times', () => {
  const random = randomOf(7);
  const queue = new EventQueue();
  const times = Array.from({ length: 3000 }, () => random());
  for (const [value, atS] of times.entries()) queue.push(atS, value);
  const order: number[] = [];
  while (queue.count > 0) {
    const { nextS } = queue;
    expect(times[queue.pop()]).toBe(nextS);
    order.push(nextS);
  }
  expect(order).toEqual(times.toSorted((a, b) => a - b));
  expect(queue.nextS).toBe(Infinity);
});

test('the same seed gives the same numbers', () => {
  const change = { loss: 0.01, stragglers: { share: 0.1, factor: 3 }, deaths: { share: 0.1, withinS: 1 } };
  for (const kind of SCALE_KINDS) expect(run(kind, 40, change)).toEqual(run(kind, 40, change));
  expect(run('unicast', 40, { ...change, seed: 2 })).not.toEqual(run('unicast', 40, change));
});

describe('a link', () => {
  test('carries what is sent over it in turn, each direction for itself', () => {
    const { network } = caseOf({ ...quiet(GIB, 100), ...clusterOf(3, 4, 1), oversubscription: 1 });
    expect(network.send(0, 1, 100, 0)).toBeCloseTo(1, 3);
    expect(network.send(0, 2, 100, 0)).toBeCloseTo(2, 3);
    expect(network.send(1, 0, 100, 0)).toBeCloseTo(1, 3);
    expect(network.send(3, 2, 100, 0)).toBeCloseTo(3, 3);
    expect(network.rootEgressBytes).toBe(200);
  });

  test('of a switch is shared by all hosts below it', () => {
    const { network } = caseOf({ ...quiet(GIB, 100), ...clusterOf(31, 16, 1), oversubscription: 4 });
    // Sixteen hosts share four links' worth. So the last of eight begins after seven quarters of a second.
    const ends = Array.from({ length: 8 }, (_, host) => network.send(host, 16 + host, 100, 0));
    expect(Math.max(...ends)).toBeCloseTo(2.75, 1);
  });
});

describe('the model', () => {
  test('unicast sends an image to each host, one after the other', () => {
    const { allS, images } = run('unicast', 30);
    expect(images).toBe(30);
    expect(allS).toBeGreaterThan(30 * ONCE_S);
    expect(allS).toBeLessThan(30 * ONCE_S * 1.05);
  });

  test('a tree sends as many images as hosts read from the root, and takes that much longer', () => {
    for (const degree of [1, 2, 4]) {
      const { allS, images } = run('tree', 100, { degree });
      expect(images).toBe(degree);
      expect(allS).toBeGreaterThan(degree * ONCE_S);
      expect(allS).toBeLessThan(degree * ONCE_S * 1.25 + (degree === 1 ? 100 * 0.01 : 0));
    }
  });

  test('multicast sends one image, at the pace that it is given', () => {
    const half: Pacing = { name: 'half', open: () => ({ report: () => undefined, rateBytesPerS: () => LINK / 2 }) };
    expect(run('multicast', 100).images).toBeCloseTo(1, 5);
    expect(run('multicast', 100, {}, half).allS).toBeCloseTo(2 * ONCE_S, 1);
  });

  test('what multicast loses comes from other hosts, not from the root', () => {
    const { allS, images } = run('multicast', 100, { loss: 0.01 });
    expect(allS).toBeGreaterThan(run('multicast', 100).allS);
    expect(images).toBeCloseTo(1, 2);
  });

  test('the pacing hears what each host has taken, and a slow host does not keep the others', () => {
    const heard = new Map<number, number>();
    const pacing: Pacing = {
      name: 'a listener',
      open: () => ({
        report: (member, { receivedBytes }) => heard.set(member, receivedBytes),
        rateBytesPerS: () => LINK * 0.9,
      }),
    };
    const { halfS, allS } = run('multicast', 20, { stragglers: { share: 0.2, factor: 10 } }, pacing);
    expect(heard.size).toBe(20);
    expect(Math.max(...heard.values())).toBeGreaterThan(0.95 * GIB);
    expect(Math.min(...heard.values())).toBeLessThan(0.2 * GIB);
    expect(halfS).toBeLessThan(1.3 * ONCE_S);
    expect(allS).toBeGreaterThan(9 * ONCE_S);
  });

  test('hosts below a relay that dies read on from the next one, and all that live become full', () => {
    const quietly = run('tree', 200);
    for (const kind of SCALE_KINDS) {
      const { allS, images } = run(kind, 200, { deaths: { share: 0.1, withinS: 1 } });
      expect(allS).toBeGreaterThan(0.9 * ONCE_S);
      if (kind === 'tree') expect(allS).toBeLessThan(4 * quietly.allS);
      if (kind !== 'unicast') expect(images).toBeLessThan(12);
    }
  });

  test('a tree of multicasts sends no more than a tree', () => {
    const { images, allS } = run('tree of multicasts', 100, { loss: 0.001 });
    expect(images).toBeLessThanOrEqual(2.1);
    expect(allS).toBeLessThan(4 * ONCE_S);
  });
});

test('what the planner expects is what the model shows, within a third and what setting up takes', () => {
  for (const kind of FANOUTS) {
    for (const hostCount of [2, 8, 100]) {
      const expected = fanoutSeconds(kind, { hostCount, imageBytes: GIB, linkBytesPerS: LINK });
      const shown = predict({ hosts: hostCount, imageBytes: GIB, linkBytesPerS: LINK, loss: 0, kind }).seconds;
      expect(Math.abs(expected - shown), `${kind} to ${hostCount}`).toBeLessThan(shown / 3 + 0.3);
    }
  }
});

test('small fan-outs are predicted by the bytes that must pass the root', () => {
  const question = { imageBytes: 256e6, linkBytesPerS: 100e6, loss: 0 };
  for (const hosts of [2, 4, 8]) {
    const unicast = predict({ ...question, hosts, kind: 'unicast' });
    expect(unicast.rootEgressBytes).toBeCloseTo(hosts * 256e6, -3);
    expect(unicast.seconds).toBeCloseTo(hosts * 2.56, 0);
    const multicast = predict({ ...question, hosts, kind: 'multicast' });
    expect(multicast.rootEgressBytes).toBeCloseTo(256e6, -3);
    expect(multicast.seconds).toBeLessThan(3);
    expect(predict({ ...question, hosts, kind: 'tree' }).rootEgressBytes).toBeCloseTo(2 * 256e6, -3);
  }
});
