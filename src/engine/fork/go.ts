/**
 * The go: the clones of a committed fork run. A host that joined commits its part first, whenever it can be reached.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneFailure } from '../../domain/fork.js';
import { withDeadline } from '../deadline.js';
import type { ForkProgress, RunClonesReply } from '../ports/fork.js';
import type { ForkFindings, ForkStepContext } from './context.js';
import { failuresOf, inOrder, type JoinedHost } from './hosts.js';
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
  const { record, ports, limits } = context;
  const msMax = limits.callMsMax + host.share.count * RUN_MS_PER_CLONE;
  const bounded = <T>(work: Promise<T>, what: string): Promise<T> =>
    withDeadline(ports.clock, work, msMax, `${what} on ${host.host}`);
  try {
    await bounded(host.forks.commitFork(record.fork), 'committing the fork');
    if (isAnyUnknown(context, host)) {
      noteCommitted(context, host, await bounded(host.forks.forkProgress(record.fork), 'asking for the clones'));
    }
    const beganMs = sinceRequestMs(context);
    const reply = await bounded(host.forks.runClones(record.fork), 'letting the clones run');
    const vanished = new MigrationError('NOT_FOUND', `${host.host} has lost the clone before it has run`);
    noteRun(context, reply, beganMs, host, vanished);
  } catch (thrown) {
    const error = toMigrationError(thrown);
    if (error.code !== 'NOT_FOUND') throw error;
    noteLost(context, host, error);
  }
  assign(context, { ran: [...context.findings.ran, host.host] });
}

/** A root that died right after its own commit has lost what this host had answered before. */
function isAnyUnknown({ findings }: ForkStepContext, { share }: JoinedHost): boolean {
  const known = new Set([...findings.clones, ...findings.failures].map(({ index }) => index));
  return Array.from({ length: share.count }, (_, position) => share.first + position).some(
    (index) => !known.has(index),
  );
}

function noteCommitted(context: ForkStepContext, { host }: JoinedHost, { committed }: ForkProgress): void {
  if (committed === null) return;
  const { clones } = context.findings;
  const known = new Set(clones.map(({ index }) => index));
  assign(context, { clones: inOrder([...clones, ...committed.clones.filter(({ index }) => !known.has(index))]) });
  noteFailures(
    context,
    committed.failures.map((failure) => ({ ...failure, host })),
  );
}

/** Notes the answer of a host. `beganMs`: when it was asked, since the request. */
export function noteRun(
  context: ForkStepContext,
  reply: RunClonesReply,
  beganMs: number,
  host: JoinedHost | null,
  vanished: MigrationError | null,
): void {
  const { findings } = context;
  const ready = reply.ready.map(({ index, atMs }) => ({ index, readyMs: Math.max(0, beganMs + atMs) }));
  const answered = new Set(ready.map(({ index }) => index));
  const others = findings.ready.filter(({ index }) => !answered.has(index));
  assign(context, { ready: inOrder([...others, ...ready]) });
  const named = host === null ? {} : { host: host.host };
  noteFailures(
    context,
    inJson(reply.failures).map((failure) => ({ ...failure, ...named })),
  );
  if (host !== null && vanished !== null) noteFailures(context, missing(context, host, vanished));
}

/** The host has lost its part: its clones that have not run never will. */
export function noteLost(context: ForkStepContext, host: JoinedHost, error: MigrationError): void {
  assign(context, { lost: [...context.findings.lost, host.host] });
  noteFailures(context, missing(context, host, error));
}

/** The clones of the host that are neither ready nor named as failures. */
function missing({ findings }: ForkStepContext, { share }: JoinedHost, error: MigrationError): CloneFailure[] {
  const ready = new Set(findings.ready.map(({ index }) => index));
  return failuresOf(share, error, findings.clones).filter(({ index }) => !ready.has(index));
}

/** Adds those failures that are not known yet. */
function noteFailures(context: ForkStepContext, failures: readonly CloneFailure[]): void {
  const known = new Set(context.findings.failures.map(({ index }) => index));
  const others = failures.filter(({ index }) => !known.has(index));
  if (others.length > 0) assign(context, { failures: inOrder([...context.findings.failures, ...others]) });
}

/** The findings outlive an attempt of the step that fails. */
function assign(context: ForkStepContext, found: Partial<ForkFindings>): void {
  Object.assign(context.findings, found);
}
