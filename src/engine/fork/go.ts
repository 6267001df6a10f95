/**
 * The go: the clones of a committed fork run. A host that joined commits its part first, in the same call, whenever it
 * can be reached.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneFailure, HostShare } from '../../domain/fork.js';
import { withDeadline } from '../deadline.js';
import type { ForkPort, RunClonesReply } from '../ports/fork.js';
import type { ForkStepContext } from './context.js';
import { failuresOf, type JoinedHost, rootShare, withOthers } from './hosts.js';
import { inJson } from './steps.js';

/** A host that answers more slowly is asked again while the images fill. */
const RUN_MS_PER_CLONE = 100;

/** Time since the request, also in a later life of the daemon. */
export function sinceRequestMs({ record, ports, marks }: ForkStepContext): number {
  return marks.startedAtMs === null
    ? Date.parse(ports.clock.isoNow()) - Date.parse(record.createdAt)
    : ports.clock.nowMs() - marks.startedAtMs;
}

/** Lets the clones of a host that joined run, and notes in the findings what has become of them. */
export async function runJoined(context: ForkStepContext, host: JoinedHost): Promise<void> {
  const { ports, limits } = context;
  const msMax = limits.callMsMax + host.share.count * RUN_MS_PER_CLONE;
  const beganMs = sinceRequestMs(context);
  try {
    const running = commitAndRun(context, host);
    const reply = await withDeadline(ports.clock, running, msMax, `letting the clones run on ${host.host}`);
    noteRun(context, reply, beganMs, host);
    await learnClones(context, host.forks, reply);
  } catch (thrown) {
    const error = toMigrationError(thrown);
    if (error.code !== 'NOT_FOUND') throw error;
    noteLost(context, host, error);
  }
  // The findings outlive an attempt of the step that fails.
  context.findings.ran = [...context.findings.ran, host.host];
}

/**
 * The root's record has decided. A host that refuses the commit has discarded its part, or was left out by a daemon
 * that could not journal it. Its record says which, and the question is the undo, as on the root: what is discarded
 * never runs. Throws NOT_FOUND if nothing is left there.
 */
async function commitAndRun({ record }: ForkStepContext, { host, forks }: JoinedHost): Promise<RunClonesReply> {
  try {
    return await forks.runClones(record.fork, 'committed');
  } catch (thrown) {
    const refusal = toMigrationError(thrown);
    if (refusal.code !== 'CONFLICT') throw refusal;
    try {
      await forks.discardFork(record.fork);
    } catch (error) {
      // It is committed there, so its clones run as soon as what has kept them from it is gone.
      if (toMigrationError(error).code === 'CONFLICT') throw refusal;
      throw error;
    }
    const message = `${host} has discarded its part of the fork: ${refusal.message}`;
    throw new MigrationError('NOT_FOUND', message, { cause: refusal });
  }
}

/**
 * In a later life of the daemon the findings may lack the identities of the clones that have run. Their host has them
 * until it ends the fork.
 */
export async function learnClones(
  { record, ports, limits, findings }: ForkStepContext,
  forks: ForkPort,
  { ready }: RunClonesReply,
): Promise<void> {
  const known = new Set(findings.clones.map(({ index }) => index));
  if (ready.every(({ index }) => known.has(index))) return;
  const asking = withDeadline(ports.clock, forks.forkProgress(record.fork), limits.callMsMax, 'asking for the clones');
  const committed = (await unlessForgotten(asking))?.committed?.clones ?? [];
  findings.clones = withOthers(findings.clones, committed);
}

/** Notes the answer of a host: a clone that it does not name has been lost before it has run. Null: the root. */
export function noteRun(
  context: ForkStepContext,
  reply: RunClonesReply,
  beganMs: number,
  joined: JoinedHost | null,
): void {
  const { findings, record } = context;
  const { host, share } = joined ?? { host: record.plan.host, share: rootShare(record) };
  const ready = reply.ready.map(({ index, atMs }) => ({ index, readyMs: Math.max(0, beganMs + atMs) }));
  findings.ready = withOthers(ready, findings.ready);
  const named = joined === null ? {} : { host };
  noteFailures(
    context,
    inJson(reply.failures).map((failure) => ({ ...failure, ...named })),
  );
  const vanished = new MigrationError('NOT_FOUND', `${host} has lost the clone before it has run`);
  noteFailures(context, missing(context, share, vanished));
}

/** The host has ended its clones, also those that have run. */
export function noteEnded(context: ForkStepContext, host: JoinedHost, error: MigrationError): void {
  const { first, count } = host.share;
  const { findings } = context;
  findings.ready = findings.ready.filter(({ index }) => index < first || index >= first + count);
  noteLost(context, host, error);
}

/** The host has lost its part: its clones that have not run never will. */
function noteLost(context: ForkStepContext, host: JoinedHost, error: MigrationError): void {
  context.findings.lost = [...context.findings.lost, host.host];
  noteFailures(context, missing(context, host.share, error));
}

/** The clones of the host that are neither ready nor named as failures. */
function missing({ findings }: ForkStepContext, share: HostShare, error: MigrationError): CloneFailure[] {
  const ready = new Set(findings.ready.map(({ index }) => index));
  return failuresOf(share, error, findings.clones).filter(({ index }) => !ready.has(index));
}

/** Adds those failures that are not known yet. */
export function noteFailures({ findings }: ForkStepContext, failures: readonly CloneFailure[]): void {
  findings.failures = withOthers(findings.failures, failures);
}

/**
 * Returns null if the agent does not know the fork any more: the fork was finished there, and the journal may lack
 * that; or the host has lost its part.
 */
export async function unlessForgotten<T>(asking: Promise<T>): Promise<T | null> {
  try {
    return await asking;
  } catch (thrown) {
    if (toMigrationError(thrown).code === 'NOT_FOUND') return null;
    throw thrown;
  }
}
