/** Asks the hosts of a fork for all facts that its pre-flight checks. */
import { readFile } from 'node:fs/promises';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { MulticastProvider, ProbedGroup } from '../domain/fanout.js';
import type { ForkRequest } from '../domain/fork.js';
import type { ForkInventory } from '../domain/host.js';
import type { RdmaPlace, Transport } from '../domain/transport.js';
import { transportRow } from '../domain/transport.js';
import { withDeadline } from '../engine/deadline.js';
import { IMAGE_TO_COME, originOf } from '../engine/fork/origin.js';
import type { ForkQuestion } from '../engine/ports/fork.js';
import { inParallel } from '../kit/parallel.js';
import { MULTICAST_PROBE_MS } from '../planner/fanout/choose.js';
import { readTopology } from '../planner/fanout/read-topology.js';
import { topologyFromRoundTrips } from '../planner/fanout/round-trips.js';
import type { Topology } from '../planner/fanout/topology.js';
import { needsMulticastProbe, providerOf } from '../planner/fork/fanout.js';
import type { HostsFacts } from '../planner/fork/hosts.js';
import { chooseForkTransport, type JoinFacts } from '../planner/fork/join-preflight.js';
import { ANSWER_MS, type FactSources } from './facts.js';
import { compareStorage } from './storage-facts.js';

/** What the hosts read by is planned later. This one says least about the network. */
const TRANSPORT_MEANWHILE: Transport = 'tcp';
/** How many hosts are asked at the same time. */
const HOSTS_AT_ONCE = 64;

/** Throws if the VM or image does not exist, or if this host itself does not answer. */
export async function gatherForkFacts(
  request: ForkRequest,
  sources: FactSources,
): Promise<{ readonly inventory: ForkInventory; readonly hosts?: HostsFacts } | { readonly ownerElsewhere: string }> {
  const { host, agent, registry, clock, callMsMax } = sources;
  if (request.vm !== null) {
    const record = await registry.owner(request.vm);
    if (record !== null && record.owner !== host) return { ownerElsewhere: record.owner };
  }
  const bounded: Bounded = (work, what) => withDeadline(clock, work, Math.max(ANSWER_MS, callMsMax), what);
  const what = `inspecting ${request.vm ?? `image ${request.image ?? ''}`}`;
  const question = questionOf(request);
  const inventory = await bounded(agent(host).forks.forkInventory(question), what);
  if (request.hosts === undefined) return { inventory };
  const root = await bounded(agent(host).inventory.inventory(), `asking ${host}`);
  const { address, port } = root.rdma;
  const asked = request.transport ?? 'auto';
  const isRdmaWanted = asked === 'auto' || transportRow(asked).registersMemory;
  const rdmaPlace = isRdmaWanted && address !== null && port !== null ? { host: address, port } : null;
  const origin = originOf(host, inventory, request.image ?? IMAGE_TO_COME);
  const { spec } = inventory.vm;
  // An image has no VM whose files could be compared.
  const isStorageAsked = request.vm !== null && spec.disks.length > 0 && request.sharedStorage !== 'assume';
  const others = request.hosts.filter((wish) => wish.host !== host).map((wish) => wish.host);
  const topology = await topologyOf(request, sources, [host, ...others]);
  const wouldRead = { root: host, hosts: others, transport: asked === 'auto' ? TRANSPORT_MEANWHILE : asked, inventory };
  // Who asks for a multicast waits for hosts that are busy.
  const hearMs = request.fanout === 'multicast' ? HEAR_MS_ASKED : MULTICAST_PROBE_MS;
  // A host that cannot be asked has heard nothing.
  const probe: Probe = (provider) =>
    bounded(agent(host).fanout.probeMulticast(others, hearMs, provider), 'trying a multicast').then(
      (heard) => [{ provider, heard }],
      () => (provider === 'udp' ? [] : [{ provider, heard: [] }]),
    );
  const isProbed = needsMulticastProbe(request, wouldRead);
  // By RDMA only who asks for a multicast gets one. Whether the hosts have RDMA is not known yet.
  const isRdmaPossible = request.fanout === 'multicast' && rdmaPlace !== null;
  const probing = isProbed && !isRdmaPossible ? probe('udp') : null;
  const outcomes = await inParallel(others, HOSTS_AT_ONCE, (name) =>
    askHost(name, { ...question, vm: null, origin }, rdmaPlace, agent, bounded).then(async (facts) => {
      if (facts.kind !== 'reachable' || !isStorageAsked) return facts;
      const [source, target] = [agent(host).inventory, agent(name).inventory];
      return { ...facts, storage: await compareStorage({ vm: spec.name, source, target, targetHost: name, bounded }) };
    }),
  );
  const joins = outcomes.map((outcome, index): JoinFacts => {
    if ('value' in outcome) return outcome.value;
    return { kind: 'unreachable', host: others[index] ?? '', error: toMigrationError(outcome.error) };
  });
  const probes = isProbed
    ? await (probing ?? probeBest(chooseForkTransport(request, root, inventory.vm, joins).transport, others, probe))
    : [];
  const measured = needsRoundTrips(request, topology, probes) ? await measure([host, ...others], agent, bounded) : null;
  return { inventory, hosts: { root, joins, topology: topology ?? measured, probes } };
}

