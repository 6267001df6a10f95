/** Calls from one daemon life to an agent, over a network that loses, repeats and delays messages. */

import { callOn, type HostCall, hostOfCalls } from '../../src/api/peers/methods.js';
import { MigrationError } from '../../src/domain/errors.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { Life, Time } from './time.js';

const LATENCY_MS = 0.5;
/** The client's own timeout detects a connection over a cut network. */
const SILENCE_MS = 3_000;

/** What a call meets on its way. */
export interface CallFault {
  readonly kind: string;
  readonly ms: number;
}

export interface Net {
  readonly time: Time;
  /** An event at which a fault may strike. */
  event(label: string): void;
  /** Messages pass between the two hosts. */
  isLinked(one: string, other: string): boolean;
  /** Returns the fault for this call, which strikes no other call. */
  takeCallFault(): CallFault | null;
}

export interface Callee {
  readonly host: string;
  /** The agent that answers now. Null while the daemon is down. */
  readonly find: () => { agent: HostPort; life: Life } | null;
}

/** The callee as the daemon life `caller` on host `from` sees it. */
export function remoteHost(net: Net, from: string, caller: Life, callee: Callee): HostPort {
  const way = { net, from, caller, callee };
  return hostOfCalls(callee.host, (line, parameters) => call(way, line, parameters));
}

interface Way {
  readonly net: Net;
  readonly from: string;
  readonly caller: Life;
  readonly callee: Callee;
}

async function call(way: Way, line: HostCall, parameters: readonly unknown[]): Promise<unknown> {
  const { net, from, caller, callee } = way;
  const label = `${callee.host}.${line.name}`;
  await caller.survive();
  net.event(`call ${label}`);
  const fault = net.takeCallFault();
  await caller.survive();
  if (fault?.kind === 'failCall') throw new MigrationError('TIMEOUT', `${label} was not begun`);
  if (fault?.kind === 'delayCall') {
    // The request is on its way, whatever happens to the caller. Only the death of the callee ends it.
    return outlive(way, () => arrive(way, line, parameters, fault.ms));
  }
  if (fault?.kind === 'repeatCall') {
    void arrive(way, line, parameters, fault.ms).catch(() => undefined);
  }
  const answer = await outlive(way, () => arrive(way, line, parameters, 0));
  net.event(`answer ${label}`);
  await caller.survive();
  if (fault?.kind === 'loseAnswer' || !net.isLinked(from, callee.host)) {
    await caller.sleep(LATENCY_MS);
    throw new MigrationError('UNREACHABLE', `the answer to ${label} was lost`);
  }
  return answer;
}

async function arrive(
  { net, from, callee }: Way,
  line: HostCall,
  parameters: readonly unknown[],
  delayMs: number,
): Promise<unknown> {
  const before = callee.find();
  await pass(net, (from === callee.host ? 0 : LATENCY_MS) + delayMs);
  if (!net.isLinked(from, callee.host)) {
    await pass(net, SILENCE_MS);
    throw new MigrationError('UNREACHABLE', `${callee.host} is silent`);
  }
  const present = callee.find();
  // A request dies with its connection, and a connection dies with the daemon that accepted it.
  if (present === null || (delayMs > 0 && before?.life !== present.life)) {
    throw new MigrationError('UNREACHABLE', `${callee.host} refuses connections`);
  }
  net.event(`arrive ${callee.host}.${line.name}`);
  if (!present.life.isAlive) throw new MigrationError('UNREACHABLE', `${callee.host} has hung up`);
  const work = callOn(present.agent, line, parameters);
  // A daemon that dies resets its connections.
  return new Promise((resolve, reject) => {
    work.then(resolve, reject);
    const watch = (): void => {
      if (present.life.isAlive) return;
      reject(new MigrationError('UNREACHABLE', `${callee.host} has hung up`));
    };
    present.life.onDeath(watch);
    watch();
  });
}

async function outlive<T>({ net, caller }: Way, work: () => Promise<T>): Promise<T> {
  try {
    const value = await work();
    await caller.survive();
    return value;
  } catch (error) {
    await pass(net, 0);
    await caller.survive();
    throw error;
  }
}

function pass(net: Net, ms: number): Promise<void> {
  return ms === 0 ? Promise.resolve() : new Promise((resolve) => void net.time.after(ms, resolve));
}
