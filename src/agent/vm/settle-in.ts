/**
 * What is done to a clone after it has begun to run, beside everything else: its own NICs instead of its parent's, its
 * clock, its host name. What is still due stands in its record, so that a restarted daemon does it again; each part may
 * be repeated.
 *
 * The clock: a guest's goes on where it stood when the image was taken. The agent sets it, if there is one; else that
 * is up to the guest, by its RTC (which follows the host's clock) or NTP.
 */

import type { GuestAgentLink } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { NicSpec, VmSpec } from '../../domain/vm.js';
import { joinBridge } from './network.js';
import type { IdentityDue } from './record.js';
import type { Vm } from './vm.js';

const AGENT_TIMEOUT_MS = 120_000;
const HOOK_TIMEOUT_MS = 60_000;
const HOSTNAME_PROGRAM = '/bin/hostname';
const CLOCK_ERROR_MS_MAX = 2_000;

/** Nothing, if the VM starts with all that it shall have. */
export function identityDueOf(spec: VmSpec, nics: readonly NicSpec[] = spec.nics): { identityDue?: IdentityDue } {
  const isDue = spec.hasGuestAgent === true || JSON.stringify(nics) !== JSON.stringify(spec.nics);
  return isDue ? { identityDue: { nics, failure: null } } : {};
}

/** The VM runs. Throws what kept it from the rest, which then stands in the record too. */
export async function settleIn(vm: Vm): Promise<void> {
  const due = vm.record.identityDue;
  if (due === null) return;
  try {
    // First, because the agent's hook may want to configure them.
    await vm.process.replaceNics({ spec: vm.spec, nics: due.nics, onPresent: (nic) => connect(vm, nic) });
    const { hasGuestAgent = false } = vm.spec;
    await vm.update(({ spec }) => ({
      spec: { ...spec, nics: due.nics },
      ...(hasGuestAgent ? {} : { identityDue: null }),
    }));
    if (!hasGuestAgent) return;
    await tellAgent(vm);
    await vm.update({ identityDue: null });
  } catch (error) {
    const { code, message } = toMigrationError(error);
    // Its QEMU has ended, or the daemon goes: that is no finding about the clone.
    if (code !== 'QEMU_GONE') await vm.update({ identityDue: { ...due, failure: message } });
    throw error;
  }
}

/** Only now: its parent's address is never seen on a bridge twice. */
async function connect(vm: Vm, nic: NicSpec): Promise<void> {
  const tap = vm.record.taps[nic.id];
  if (nic.type === 'tap' && tap !== undefined) await joinBridge(nic, tap);
}

async function tellAgent(vm: Vm): Promise<void> {
  const { name, clone, guestAgentHook } = vm.spec;
  const agent = await vm.process.guestAgent(AGENT_TIMEOUT_MS);
  try {
    await setClock(agent, name);
    const facts = [clone?.index ?? '', clone?.cloneCount ?? '', name, clone?.fork ?? ''].map(String);
    if (guestAgentHook === undefined) await agent.run(HOSTNAME_PROGRAM, [name], HOOK_TIMEOUT_MS);
    else await agent.run(guestAgentHook, facts, HOOK_TIMEOUT_MS);
  } finally {
    agent.close();
  }
}

/**
 * The agent also tells the hardware clock, and calls it a failure if it cannot, though the guest's own is right by
 * then: what counts is the time it has.
 */
async function setClock(agent: GuestAgentLink, name: string): Promise<void> {
  const refusal = await agent.setTime(Date.now()).then(
    () => null,
    (error: unknown) => toMigrationError(error),
  );
  if (refusal === null) return;
  if (refusal.code !== 'QEMU_FAILED') throw refusal;
  const guestMs = await agent.timeMs();
  if (Math.abs(guestMs - Date.now()) <= CLOCK_ERROR_MS_MAX) return;
  throw new MigrationError('QEMU_FAILED', `the clock of ${name} is wrong: ${refusal.message}`, { cause: refusal });
}
