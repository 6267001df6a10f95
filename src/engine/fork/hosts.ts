/**
 * The hosts of a fork, as its steps see them. The root has the parent or the image, and its record decides. The other
 * hosts join: each makes its share of the clones, on an image that it reads from the root.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { CloneFailure, CloneIdentity, ForkStepName, HostShare } from '../../domain/fork.js';
import { withDeadline } from '../deadline.js';
import type { ForkPort } from '../ports/fork.js';
import type { ForkJobRecord, ForkStepContext } from './context.js';

/** A host that joins the fork. */
export interface JoinedHost {
  readonly host: string;
  readonly share: HostShare;
  readonly forks: ForkPort;
}

/** Returns the hosts that join the fork and take part in it still. */
export function joinedHosts({
  record,
  ports,
  findings,
}: Pick<ForkStepContext, 'record' | 'ports' | 'findings'>): JoinedHost[] {
  const left = new Set(findings.leftOut);
  return othersOf(record)
    .filter(({ host }) => !left.has(host))
    .map((share) => ({ host: share.host, share, forks: ports.forksOf(share.host) }));
}

/** Returns the share of the root, or undefined if it makes all clones. */
export function ownShare({ plan }: ForkJobRecord): HostShare | undefined {
  return plan.shares?.find(({ host }) => host === plan.host);
}

/** The same, also if the root makes all clones. */
export function rootShare(record: ForkJobRecord): HostShare {
  const { host, request } = record.plan;
  return ownShare(record) ?? { host, first: 0, count: request.cloneCount };
}

export function othersOf({ plan }: ForkJobRecord): readonly HostShare[] {
  return (plan.shares ?? []).filter(({ host }) => host !== plan.host);
}

export interface HostOutcomes<T> {
  /** In the order of the hosts. */
  readonly done: readonly { readonly host: JoinedHost; readonly value: T }[];
  readonly failed: readonly { readonly host: JoinedHost; readonly error: MigrationError }[];
}

/** Makes a call on every host at the same time, and waits for all of them. Never rejects. */
export async function onAll<T>(
  hosts: readonly JoinedHost[],
  call: (host: JoinedHost) => Promise<T>,
): Promise<HostOutcomes<T>> {
  const outcomes = await Promise.allSettled(hosts.map(call));
  const done: { host: JoinedHost; value: T }[] = [];
  const failed: { host: JoinedHost; error: MigrationError }[] = [];
  for (const [index, host] of hosts.entries()) {
    const outcome = outcomes[index];
    if (outcome?.status === 'fulfilled') done.push({ host, value: outcome.value });
    else failed.push({ host, error: namingHost(host.host, toMigrationError(outcome?.reason)) });
  }
  return { done, failed };
}

/** A fork that may go on without a host must know in time that the host does not answer. */
const SHARE_OF_STEP = 0.75;

/**
 * The same for a step before the commit. Unless the request allows a part of the clones, it rejects as soon as one call
 * fails: the undo ends what the other calls still do.
 */
export async function onAllNeeded<T>(
  { record, ports }: Pick<ForkStepContext, 'record' | 'ports'>,
  step: ForkStepName,
  hosts: readonly JoinedHost[],
  call: (host: JoinedHost) => Promise<T>,
): Promise<HostOutcomes<T>> {
  if (record.plan.request.isPartialAllowed) {
    const stepMs = record.plan.steps.find(({ name }) => name === step)?.timeoutMs ?? 0;
    const what = (host: JoinedHost): string => `${step} on ${host.host}`;
    return onAll(hosts, (host) => withDeadline(ports.clock, call(host), stepMs * SHARE_OF_STEP, what(host)));
  }
  const named = async (host: JoinedHost) => ({
    host,
    value: await call(host).catch((error: unknown) => {
      throw namingHost(host.host, toMigrationError(error));
    }),
  });
  return { done: await Promise.all(hosts.map(named)), failed: [] };
}

/** The name as a word of its own: a VM may be called like its host, with more behind it. */
function nameOf(host: string): RegExp {
  return new RegExp(String.raw`(^|[^\w.-])${host.replaceAll('.', String.raw`\.`)}($|[^\w.-]|\.(\W|$))`);
}

export function namingHost(host: string, error: MigrationError): MigrationError {
  if (nameOf(host).test(error.message)) return error;
  return new MigrationError(error.code, `${host}: ${error.message}`, {
    isRetryable: error.isRetryable,
    ...(error.remedy === undefined ? {} : { remedy: error.remedy }),
    ...(error.details === undefined ? {} : { details: error.details }),
    cause: error,
  });
}

