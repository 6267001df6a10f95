/** Plans how the image of a fork gets to the hosts that join it. */
import type {
  FanoutPlan,
  HeardProbe,
  MulticastProvider,
  NearHosts,
  NearLevels,
  ProbedGroup,
} from '../../domain/fanout.js';
import type { ForkRequest } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import { type Transport, transportRow } from '../../domain/transport.js';
import { chooseFanout, type FanoutFacts, type MulticastProbe, namesOf, needsProbe } from '../fanout/choose.js';
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
  /** What was tried as a multicast, the best first. */
  readonly probes: readonly ProbedGroup[];
  /** Encryption is demanded. Datagrams of a multicast are authenticated, but not encrypted. */
  readonly isEncrypted?: boolean;
}

type Planned =
  | { readonly plan: FanoutPlan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

export function planFanout(request: ForkRequest, question: FanoutQuestion): Planned {
  const { root, hosts, topology } = question;
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
  if (question.isEncrypted === true && wish === 'multicast') {
    const remedy = 'use --fanout tree or --fanout unicast';
    const reason = 'a multicast is not encrypted, and encryption is demanded';
    return { plan: null, refusals: [{ code: 'DATA_NOT_PROTECTED', reason, remedy }] };
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
  const { provider, datagramBytesMax, detour } = groupOf(question);
  return planned(kind, `${reason}${detour}`, near, { provider, datagramBytesMax });
}

/** What carries the multicast of an image that hosts read by this transport, if they all hear it. */
export function providerOf(transport: Transport): MulticastProvider {
  return transportRow(transport).provider === 'verbs' ? 'verbs' : 'udp';
}

function groupOf({ hosts, transport, probes }: FanoutQuestion) {
  const probed = decisive(hosts, probes);
  const provider = probed?.provider ?? providerOf(transport);
  const datagramBytesMax = probed === null ? 0 : probeOf(hosts, probed.heard).largestBytes;
  const better = probes.find((probe) => probe.provider !== provider);
  const deaf = better === undefined ? [] : probeOf(hosts, better.heard).deafHosts;
  const detour = deaf.length === 0 ? '' : `; by UDP, because RDMA multicast does not get to ${namesOf(deaf)}`;
  return { provider, datagramBytesMax, detour };
}

/** The first group that all hosts hear, or else the last one that was tried. */
function decisive(hosts: readonly string[], probes: readonly ProbedGroup[]): ProbedGroup | null {
  return probes.find(({ heard }) => probeOf(hosts, heard).deafHosts.length === 0) ?? probes.at(-1) ?? null;
}

/** Why nothing but reading from the root is chosen without being asked for, or null. */
function reasonToReadDirectly({
  hosts,
  transport,
  isEncrypted = false,
}: Pick<FanoutQuestion, 'hosts' | 'transport' | 'isEncrypted'>): string | null {
  const { registersMemory, title } = transportRow(transport);
  // Nobody has measured on real devices that a multicast or relays are faster. A relay registers its memory first.
  if (registersMemory) return `the device of the root serves all hosts by ${title}`;
  if (isEncrypted) return 'a multicast is not encrypted, and encryption is demanded';
  if (hosts.length >= FANOUT_HOSTS_MIN) return null;
  return `fewer than ${FANOUT_HOSTS_MIN} hosts read the image`;
}

/** Whether the plan depends on which hosts a multicast gets to. */
export function needsMulticastProbe(
  request: ForkRequest,
  question: Omit<FanoutQuestion, 'topology' | 'probes'>,
): boolean {
  if (request.memory === 'private') return false;
  if ((request.fanout ?? 'auto') === 'auto' && reasonToReadDirectly(question) !== null) return false;
  return needsProbe(factsOf(request, { ...question, probes: [] }));
}

function factsOf(request: ForkRequest, question: Omit<FanoutQuestion, 'topology'>): FanoutFacts {
  const { root, hosts, transport, inventory, probes } = question;
  const probed = decisive(hosts, probes);
  return {
    ...{ wish: request.fanout ?? 'auto', root, joiningHosts: hosts, transport },
    probe: probed === null ? null : probeOf(hosts, probed.heard),
    imageBytes: Math.max(inventory.image?.allocatedBytes ?? inventory.imageBytesNeeded, 1),
    linkBytesPerS: null,
    fetch: request.fetch ?? 'all',
    pageBytes: inventory.vm.spec.memory.pageBytes,
  };
}

function planned(
  kind: FanoutPlan['kind'],
  reason: string,
  near: readonly NearHosts[],
  group: Pick<FanoutPlan, 'provider' | 'datagramBytesMax'> = {},
) {
  return { plan: { kind, reason, near, ...group }, refusals: [] as const };
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
