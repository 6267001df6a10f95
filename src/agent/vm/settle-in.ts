/**
 * Gives a running clone its identity, in the background: its own NICs instead of its parent's, its clock, its host
 * name.
 * The VM's record lists the steps that are still due, so that a restarted daemon does them. Each step is idempotent.
 *
 * The guest's clock continues from the time at which the image was taken. The guest agent sets it, if there is one.
 * Otherwise the guest sets it itself, from its RTC (which follows the host's clock) or by NTP.
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

/** Returns the steps that are due when the VM runs, or an empty object if there are none. */
export function identityDueOf(spec: VmSpec, nics: readonly NicSpec[] = spec.nics): { identityDue?: IdentityDue } {
  const isDue = spec.hasGuestAgent === true || JSON.stringify(nics) !== JSON.stringify(spec.nics);
  return isDue ? { identityDue: { nics, failure: null } } : {};
}

/** Runs the steps that are due. The VM must run. If a step fails, the error is recorded and thrown. */
export async function settleIn(vm: Vm): Promise<void> {
  const due = vm.record.identityDue;
  if (due === null) return;
  try {
    // The NICs come first, because the agent's hook may configure them.
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
    // QEMU_GONE means that QEMU has ended or the daemon exits. It says nothing about the clone's identity.
    if (code !== 'QEMU_GONE') await vm.update({ identityDue: { ...due, failure: message } });
    throw error;
  }
}

/**
 * Joins the new NIC's tap to the bridge. It happens only now, so that the parent's address is never on a bridge twice.
 */
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
 * Sets the guest's clock. The agent also sets the hardware clock and reports an error if it cannot, although the system
 * clock is right by then. So after an error the guest's time decides.
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
  throw new MigrationError('QEMU_FAILED', `the clock of ${name} cannot be set: ${refusal.message}`, { cause: refusal });
}