/**
 * What becomes of the hosts that have failed before the commit of a fork which may go on without them: they take no
 * part any more, and their clones are named as failures. A host that does not hear of it asks, and learns it at the
 * latest when the root has ended the fork (`forkDecision`).
 */
export function leaveOut(
  context: ForkStepContext,
  failed: HostOutcomes<unknown>['failed'],
  known: readonly CloneIdentity[],
): { readonly leftOut: readonly string[]; readonly failures: readonly CloneFailure[] } {
  const { record, findings, observer } = context;
  for (const { host, error } of failed) {
    observer.onWarning(`${host.host} takes no part in the fork`, error);
    host.forks.discardFork(record.fork).catch(() => undefined);
  }
  const leftOut = [...findings.leftOut, ...failed.map(({ host }) => host.host)];
  const failures = failed.flatMap(({ host, error }) => failuresOf(host.share, error, known));
  return { leftOut, failures };
}

/** Tells the hosts that were left out once more, in case they have not heard of it. Never rejects. */
export async function tellLeftOut({ record, ports, limits, findings, observer }: ForkStepContext): Promise<void> {
  const hosts = joinedHosts({ record, ports, findings: { ...findings, leftOut: [] } });
  const left = hosts.filter(({ host }) => findings.leftOut.includes(host));
  const { failed } = await onAll(left, ({ host, forks }) =>
    withDeadline(ports.clock, forks.discardFork(record.fork), limits.callMsMax, `discarding the fork on ${host}`),
  );
  for (const { host, error } of failed) {
    if (error.code === 'NOT_FOUND') continue;
    observer.onWarning(
      `${host.host} may still have a part of a fork that has left it out: it asks for it later`,
      error,
    );
  }
}

/** The clones of a share as failures. Their names follow from that of any other clone. */
export function failuresOf(share: HostShare, error: MigrationError, known: readonly CloneIdentity[]): CloneFailure[] {
  const stem = known[0]?.name.replace(/\d+$/, '');
  return Array.from({ length: share.count }, (_, position) => {
    const index = share.first + position;
    const name =
      known.find((clone) => clone.index === index)?.name ?? (stem === undefined ? `${index}` : `${stem}${index}`);
    return { index, name, error: error.toJSON(), host: share.host };
  });
}

/**
 * Discards the fork on the hosts that join it. Throws UNREACHABLE if one of them has not confirmed it: its part is then
 * undone later, and nothing waits for it.
 */
export async function discardJoined({ record, ports, limits, findings }: ForkStepContext): Promise<void> {
  const hosts = joinedHosts({ record, ports, findings: { ...findings, leftOut: [] } });
  const { failed } = await onAll(hosts, ({ host, forks }) =>
    withDeadline(ports.clock, forks.discardFork(record.fork), limits.callMsMax, `discarding the fork on ${host}`),
  );
  const left = failed.filter(({ error }) => error.code !== 'NOT_FOUND');
  if (left.length === 0) return;
  const names = left.map(({ host }) => host.host).join(', ');
  throw new MigrationError('UNREACHABLE', `${names}: the fork is not undone there yet`, { cause: left[0]?.error });
}

/**
 * Throws CONFLICT if two clones have the same index, name, UUID or address. `parentMacs`: the parent's addresses, which
 * clones keep on a network that they do not share.
 */
export function checkIdentities(clones: readonly CloneIdentity[], parentMacs: ReadonlySet<string>): void {
  const seen = new Set<string>();
  for (const { index, name, uuid, macs } of clones) {
    const own = Object.values(macs).filter((mac) => !parentMacs.has(mac));
    for (const thing of [`index ${index}`, `name ${name}`, `UUID ${uuid}`, ...own.map((mac) => `address ${mac}`)]) {
      if (seen.has(thing)) throw new MigrationError('CONFLICT', `two clones of the fork have the same ${thing}`);
      seen.add(thing);
    }
  }
}

export function inOrder<Item extends { readonly index: number }>(items: readonly Item[]): Item[] {
  return [...items].sort((one, other) => one.index - other.index);
}

/** The known items, and those of the others that are not known yet, in their order. */
export function withOthers<Item extends { readonly index: number }>(
  known: readonly Item[],
  others: readonly Item[],
): Item[] {
  const indexes = new Set(known.map(({ index }) => index));
  return inOrder([...known, ...others.filter(({ index }) => !indexes.has(index))]);
}
