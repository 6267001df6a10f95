/** The part of a simulated world that concerns fan-out: the group, its seats, and who reads from whom. */
import type { SimReader } from './reader.js';
import type { SimSender } from './sender.js';

export type FanoutFaultKind =
  /** No datagram of any group arrives. */
  | 'silenceGroup'
  /** The root gives no seat. */
  | 'refuseSeats'
  /** What a near holder does when it is asked for its pages: it refuses, answers late, or never. */
  | HeldFault;
export type HeldFault = 'refuseHeld' | 'delayHeld' | 'hangHeld';
const HELD: readonly string[] = ['refuseHeld', 'delayHeld', 'hangHeld'] satisfies HeldFault[];

/** How fan-out is broken on purpose. */
export type FanoutSabotage =
  /** What near holders may bring is never read from the root. */
  | 'relaysOnly'
  /** What the group may bring is awaited for ever. */
  | 'trustGroup'
  /** A host that gets no seat reads nothing. */
  | 'needSeat'
  /** A host reads nothing before all near holders have answered. */
  | 'waitForNear'
  /** Two seats of a group have the same number. */
  | 'sameSeat'
  /** A near holder gives pages that it does not have. */
  | 'giveAbsent'
  /** An image that is not complete is sent. */
  | 'sendIncomplete'
  /** A multicast that has sent all is not closed. */
  | 'neverEnd'
  /** The pages of a fork that was undone are read on. */
  | 'keepReading';

export class FanoutState {
  sabotage: string | null = null;
  isGroupSilent = false;
  areSeatsRefused = false;
  readonly readers = new Set<SimReader>();
  readonly senders = new Set<SimSender>();
  readonly #held = new Map<string, HeldFault>();
  /** The hosts that have asked the root for each image. It is durable there. */
  readonly #readersOf = new Map<string, Set<string>>();
  readonly #seats = new Set<string>();
  readonly #fail: (message: string) => void;

  constructor(fail: (message: string) => void) {
    this.#fail = fail;
  }

  is(sabotage: FanoutSabotage): boolean {
    return this.sabotage === sabotage;
  }

  /** Returns what ends the fault, or null if it is none of fan-out. */
  strike(kind: string, host: string): (() => void) | null {
    if (kind === 'silenceGroup') {
      this.isGroupSilent = true;
      return () => void (this.isGroupSilent = false);
    }
    if (kind === 'refuseSeats') {
      this.areSeatsRefused = true;
      return () => void (this.areSeatsRefused = false);
    }
    if (!HELD.includes(kind)) return null;
    this.#held.set(host, kind as HeldFault);
    return () => void this.#held.delete(host);
  }

  heldFaultOf(host: string): HeldFault | null {
    return this.#held.get(host) ?? null;
  }

  noteReader(image: string, host: string): void {
    const readers = this.#readersOf.get(image) ?? new Set();
    this.#readersOf.set(image, readers.add(host));
  }

  readersOf(image: string): readonly string[] {
    return [...(this.#readersOf.get(image) ?? [])];
  }

  /** With the key of a group each number is used once. */
  takeSeat(host: string, session: string, member: number): void {
    const seat = `${session} ${member}`;
    if (this.#seats.has(seat)) this.#fail(`${host} takes a seat that another one has had`);
    this.#seats.add(seat);
  }

  /** What is still at work, or null. */
  leftOver(): string | null {
    const [reader] = this.readers;
    if (reader !== undefined) return `${reader.host} still reads`;
    return this.senders.size === 0 ? null : 'a multicast is left over';
  }
}
