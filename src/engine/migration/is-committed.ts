/**
 * Whether a move is committed, which decides whether its source may run the VM again. The owner record says so if it is
 * at least as new as the job: `reserve` notes the session in it before anything else happens. A record without that
 * note, or none, has been lost or restored. Then "no record" does not mean "mine": the VM may run on the target. So the
 * target decides, and without its answer nothing runs.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { withDeadline } from '../deadline.js';
import type { OwnerRecord } from '../ports/registry.js';
import type { CommitEvidence } from '../walk.js';
import type { StepContext } from './context.js';

/**
 * Returns true also if the answer to the swap was lost, or the daemon died between the swap and the journal entry.
 * Throws if the registry, or the target that has to decide, cannot answer.
 */
export async function isCommitted(context: StepContext, evidence: CommitEvidence): Promise<boolean> {
  const { record, ports } = context;
  const { vm, target } = record.plan.request;
  const owner = await ports.registry.owner(vm);
  if (owner?.session === record.session && owner.owner === target) return true;
  if (owner !== null && owner.epoch > record.epoch) return evidence === 'proven';
  const isKnown = evidence === 'none' ? owner?.epoch === record.epoch : owner?.leaving === record.session;
  if (isKnown && evidence !== 'proven') return false;
  // Without an announcement the VM has not left: it belonged here when the job was made.
  const hasRun = evidence === 'proven' || (evidence === 'announced' && (await askTarget(context)));
  await repairRecord(context, owner, hasRun);
  return hasRun;
}

/** Returns whether the target has run the VM. If it has not, its session has ended, so that it never will. */
async function askTarget({ record, ports, limits, observer }: StepContext): Promise<boolean> {
  const { session, plan } = record;
  const { vm, target } = plan.request;
  const ask = <T>(call: Promise<T>): Promise<T> =>
    withDeadline(ports.clock, call, limits.callMsMax, `asking ${target} whether it runs ${vm}`);
  observer.onWarning(
    `the owner record of ${vm} is missing, or older than its job: ${target} is asked whether it runs ${vm}`,
    new MigrationError('CORRUPT', 'the owner record has been lost or restored'),
  );
  try {
    if ((await ask(ports.target.progress(session))).hasRun) return true;
  } catch (thrown) {
    const { code } = toMigrationError(thrown);
    if (code !== 'NOT_FOUND' && code !== 'CONFLICT') throw thrown;
  }
  try {
    await ask(ports.target.discard(session));
    return false;
  } catch (thrown) {
    if (toMigrationError(thrown).code === 'CONFLICT') return true;
    throw thrown;
  }
}

/** Writes the record that the answer proves, so that later calls need not ask again. */
async function repairRecord(
  { record, ports }: StepContext,
  present: OwnerRecord | null,
  hasRun: boolean,
): Promise<void> {
  const { vm, target } = record.plan.request;
  const { source } = record.plan;
  const { session, epoch, incarnation } = record;
  const { registry } = ports;
  const known = { vm, ...(incarnation === undefined ? {} : { incarnation }) };
  const before = present?.epoch ?? null;
  if (hasRun) return registry.swapOwner(vm, before, { ...known, owner: target, epoch: epoch + 1, session });
  if (present?.epoch !== epoch) await registry.swapOwner(vm, before, { ...known, owner: source, epoch, session: null });
  await registry.announceMove(vm, epoch, session);
}
