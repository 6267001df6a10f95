/** The root sends the image once to all hosts, which then read what they have lost from each other. */
import type { Case, Outcome } from './case.js';
import type { Pacing } from './pacing.js';
import { Repair } from './repair.js';

const TICK_S = 0.02;
const DATAGRAM_BYTES = 1408;
const PAGE_BYTES = 4096;
/** What the kernel of a receiver keeps until its thread takes it (native/multicast/limits.hpp). */
const BUFFER_BYTES = 32 * 1024 * 1024;
/** Receivers that a sender hears (native/multicast/limits.hpp). */
const MEMBERS_MAX = 1024;
/** How much the rate of a receiver varies from tick to tick. */
const JITTER = 0.05;

/** The share of pages of which a part is lost if this share of datagrams is. */
export function lostPages(lostDatagrams: number): number {
  return 1 - (1 - lostDatagrams) ** Math.ceil(PAGE_BYTES / DATAGRAM_BYTES);
}

export function simulateMulticast(world: Case, pacing: Pacing): Outcome {
  const { hosts, network, imageBytes, linkBytesPerS, loss, random, dying } = world;
  const pacer = pacing.open({ linkBytesPerS });
  const drains = hosts.map((_, host) => network.bytesPerSTo(host));
  const backlogs = new Float64Array(hosts.length);
  const received = new Float64Array(hosts.length);
  const deadAtS = new Map(dying.map(({ host, atS }) => [host, atS]));
  const repair = new Repair(world);
  const stride = Math.ceil((hosts.length - 1) / MEMBERS_MAX);
  let sentBytes = 0;
  let atS = 0;
  while (sentBytes < imageBytes) {
    // The pacing's time never goes back, not by a rounded nanosecond either.
    const rate = Math.min(linkBytesPerS, pacer.rateBytesPerS(Math.round(atS * 1e9)));
    const bytes = Math.min(rate * TICK_S, imageBytes - sentBytes);
    for (let host = 1; host < hosts.length; host++) {
      if ((deadAtS.get(host) ?? Infinity) <= atS) continue;
      const drained = (drains[host] ?? 0) * TICK_S * (1 + JITTER * (random() - 0.5));
      const arrived = bytes * (1 - loss);
      const waiting = (backlogs[host] ?? 0) + arrived - drained;
      const overflow = Math.min(arrived, Math.max(0, waiting - BUFFER_BYTES));
      backlogs[host] = Math.min(BUFFER_BYTES, Math.max(0, waiting));
      received[host] = (received[host] ?? 0) + arrived - overflow;
      const lost = lostPages((bytes - arrived + overflow) / bytes);
      if (lost > 0) repair.lose(host, sentBytes / world.chunkBytes, (sentBytes + bytes) / world.chunkBytes, lost);
    }
    sentBytes += bytes;
    atS += bytes < rate * TICK_S ? bytes / rate : TICK_S;
    const atNs = Math.round(atS * 1e9);
    for (let host = 1; host < hosts.length; host += stride) {
      if ((deadAtS.get(host) ?? Infinity) <= atS) continue;
      // What the kernel still keeps, the receiver has not counted.
      const taken = Math.floor((received[host] ?? 0) - (backlogs[host] ?? 0));
      const report = { clockNs: atNs, highestSequence: Math.floor(sentBytes / DATAGRAM_BYTES), receivedBytes: taken };
      pacer.report(host, { ...report, receivedDatagrams: Math.floor(taken / DATAGRAM_BYTES) }, atNs);
    }
  }
  network.noteMulticast(sentBytes);
  const endS = hosts.map((_, host) => atS + (backlogs[host] ?? 0) / (drains[host] ?? 1));
  return repair.run(endS);
}
