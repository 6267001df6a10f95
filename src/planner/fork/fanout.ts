/** Plans how the image of a fork gets to the hosts that join it. */
import type { FanoutPlan, HeardProbe, NearHosts, NearLevels } from '../../domain/fanout.js';
import type { ForkRequest } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import { type Transport, transportRow } from '../../domain/transport.js';
import { chooseFanout, type FanoutFacts, type MulticastProbe, needsProbe } from '../fanout/choose.js';
import { relayTree } from '../fanout/relay-tree.js';
import { siblings } from '../fanout/siblings.js';
import type { Topology } from '../fanout/topology.js';

/** How many hosts read from one relay, or from the root, of a tree. */
export const RELAY_DEGREE = 2;
/** With fewer hosts each reads from the root, unless something else is asked for. */
export const FANOUT_HOSTS_MIN = 4;

export interface FanoutQuestion {
  readonly root: string;
  /** The hosts that read the image, without the root. */
  readonly hosts: readonly string[];
  readonly transport: Transport;
  /** Of the root. */
  readonly inventory: ForkInventory;
  /** Null: nobody has said which hosts share a switch. */
  readonly topology: Topology | null;
  /** Null: no multicast was tried. */
  readonly heard: readonly HeardProbe[] | null;
}

type Planned =
  | { readonly plan: FanoutPlan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

export function planFanout(request: ForkRequest, question: FanoutQuestion): Planned {
  const { root, hosts, topology, heard } = question;
  const wish = request.fanout ?? 'auto';
  if (request.memory === 'private') {
    // Their memory is filled from the image before they load, and the image of the root is not complete then.
    if (wish === 'auto' || wish === 'unicast') {
      return planned('unicast', 'clones with memory of their own read the image before they start', []);
    }
    return {
      plan: null,
      refusals: [
        {
          code: 'FANOUT_UNAVAILABLE',
          reason: `--fanout ${wish} is not possible for clones that read the image before they start`,
          remedy: 'use --memory cow, or --fanout unicast',
        },
      ],
    };
  }
  const direct = wish === 'auto' ? reasonToReadDirectly(question) : null;
  if (direct !== null) return planned('unicast', direct, []);
  const decision = chooseFanout(factsOf(request, question));
  if (decision.kind === null) return { plan: null, refusals: decision.refusals };
  const { kind, reason } = decision;
  if (kind === 'unicast') return planned(kind, reason, []);
  const { chains } = relayTree({ topology, root, hosts, degree: RELAY_DEGREE });
  const relaysOf = (host: string): readonly string[] => chains.get(host) ?? [];
  if (kind === 'tree') {
    const near = nearOf(hosts, relaysOf, (host) => relaysOf(host).map((relay) => [relay]));
    return planned(kind, reason, near);
  }
  const near = nearOf(hosts, relaysOf, siblings({ topology, hosts }));
  const largest = heard === null ? 0 : probeOf(hosts, heard).largestBytes;
  return planned(kind, reason, near, largest);
}

/** Why nothing but reading from the root is chosen without being asked for, or null. */
function reasonToReadDirectly({ hosts, transport }: Pick<FanoutQuestion, 'hosts' | 'transport'>): string | null {
  const { registersMemory, title } = transportRow(transport);
  // A multicast goes by UDP, and a relay would have to register memory that it does not have yet.
  if (registersMemory) return `the device of the root serves all hosts by ${title}`;
  if (hosts.length >= FANOUT_HOSTS_MIN) return null;
  return `fewer than ${FANOUT_HOSTS_MIN} hosts read the image`;
}

/** Whether the plan depends on which hosts a multicast gets to. */
export function needsMulticastProbe(
  request: ForkRequest,
  question: Omit<FanoutQuestion, 'topology' | 'heard'>,
): boolean {
  if (request.memory === 'private') return false;
  if ((request.fanout ?? 'auto') === 'auto' && reasonToReadDirectly(question) !== null) return false;
  return needsProbe(factsOf(request, { ...question, heard: null }));
}

function factsOf(request: ForkRequest, question: Omit<FanoutQuestion, 'topology'>): FanoutFacts {
  const { root, hosts, transport, inventory, heard } = question;
  return {
    ...{ wish: request.fanout ?? 'auto', root, joiningHosts: hosts, transport },
    probe: heard === null ? null : probeOf(hosts, heard),
    imageBytes: Math.max(inventory.image?.allocatedBytes ?? inventory.imageBytesNeeded, 1),
    linkBytesPerS: null,
    fetch: request.fetch ?? 'all',
    pageBytes: inventory.vm.spec.memory.pageBytes,
  };
}

function planned(kind: FanoutPlan['kind'], reason: string, near: readonly NearHosts[], datagramBytesMax?: number) {
  const plan = { kind, reason, near, ...(datagramBytesMax === undefined ? {} : { datagramBytesMax }) };
  return { plan, refusals: [] as const };
}

function nearOf(
  hosts: readonly string[],
  relaysOf: (host: string) => readonly string[],
  levelsOf: (host: string) => NearLevels,
): NearHosts[] {
  const near = hosts.map((host) => ({ host, levels: levelsOf(host), digestRelays: relaysOf(host) }));
  return near.filter(({ levels, digestRelays }) => levels.length + digestRelays.length > 0);
}

function probeOf(hosts: readonly string[], heard: readonly HeardProbe[]): MulticastProbe {
  const sizes = new Map(heard.map(({ host, largestBytes }) => [host, largestBytes]));
  const deafHosts = hosts.filter((host) => (sizes.get(host) ?? 0) === 0);
  const largest = hosts.flatMap((host) => sizes.get(host) ?? []).filter((bytes) => bytes > 0);
  return { deafHosts, largestBytes: largest.length === 0 ? 0 : Math.min(...largest) };
}
