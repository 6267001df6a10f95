/**
 * A tree of multicasts: in each rack a relay reads the image along the tree of relays, and sends each chunk once to its
 * rack. The root does that for its own rack. Hosts repair as after any multicast.
 */
import { relayTree } from '../../../src/planner/fanout/relay-tree.js';
import { racksOf, scopesOf } from '../../../src/planner/fanout/scopes.js';
import { type Case, CHUNKS, type Outcome } from './case.js';
import { lostPages } from './multicast.js';
import { simulateReads } from './reads.js';
import { Repair } from './repair.js';

/** A group whose sender is lost is silent for so long before its hosts read from others. */
const SILENT_S = 1;

export function simulateRackMulticast(world: Case): Outcome {
  const { hosts, topology, network, chunkBytes, linkBytesPerS, loss, degree, dying } = world;
  const indexOf = new Map(hosts.map((host, index) => [host, index]));
  const racks = racksOf(scopesOf(topology, hosts)).map((rack) => rack.hosts.map((host) => indexOf.get(host) ?? 0));
  const membersOf = new Map<number, readonly number[]>();
  for (const rack of racks) {
    const relay = rack.includes(0) ? 0 : (rack[0] ?? 0);
    membersOf.set(
      relay,
      rack.filter((host) => host !== relay),
    );
  }
  const relays = [...membersOf.keys()].filter((relay) => relay !== 0);
  const names = relays.map((relay) => hosts[relay] ?? '');
  // One of the copies that a relay sends goes to its rack. A chain of many relays would be slower than another copy,
  // because each of them holds its last chunk for a while.
  const own = relays.length < CHUNKS / 2 ? Math.max(1, degree - 1) : degree;
  const tree = relayTree({ topology, root: hosts[0] ?? '', hosts: names, degree: own });
  const chains = new Map(
    [...tree.chains].map(([host, chain]) => [indexOf.get(host) ?? 0, chain.map((name) => indexOf.get(name) ?? 0)]),
  );

  const repair = new Repair(world);
  const lastS = hosts.map(() => 0);
  const sentChunks = hosts.map(() => 0);
  const deadAtS = new Map(dying.map(({ host, atS }) => [host, atS]));
  const sendToRack = (relay: number, chunk: number, atS: number): void => {
    const members = membersOf.get(relay) ?? [];
    if (members.length === 0) return;
    const sentS = network.sendToRack(relay, chunkBytes, atS);
    sentChunks[relay] = (sentChunks[relay] ?? 0) + 1;
    for (const host of members) {
      const drain = network.bytesPerSTo(host);
      const lost = lostPages(1 - (1 - loss) * Math.min(1, drain / linkBytesPerS));
      if (lost > 0) repair.lose(host, chunk, chunk + 1, lost);
      lastS[host] = sentS;
    }
  };
  // The root sends to its rack as fast as its first reader reads. Without one there is only this rack.
  const first = relays.find((relay) => chains.get(relay)?.length === 0);
  if (first === undefined) for (let chunk = 0; chunk < CHUNKS; chunk++) sendToRack(0, chunk, 0);
  const outcome = simulateReads(world, {
    readers: relays,
    parents: (relay) => chains.get(relay) ?? [],
    onChunk: (relay, chunk, atS) => {
      if (relay === first) sendToRack(0, chunk, atS);
      sendToRack(relay, chunk, atS);
    },
  });
  for (const [relay, members] of membersOf) {
    // The first reader of the root, or the relay itself, has died: the rest of the image was not sent to the rack.
    const sent = sentChunks[relay] ?? 0;
    for (const host of members) {
      if (sent === CHUNKS) continue;
      repair.lose(host, sent, CHUNKS, 1);
      lastS[host] = Math.max(lastS[host] ?? 0, deadAtS.get(relay === 0 ? (first ?? 0) : relay) ?? 0) + SILENT_S;
    }
  }
  return repair.run(lastS.map((atS, host) => (membersOf.has(host) ? (outcome.fullS[host] ?? 0) : atS)));
}
