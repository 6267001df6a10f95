/** Calls from one daemon life to an agent, over a network that loses, repeats and delays messages. */

import { callOn, type HostCall, hostOfCalls } from '../../src/api/peers/methods.js';
import { MigrationError } from '../../src/domain/errors.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { Life } from './time.js';
import type { Fault, World } from './world.js';

const LATENCY_MS = 0.5;
/** The client's own timeout detects a connection over a cut network. */
const SILENCE_MS = 3_000;

export interface Callee {
  readonly host: 'A' | 'B';
  /** The agent that answers now. Null while the daemon is down. */
  readonly find: () => { agent: HostPort; life: Life } | null;
}

/** The callee as the daemon life `caller` on host `from` sees it. */
export function remoteHost(world: World, from: 'A' | 'B', caller: Life, callee: Callee): HostPort {
  const isRemote = from !== callee.host;
  return hostOfCalls(callee.host, (line, parameters) => call(world, isRemote, caller, callee, line, parameters));
}

async function call(
  world: World,
  isRemote: boolean,
  caller: Life,
  callee: Callee,
  line: HostCall,
  parameters: readonly unknown[],
): Promise<unknown> {
  const label = `${callee.host}.${line.name}`;
  await caller.survive();
  world.event(`call ${label}`);
  await caller.survive();
  const fault = takeCallFault(world);
  if (fault?.kind === 'delayCall') {
    // The request is on its way, whatever happens to the caller. Only the death of the callee ends it.
    return outlive(caller, world, () => arrive(world, isRemote, callee, line, parameters, fault.ms));
  }
  if (fault?.kind === 'repeatCall') {
    void arrive(world, isRemote, callee, line, parameters, fault.ms).catch(() => undefined);
  }
  const answer = await outlive(caller, world, () => arrive(world, isRemote, callee, line, parameters, 0));
  world.event(`answer ${label}`);
  await caller.survive();
  if (fault?.kind === 'loseAnswer' || (isRemote && !world.isNetworkUp)) {
    await caller.sleep(LATENCY_MS);
    throw new MigrationError('UNREACHABLE', `the answer to ${label} was lost`);
  }
  return answer;
}

async function arrive(
  world: World,
  isRemote: boolean,
  callee: Callee,
  line: HostCall,
  parameters: readonly unknown[],
  delayMs: number,
): Promise<unknown> {
  const before = callee.find();
  await pass(world, (isRemote ? LATENCY_MS : 0) + delayMs);
  if (isRemote && !world.isNetworkUp) {
    await pass(world, SILENCE_MS);
    throw new MigrationError('UNREACHABLE', `${callee.host} is silent`);
  }
  const present = callee.find();
  // A request dies with its connection, and a connection dies with the daemon that accepted it.
  if (present === null || (delayMs > 0 && before?.life !== present.life)) {
    throw new MigrationError('UNREACHABLE', `${callee.host} refuses connections`);
  }
  world.event(`arrive ${callee.host}.${line.name}`);
  await present.life.survive();
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

async function outlive<T>(caller: Life, world: World, work: () => Promise<T>): Promise<T> {
  try {
    const value = await work();
    await caller.survive();
    return value;
  } catch (error) {
    await pass(world, 0);
    await caller.survive();
    throw error;
  }
}

function pass(world: World, ms: number): Promise<void> {
  return ms === 0 ? Promise.resolve() : new Promise((resolve) => void world.time.after(ms, resolve));
}

function takeCallFault(world: World): Fault | null {
  const fault = world.callFault;
  world.callFault = null;
  return fault;
}