type Probe = (provider: MulticastProvider) => Promise<ProbedGroup[]>;

/** What is probed is what is used: by UDP if hosts that read by RDMA do not all hear its multicast. */
async function probeBest(transport: Transport, hosts: readonly string[], probe: Probe): Promise<ProbedGroup[]> {
  const provider = providerOf(transport);
  const probed = await probe(provider);
  if (provider === 'udp' || probed.every(({ heard }) => heard.length === hosts.length && !isAnyDeaf(heard))) {
    return probed;
  }
  return [...probed, ...(await probe('udp'))];
}

const isAnyDeaf = (heard: ProbedGroup['heard']): boolean => heard.some(({ largestBytes }) => largestBytes === 0);

const HEAR_MS_ASKED = 5_000;
/** Between few hosts it makes no difference who relays to whom. */
const RELAYED_HOSTS_MIN = 4;

function needsRoundTrips(
  { fanout = 'auto', hosts = [], fetch }: ForkRequest,
  topology: Topology | null,
  probes: readonly ProbedGroup[],
): boolean {
  if (topology !== null || fetch === 'demand' || hosts.length < RELAYED_HOSTS_MIN) return false;
  return (
    fanout === 'tree' || (fanout === 'auto' && (probes.length === 0 || probes.some(({ heard }) => isAnyDeaf(heard))))
  );
}

/** A host that cannot be asked is in a rack of its own. */
async function measure(hosts: readonly string[], agent: FactSources['agent'], bounded: Bounded): Promise<Topology> {
  const outcomes = await inParallel(hosts, HOSTS_AT_ONCE, (host) => {
    const others = hosts.filter((other) => other !== host);
    return bounded(agent(host).fanout.roundTrips(others), `measuring round trips of ${host}`);
  });
  const us = outcomes.map((outcome) => {
    const found = new Map('value' in outcome ? outcome.value.map((trip) => [trip.host, trip.us]) : []);
    return hosts.map((host) => found.get(host) ?? null);
  });
  return topologyFromRoundTrips({ hosts, us });
}

async function topologyOf(
  { topology }: ForkRequest,
  { topologyPath = null }: FactSources,
  hosts: readonly string[],
): Promise<Topology | null> {
  if (topology !== undefined) return readTopology({ ...topology, hosts });
  if (topologyPath === null) return null;
  const text = await readFile(topologyPath, 'utf8').catch((cause: unknown) => {
    const { message } = toMigrationError(cause);
    throw new MigrationError('SPEC_INVALID', `cannot read the topology ${topologyPath}: ${message}`, {
      remedy: 'correct "topology" in the configuration of vmigrated',
      cause,
    });
  });
  return readTopology({ name: topologyPath, text, hosts });
}

type Bounded = <T>(work: Promise<T>, what: string) => Promise<T>;

function questionOf(request: ForkRequest): ForkQuestion {
  const {
    isPartialAllowed: _,
    hosts: _h,
    placement: _p,
    fetch: _f,
    transport: _t,
    sharedStorage: _s,
    dataSecurity: _d,
    fanout: _o,
    topology: _y,
    ...asked
  } = request;
  return asked;
}

async function askHost(
  host: string,
  question: ForkQuestion & Required<Pick<ForkQuestion, 'origin'>>,
  rdmaPlace: RdmaPlace | null,
  agent: FactSources['agent'],
  bounded: Bounded,
): Promise<JoinFacts> {
  const { inventory: asked, forks } = agent(host);
  const [inventory, checks, fork] = await Promise.all([
    bounded(asked.inventory(), `asking ${host}`),
    bounded(asked.checkTarget(question.origin.spec, rdmaPlace), `asking ${host} about the VM's files`),
    bounded(forks.forkInventory(question), `asking ${host} for room`).catch((error: unknown) => {
      throw ofOlderBuild(host, toMigrationError(error));
    }),
  ]);
  if (inventory.host !== host) {
    throw new MigrationError('PEER_PROTOCOL', `the host at the address of ${host} is ${inventory.host}`, {
      remedy: 'correct the peers in the configuration of vmigrated',
    });
  }
  return { kind: 'reachable', host, inventory, checks, fork, storage: { kind: 'unasked' } };
}

/** A host of an earlier build does not know the origin, so it looks for a VM or image that it does not have. */
function ofOlderBuild(host: string, error: MigrationError): MigrationError {
  if (error.code !== 'USAGE' && error.code !== 'NOT_FOUND') return error;
  return new MigrationError('UNSUPPORTED', `${host} cannot join a fork: ${error.message}`, {
    remedy: `install the same vmigrate on ${host}, or leave it out`,
    cause: error,
  });
}
