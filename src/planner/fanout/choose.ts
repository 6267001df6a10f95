/** Chooses how the image of a fork gets to the hosts that join. Pure. */
import { FANOUTS, type Fanout, type FanoutChoice } from '../../domain/fanout.js';
import type { ImageFetchMode } from '../../domain/fork.js';
import type { Refusal } from '../../domain/refusal.js';
import { type Transport, transportRow } from '../../domain/transport.js';
import { fanoutSeconds } from './estimate.js';

/** How long each host listens for the probe of a group. */
export const MULTICAST_PROBE_MS = 200;
/** The largest page that the receivers of a multicast can assemble. */
export const MULTICAST_PAGE_BYTES_MAX = 4096;
/** Every IPv4 host takes such datagrams. Smaller ones would be more header than page. */
export const MULTICAST_DATAGRAM_BYTES_MIN = 576;

/** What a probe of the group has shown. */
export interface MulticastProbe {
  /** The joining hosts that have heard nothing. */
  readonly deafHosts: readonly string[];
  /** The largest datagram that all others have heard. */
  readonly largestBytes: number;
}

export interface FanoutFacts {
  readonly wish: FanoutChoice;
  readonly root: string;
  /** The hosts that read the image, without the root. */
  readonly joiningHosts: readonly string[];
  /** Bytes of the image that are not zero, or the size of the memory if that is not known. */
  readonly imageBytes: number;
  /** Of the slowest host. Null: not known. */
  readonly linkBytesPerS: number | null;
  readonly fetch: ImageFetchMode;
  readonly pageBytes: number;
  readonly transport: Transport;
  /** Null: the group has not been probed. `auto` then does not choose it. */
  readonly probe: MulticastProbe | null;
}

/** Null: the speed of the links is not known, or this fan-out is not possible. */
export type FanoutSeconds = { readonly [Kind in Fanout]: number | null };

export type FanoutDecision =
  | { readonly kind: Fanout /** One sentence. */; readonly reason: string; readonly seconds: FanoutSeconds }
  | { readonly kind: null; readonly refusals: readonly Refusal[]; readonly seconds: FanoutSeconds };

/** Returns whether the decision depends on the group, so that it has to be probed first. */
export function needsProbe(facts: FanoutFacts): boolean {
  const probe = { deafHosts: [], largestBytes: Infinity };
  return chooseFanout({ ...facts, probe }).kind === 'multicast';
}

/** A wish that cannot be met is refused; it never becomes another fan-out. */
export function chooseFanout(facts: FanoutFacts): FanoutDecision {
  const { wish, joiningHosts, linkBytesPerS } = facts;
  const obstacles: { readonly [Kind in Fanout]: Refusal | null } = {
    ...{ unicast: null, multicast: multicastObstacle(facts), tree: treeObstacle(facts) },
  };
  const load = { hostCount: joiningHosts.length, imageBytes: facts.imageBytes };
  const isPossible = (kind: Fanout): boolean =>
    obstacles[kind] === null && (kind !== 'multicast' || facts.probe !== null || wish === 'multicast');
  const secondsAt = (kind: Fanout, bytesPerS: number | null): number | null =>
    isPossible(kind) && bytesPerS !== null ? fanoutSeconds(kind, { ...load, linkBytesPerS: bytesPerS }) : null;
  const secondsAll = (bytesPerS: number | null): FanoutSeconds => ({
    unicast: secondsAt('unicast', bytesPerS),
    multicast: secondsAt('multicast', bytesPerS),
    tree: secondsAt('tree', bytesPerS),
  });
  const seconds = secondsAll(linkBytesPerS);

  if (wish !== 'auto') {
    const obstacle = obstacles[wish];
    return obstacle === null
      ? { kind: wish, reason: 'asked for', seconds }
      : { kind: null, refusals: [obstacle], seconds };
  }
  if (joiningHosts.length <= 1) {
    return { kind: 'unicast', reason: 'only one host reads the image, so no other could pass it on', seconds };
  }
  const expected = secondsAll(linkBytesPerS ?? ASSUMED_BYTES_PER_S);
  const kinds = FANOUTS.filter((kind) => expected[kind] !== null);
  const kind = kinds.reduce((best, next) => ((expected[next] ?? Infinity) < (expected[best] ?? 0) ? next : best));
  const reason = reasonFor(kind, expected, facts, obstacles.multicast);
  return { kind, reason, seconds };
}

