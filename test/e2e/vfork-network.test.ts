/** Forks of a guest with network peers. From outside each clone has another address, or none. */
import { afterAll, afterEach, beforeAll, expect, test } from 'vitest';
import type { ForkReport } from '../../src/domain/fork.js';
import type { VmView } from '../../src/domain/vm.js';
import { answering, answersAt } from '../hosts/arping.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

const SETTLE_MS = 120_000;
const CLONES = 2;
const MANY_CLONES = 16;
/** Clone number N takes the address N + 1 after its parent's (guest/init). */
const addresses = Array.from({ length: MANY_CLONES + 1 }, (_, index) => `10.84.0.${10 + index}`);

let cluster: Cluster;
let parent: Guest;

beforeAll(async () => {
  cluster = await Cluster.create({ hosts: ['A'], hasGuestNetwork: true });
  const options = { memoryMiB: 128, touchMiB: 16, restPercent: 75 };
  parent = await Guest.start(cluster, 'A', { name: 'net', ...options, address: addresses[0] ?? '' });
}, 200_000);
afterEach(async () => {
  for (const { name, image } of await ps()) if (image !== null) await cluster.vmctl('A', 'stop', name, '--force');
});
afterAll(() => cluster?.destroy());

const ps = (): Promise<VmView[]> => cluster.json('A', 'vmctl', 'ps');

function fork(network: string, count = CLONES): Promise<ForkReport> {
  return cluster.json('A', 'vfork', parent.name, '--clones', `${count}`, '--network', network);
}

async function settled(): Promise<void> {
  await eventually('the clones have their network', SETTLE_MS, async () =>
    (await ps()).every(({ identityIssue }) => identityIssue === null) ? true : undefined,
  );
}

async function parentMac(): Promise<string> {
  const [mac = ''] = await answersAt(cluster, addresses[0] ?? '');
  return mac;
}

test('fresh: parent and clones have their own addresses, though the daemon was killed before', async () => {
  const before = await parentMac();
  const report = await fork('fresh');
  await cluster.stopDaemon('A');
  await cluster.startDaemon('A');
  await settled();
  const macs = report.clones.map(({ mac }) => mac);
  expect(new Set([before, ...macs]).size).toBe(CLONES + 1);
  for (const [index, mac] of [before, ...macs].entries()) {
    expect(await answersAt(cluster, addresses[index] ?? '')).toEqual([mac]);
  }
  await parent.expectProgress('A');
});

/** Returns the port of the host's bridge at which each guest was heard. */
async function learned(): Promise<{ mac: string; ifname: string }[]> {
  const { namespace } = cluster.host('A');
  const { stdout } = await cluster.inNamespace(namespace, 'bridge', '-json', 'fdb', 'show', 'br', 'br-guest');
  const entries = JSON.parse(stdout) as { mac: string; ifname: string; state?: string }[];
  return entries.filter(({ state }) => state !== 'permanent' && state !== 'static');
}

test('fresh, many clones: each answers at its own address and port, the parent only at its own', async () => {
  const before = await parentMac();
  const { clones } = await fork('fresh', MANY_CLONES);
  await settled();
  const macs = [before, ...clones.map(({ mac }) => mac ?? '')];
  expect(new Set(macs).size).toBe(MANY_CLONES + 1);
  const answers = await Promise.all(addresses.map((address) => answersAt(cluster, address)));
  expect(answers).toEqual(macs.map((mac) => [mac]));
  const ports = await learned();
  const portOf = (mac: string) => ports.filter((port) => port.mac === mac).map(({ ifname }) => ifname);
  for (const mac of macs) expect(portOf(mac)).toHaveLength(1);
  expect(new Set(macs.flatMap(portOf)).size).toBe(MANY_CLONES + 1);
});

test('isolated: nobody hears the clones, which keep the addresses of their parent', async () => {
  const before = await parentMac();
  const report = await fork('isolated');
  await settled();
  for (const { mac, name } of report.clones) {
    expect(mac).toBe(before);
    await new Guest(cluster, name).expectProgress('A');
  }
  expect(await answersAt(cluster, addresses[0] ?? '')).toEqual([before]);
  expect(await answering(cluster, addresses[1] ?? '')).toEqual([]);
  await parent.expectProgress('A');
});

test('none: nobody hears the clones', async () => {
  const before = await parentMac();
  const report = await fork('none');
  for (const { name } of report.clones) await new Guest(cluster, name).expectProgress('A');
  expect(await answersAt(cluster, addresses[0] ?? '')).toEqual([before]);
  expect(await answering(cluster, addresses[1] ?? '')).toEqual([]);
});
