/** The target's half of the commit: its own owner record, without which it never runs the VM. */
import { MigrationError } from '../../domain/errors.js';
import type { OwnerRecord, Registry } from '../../engine/ports/registry.js';
import type { PrepareRequest } from '../../engine/ports/session.js';
import type { TargetRecord } from './session-store.js';

/**
 * Throws OWNER_CHANGED if this host knows that another VM of that name, started separately, has been in the epoch from
 * which this one comes. Then at least one of the two was started beside the other, or from an old copy of its records.
 */
export function refuseOtherStart(
  present: OwnerRecord | null,
  { spec, source, epoch, incarnation }: Pick<PrepareRequest, 'spec' | 'source' | 'epoch' | 'incarnation'>,
  host: string,
): void {
  if (present === null || present.epoch < epoch) return;
  const isOther = incarnation !== undefined && present.incarnation !== undefined && incarnation !== present.incarnation;
  if (present.epoch === epoch && !isOther) return;
  const { name } = spec;
  const known = `${host} knows ${present.epoch === epoch ? 'another start' : 'a later state'} of ${name}`;
  throw new MigrationError('OWNER_CHANGED', `${known}: it belongs to ${present.owner} in epoch ${present.epoch}`, {
    remedy:
      `make sure that ${name} runs on ${source} alone; then "vmctl stop ${name}" on ${host} if it is listed there, ` +
      `and stop and run it again on ${source}: a new start is newer than all records`,
  });
}

/** Throws CONFLICT for another epoch than the next one of the VM, as it was announced when the session began. */
export function refuseOtherEpoch({ spec, epoch: before }: Pick<TargetRecord, 'spec' | 'epoch'>, epoch: number): void {
  if (epoch === before + 1) return;
  throw new MigrationError('CONFLICT', `the next epoch of ${spec.name} is ${before + 1}, not ${epoch}`);
}

/**
 * Makes `next` the owner record of this host. This is the one durable write between the commit and the guest's first
 * instruction. `epochBefore` is the epoch of the record that this host had when the session began; null: it had none.
 * A repeated call finds its own record. Throws OWNER_CHANGED if the host knows an owner that is as new.
 */
export async function takeOwnership(registry: Registry, next: OwnerRecord, epochBefore: number | null): Promise<void> {
  const { vm, owner: host, epoch, session } = next;
  const isTaken = async () => {
    const owner = await registry.owner(vm);
    return owner?.owner === host && owner.session === session && owner.epoch === epoch;
  };
  if (epochBefore !== null && epochBefore >= epoch) {
    if (await isTaken()) return;
    throw new MigrationError(
      'OWNER_CHANGED',
      `${vm} has epoch ${epochBefore} on this host; epoch ${epoch} is not newer`,
    );
  }
  await registry.swapOwner(vm, epochBefore, next).catch(async (error: unknown) => {
    if (!(await isTaken())) throw error;
  });
}

/**
 * Returns the owner record when the daemon takes up a session. The session's record may say that the VM has run while
 * the owner record does not: then that is older, and is written anew.
 */
export async function ownerAfterRestart(
  registry: Registry,
  host: string,
  { session, spec, epoch, incarnation, state }: TargetRecord,
): Promise<OwnerRecord | null> {
  const owner = await registry.owner(spec.name);
  const hasRun = state === 'resumed' || state === 'complete';
  if (!hasRun || (owner !== null && owner.epoch > epoch)) return owner;
  const known = { vm: spec.name, owner: host, epoch: epoch + 1, session };
  const next = incarnation === undefined ? known : { ...known, incarnation };
  await registry.swapOwner(spec.name, owner?.epoch ?? null, next);
  return next;
}
