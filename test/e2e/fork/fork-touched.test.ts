/**
 * What the first clones of an image have touched is kept with it, and read first by a host that joins later: real QEMU
 * guests, without daemons (test/hosts/agent-pair.ts).
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { decodeTouchOrder } from '../../../src/agent/image/touch-order.js';
import { CONSTANTS } from '../../../src/protocol/wire.js';
import { type AgentHost, AgentPair } from '../../hosts/agent-pair.js';
import { eventually } from '../../hosts/cluster.js';
import { forkOn, forkRequest } from '../../hosts/fork-host.js';

const FILL_MS = 60_000;

let pair: AgentPair;
beforeAll(async () => {
  pair = await AgentPair.start();
});
afterAll(() => pair.end());

test('the order of touches is saved and loaded with the image, and a later host reads them first', async () => {
  const { a, b } = pair;
  const spec = await pair.boot({ name: 'web', touchMiB: 32, restPercent: 50 });
  const { image, clones } = await forkOn(a, forkRequest('web', { cloneCount: 1 }));
  const orderOn = async ({ name }: AgentHost): Promise<Uint32Array | null> =>
    decodeTouchOrder(spec.memory, await readFile(join(pair.directory, name, 'images', `${image}.touched`)));
  const order = (await orderOn(a)) ?? new Uint32Array(0);
  // The load of the device state alone touches some.
  expect(order.length).toBeGreaterThan(3);
  expect(new Set(order).size).toBe(order.length);
  expect(a.agent.images.find(image).touchedClusters).toBe(order.length);

  await a.restart();
  expect(a.agent.images.find(image).touchedClusters).toBe(order.length);
  const file = join(pair.directory, 'touched.img');
  await a.agent.images.save(image, file);
  for (const { name } of clones) await a.vms.destroy(name);
  await a.agent.images.remove(image);
  expect((await a.agent.images.load(file)).touchedClusters).toBe(order.length);
  expect(await orderOn(a)).toEqual(order);

  // A host that gets the image and makes no clone: no page is asked for but those of the sweep.
  const request = forkRequest(null, { image, cloneCount: 0, share: { first: 0, count: 0 } });
  const { accel, qemuVersion } = a.vms.get('web');
  const origin = { host: 'A', image, spec, accel, qemuVersion, allocatedBytes: spec.memory.sizeBytes };
  await a.agent.forks.prepareClones(request);
  await b.agent.forks.prepareClones({ ...request, image: null, origin });
  await b.agent.forks.connectImage(request.fork, 'tcp');
  await a.agent.forks.sendForkState(request.fork, 'B');
  for (const { agent } of [a, b]) await agent.forks.loadClones(request.fork);
  for (const { agent } of [a, b]) await agent.forks.commitFork(request.fork);
  for (const { agent } of [a, b]) await agent.forks.runClones(request.fork);
  const { counters } = await eventually('the image is complete', FILL_MS, async () => {
    const progress = await b.agent.forks.forkProgress(request.fork);
    if (progress.state === 'failed') throw new Error(JSON.stringify(progress));
    return progress.state === 'complete' ? progress : undefined;
  });
  for (const { agent } of [b, a]) await agent.forks.finishFork(request.fork);
  // Bulk goes through the image once. So what it has read in this order, it has read before the rest.
  expect(counters.orderedBytes).toBeGreaterThan(0);
  expect(counters.orderedBytes).toBeLessThanOrEqual(order.length * CONSTANTS.TOUCH_CLUSTER_BYTES);
  expect(counters.orderedBytes).toBeLessThan(counters.prefetchBytes ?? 0);
  expect(await orderOn(b)).toEqual(order);
});