/** 10 Gbit/s. Only the choice depends on it, and only that much: set-up costs against bytes. */
const ASSUMED_BYTES_PER_S = 1.25e9;

function reasonFor(kind: Fanout, expected: FanoutSeconds, facts: FanoutFacts, obstacle: Refusal | null): string {
  const { joiningHosts, linkBytesPerS, fetch, transport, pageBytes, probe } = facts;
  const times = FANOUTS.toSorted((a, b) => Number(b === kind) - Number(a === kind)).flatMap((each) => {
    const s = expected[each];
    return s === null ? [] : [`${each} ${describeSeconds(s)}`];
  });
  const assumed = linkBytesPerS === null ? ', on links of 10 Gbit/s, which nobody has measured' : '';
  const compared = times.length > 1 ? `${times.join(', ')}${assumed}` : null;
  if (fetch === 'demand') return 'each host reads only what its clones touch';
  if (transportRow(transport).sameMachineOnly) return 'the hosts are on one machine, and share its memory';
  const group = `${joiningHosts.length} hosts`;
  if (kind === 'multicast') return `all ${group} hear the group: ${compared}`;
  const without =
    obstacle === null
      ? probe === null
        ? ''
        : `all ${group} hear the group, but sending to it takes longer: `
      : pageBytes > MULTICAST_PAGE_BYTES_MAX
        ? 'huge pages cannot be multicast: '
        : `${obstacle.reason}: `;
  return `${without}${compared ?? kind}`;
}

function describeSeconds(s: number): string {
  return s < 10 ? `${Math.max(0.1, s).toFixed(1)} s` : `${Math.round(s)} s`;
}

// ---- what speaks against a fan-out

function commonObstacle(kind: Fanout, { fetch, transport }: FanoutFacts): Refusal | null {
  if (fetch === 'demand') {
    const reason = `with --fetch demand each host reads only what its clones touch, so ${kind} would bring too much`;
    return unavailable(reason, 'use --fetch all, or --fanout auto');
  }
  if (!transportRow(transport).sameMachineOnly) return null;
  const reason = `the hosts read by ${transportRow(transport).title}, on one machine: there is nothing to pass on`;
  return unavailable(reason, 'use --fanout auto');
}

function treeObstacle(facts: FanoutFacts): Refusal | null {
  return commonObstacle('tree', facts);
}

function multicastObstacle(facts: FanoutFacts): Refusal | null {
  const { pageBytes, probe, root, joiningHosts } = facts;
  const common = commonObstacle('multicast', facts);
  if (common !== null) return common;
  if (pageBytes > MULTICAST_PAGE_BYTES_MAX) {
    const reason = `the memory has pages of ${pageBytes} bytes; multicast sends at most ${MULTICAST_PAGE_BYTES_MAX}`;
    return unavailable(reason, 'use --fanout tree');
  }
  if (probe === null) return null;
  const { deafHosts, largestBytes } = probe;
  if (deafHosts.length > 0) {
    return {
      code: 'MULTICAST_NOT_ROUTED',
      reason: `${deafHosts.length} of ${joiningHosts.length} hosts hear no multicast of ${root}: ${namesOf(deafHosts)}`,
      remedy:
        'have the switches forward multicast to them (IGMP snooping needs a querier, other subnets need multicast ' +
        'routing), open the port of the group in their firewalls, or use --fanout tree',
    };
  }
  if (largestBytes >= MULTICAST_DATAGRAM_BYTES_MIN) return null;
  return {
    code: 'MULTICAST_NOT_ROUTED',
    reason: `datagrams of ${largestBytes} bytes are the largest of ${root} that reach all hosts`,
    remedy: `raise the MTU on the way to at least ${MULTICAST_DATAGRAM_BYTES_MIN} bytes, or use --fanout tree`,
  };
}

const NAMES_SHOWN_MAX = 5;

/** For a message: the first names, and how many more there are. */
export function namesOf(hosts: readonly string[]): string {
  const some = hosts.slice(0, NAMES_SHOWN_MAX).join(', ');
  return hosts.length > NAMES_SHOWN_MAX ? `${some} and ${hosts.length - NAMES_SHOWN_MAX} more` : some;
}

function unavailable(reason: string, remedy: string): Refusal {
  return { code: 'FANOUT_UNAVAILABLE', reason, remedy };
}
