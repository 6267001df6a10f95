/** The handles of a multicast and the checks of their arguments. They wrap those of the addon, as handles.ts does. */
import { isIP } from 'node:net';
import { DATAGRAM_CONSTANTS } from '../protocol/datagrams.js';
import { attempt, attemptAsync } from './attempt.js';
import {
  checkAddress,
  checkBandwidth,
  checkEdge,
  checkOrder,
  checkPort,
  checkRegions,
  isHex,
  isIntegerIn,
  require,
} from './check.js';
import type {
  MulticastGroup,
  MulticastJoin,
  MulticastSenderHandle,
  MulticastSenderOptions,
  MulticastSenderSnapshot,
  PacerHandle,
  PacerReport,
} from './multicast-types.js';

export type { MulticastSenderOptions } from './multicast-types.js';

export interface AddonMulticastSender {
  start(): void;
  snapshot(): MulticastSenderSnapshot;
  close(): Promise<void>;
}

export interface AddonPacer {
  report(member: number, report: PacerReport, nowNs: number): void;
  rateBytesPerS(nowNs: number): number;
}

/** The smallest MTU that IPv4 allows, and the largest packet of IP. */
const MTU_BYTES_MIN = 576;
const MTU_BYTES_MAX = 65536;
const PROBE_MS_MAX = 60_000;
/** A probe takes a thread of the pool for so long at a time. */
const PROBE_SLICE_MS = 200;

/** Checks a group, parts of which come from a peer. The addon checks that it is a group, and the interface. */
export function checkGroup(group: MulticastGroup): void {
  const { provider, interfaceAddress, ttl, key, session, mtuBytes } = group;
  require(typeof provider === 'string' && provider !== '', 'provider must be a non-empty string');
  checkAddress(group.group);
  checkPort(group.port, 1);
  if (interfaceAddress !== null) {
    checkAddress(interfaceAddress);
    require(isIP(interfaceAddress) === isIP(group.group), 'group and interface must be of one IP version');
  }
  require(isIntegerIn(ttl, 1, 255), 'ttl must be an integer from 1 to 255');
  require(isHex(
    key,
    2 * DATAGRAM_CONSTANTS.MULTICAST_KEY_BYTES,
  ), 'key of a multicast must be 64 lower-case hex digits');
  require(isHex(session, 16), 'session of a multicast must be 16 lower-case hex digits');
  const isMtu = mtuBytes === 0 || isIntegerIn(mtuBytes, MTU_BYTES_MIN, MTU_BYTES_MAX);
  require(isMtu, `mtuBytes must be 0 or from ${MTU_BYTES_MIN} to ${MTU_BYTES_MAX}`);
}

export function checkJoin(join: MulticastJoin): void {
  checkGroup(join);
  const last = DATAGRAM_CONSTANTS.MULTICAST_PROBE_MEMBER - 1;
  require(isIntegerIn(join.member, 1, last), `member must be an integer from 1 to ${last}`);
}

export function checkSender(options: MulticastSenderOptions): void {
  checkRegions(options.image);
  checkGroup(options.group);
  checkBandwidth(options.bandwidthBytesPerS);
  if (options.order !== undefined) checkOrder(options.order);
  checkEdge(options.onEdge);
}

/** Sends in slices, so that it can stop and takes no thread for long. */
export async function sendProbes(
  addon: { sendMulticastProbe(group: MulticastGroup, durationMs: number): Promise<void> },
  group: MulticastGroup,
  durationMs: number,
  stop?: AbortSignal,
): Promise<void> {
  checkGroup(group);
  require(isIntegerIn(durationMs, 1, PROBE_MS_MAX), `durationMs must be 1 to ${PROBE_MS_MAX}`);
  for (let leftMs = durationMs; leftMs > 0; leftMs -= PROBE_SLICE_MS) {
    if (stop?.aborted === true) return;
    const sliceMs = Math.min(leftMs, PROBE_SLICE_MS);
    await attemptAsync(`send probes to ${group.group}`, () => addon.sendMulticastProbe(group, sliceMs));
  }
}

export class MulticastSender implements MulticastSenderHandle {
  readonly #native: AddonMulticastSender;

  constructor(native: AddonMulticastSender) {
    this.#native = native;
  }

  start(): void {
    attempt('start a multicast', () => this.#native.start());
  }

  snapshot(): MulticastSenderSnapshot {
    return attempt('multicast', () => this.#native.snapshot());
  }

  async close(): Promise<void> {
    await attemptAsync('close a multicast', () => this.#native.close());
  }
}

export class Pacer implements PacerHandle {
  readonly #native: AddonPacer;

  constructor(native: AddonPacer) {
    this.#native = native;
  }

  report(member: number, report: PacerReport, nowNs: number): void {
    require(isIntegerIn(
      member,
      1,
      DATAGRAM_CONSTANTS.MULTICAST_PROBE_MEMBER - 1,
    ), 'member must be the number of a receiver');
    const numbers = [report.clockNs, report.highestSequence, report.receivedDatagrams, report.receivedBytes, nowNs];
    const isGood = numbers.every((value) => isIntegerIn(value, 0, Number.MAX_SAFE_INTEGER));
    require(isGood, 'a report of a receiver has integers from 0');
    this.#native.report(member, report, nowNs);
  }

  rateBytesPerS(nowNs: number): number {
    require(isIntegerIn(nowNs, 0, Number.MAX_SAFE_INTEGER), 'nowNs must be an integer from 0');
    return this.#native.rateBytesPerS(nowNs);
  }
}
