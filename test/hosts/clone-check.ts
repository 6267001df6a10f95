/** Checks N clones: every page of each must be right, and no two may have the same identity. */
import type { CloneReport } from '../../src/domain/fork.js';
import { type Cluster, eventually } from './cluster.js';
import { Guest, parseIdentity } from './guest.js';
import { inTurns } from './turns.js';

const PAUSED_AT_ONCE = 8;
/** How many guests check themselves at once. The others are paused, because otherwise each would wait for all. */
const CHECKED_AT_ONCE = 2;
const IDENTITY_MS = 60_000;
const PARTS = ['index', 'UUID', 'generation id', 'random numbers', 'MAC'];

export interface CloneCheck {
  readonly badPages: number;
  /** Number of clones that differ in all of index, UUID, generation id, random numbers, and MAC if they have a NIC. */
  readonly distinctCount: number;
  /** The parts of the identity that some clones have in common. */
  readonly shared: readonly string[];
}

/** Reads the identity from complete lines only: a clone may have been paused in the middle of a line. */
function wholeIdentity(log: string): Record<string, string> | undefined {
  return parseIdentity(log, 'FORK').findLast(({ macs }) => macs !== undefined);
}

/** Checks the clones, each on its host. They are paused first, and each is stopped after its check. */
export async function checkClones(cluster: Cluster, clones: readonly CloneReport[]): Promise<CloneCheck> {
  await inTurns(clones, PAUSED_AT_ONCE, ({ host, name }) => cluster.api(host).post(`/v1/vms/${name}/pause`));
  let badPages = 0;
  const identities: string[][] = [];
  await inTurns(clones, CHECKED_AT_ONCE, async ({ host, name, uuid, mac }) => {
    const guest = new Guest(cluster, name);
    await cluster.api(host).post(`/v1/vms/${name}/resume`);
    const { pages, bad } = await guest.verify(host);
    badPages += pages === 0 ? Number.NaN : bad;
    const {
      index = '',
      generation = '',
      after = '',
    } = await eventually(`${name} knows who it is`, IDENTITY_MS, async () =>
      wholeIdentity(await guest.serialLog(host)),
    );
    identities.push([index, uuid, generation, after, mac ?? name]);
    await cluster.must(cluster.vmctl(host, 'stop', '--force', name));
  });
  const distinct = PARTS.map((_, part) => new Set(identities.map((identity) => identity[part])).size);
  const shared = PARTS.filter((_, part) => (distinct[part] ?? 0) < identities.length);
  return { badPages, distinctCount: Math.min(...distinct), shared };
}
