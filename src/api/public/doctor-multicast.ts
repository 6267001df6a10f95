/** The doctor's line about multicast: whether datagrams get to the peers, and what a switch may do to them. */
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { toMigrationError } from '../../domain/errors.js';
import type { MulticastProvider } from '../../domain/fanout.js';
import type { ApiServices } from '../contract/ports.js';
import { ok, type Verdict, warn } from './doctor-verdict.js';

const INTERFACES = '/sys/class/net';
const NAMES_MAX = 3;
const HEAR_MS = 2_000;
/** With fewer hosts each reads from the root, and nothing is sent as a multicast. */
const PEERS_MIN = 2;

const DEAF_REMEDIES = {
  udp: 'allow UDP to the port of "multicast" in the configuration; between networks set its ttl as well',
  verbs:
    'forks over RDMA send it by UDP meanwhile; look at "multicast" and RDMA there (vmctl doctor), and at the switch',
} as const satisfies Record<MulticastProvider, string>;

export async function multicastVerdict(
  services: Pick<ApiServices, 'agent' | 'peers'>,
  provider: MulticastProvider,
): Promise<Verdict> {
  const { names } = services.peers;
  if (names.length < PEERS_MIN) return ok('not used with fewer than two peers');
  try {
    const heard = await services.agent.fanout.probeMulticast(names, HEAR_MS, provider);
    const deaf = heard.filter(({ largestBytes }) => largestBytes === 0).map(({ host }) => host);
    if (deaf.length > 0) {
      const instead = provider === 'udp' ? ': forks onto many hosts use relays instead' : '';
      return warn(`datagrams to a group do not get to ${some(deaf)}${instead}`, DEAF_REMEDIES[provider]);
    }
    const bridges = await bridgesWithoutQuerier();
    const largest = `datagrams of ${Math.min(...heard.map(({ largestBytes }) => largestBytes))} bytes get to all peers`;
    if (bridges.length === 0) return ok(largest);
    return warn(
      `${largest}, but ${some(bridges)} snoops on IGMP without a querier, and may forget members after some minutes`,
      'set multicast_querier 1 on one bridge of the network, if no router asks; or multicast_snooping 0',
    );
  } catch (thrown) {
    const { code, message } = toMigrationError(thrown);
    return warn(`${code}: ${message}`, 'check the key multicast in the configuration of vmigrated');
  }
}

/** Bridges of this machine that learn members from IGMP, and do not ask for them. A router may do so instead. */
async function bridgesWithoutQuerier(): Promise<string[]> {
  const found: string[] = [];
  for (const name of await readdir(INTERFACES).catch(() => [])) {
    const value = (key: string) => readFile(join(INTERFACES, name, 'bridge', key), 'utf8').catch(() => '');
    const [snooping, querier] = await Promise.all([value('multicast_snooping'), value('multicast_querier')]);
    if (snooping.trim() === '1' && querier.trim() === '0') found.push(name);
  }
  return found;
}

function some(names: readonly string[]): string {
  const shown = names.slice(0, NAMES_MAX).join(', ');
  return names.length > NAMES_MAX ? `${shown} and ${names.length - NAMES_MAX} more` : shown;
}
