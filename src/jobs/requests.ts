/** Turns a request into the plan of a job and its first journal entry, or into the reasons for a refusal. */

import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { ForkPlan, ForkRequest } from '../domain/fork.js';
import type { VmInventory } from '../domain/host.js';
import type { MigrationOrder, MigrationPlan } from '../domain/migration.js';
import type { Refusal } from '../domain/refusal.js';
import type { ForkJobRecord } from '../engine/fork/context.js';
import type { MigrationRecord } from '../engine/migration/context.js';
import type { Clock, Random } from '../engine/ports/clock.js';
import { planFork } from '../planner/fork/plan.js';
import { checkCount } from '../planner/fork/preflight.js';
import { planMigration } from '../planner/migration/plan.js';
import { type FactSources, gatherFacts } from './facts.js';
import { gatherForkFacts } from './fork-facts.js';
import { isCancellable, type Job } from './job.js';
import { isWaitedFor } from './queue.js';

export type Planned<Plan> =
  | { readonly plan: Plan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

interface PlanSources extends FactSources {
  /** Returns the job of this daemon that holds the VM. */
  readonly holderOf: (vm: string) => Job | undefined;
}

export async function planMigrationJob(
  request: MigrationOrder,
  sources: PlanSources,
): Promise<Planned<{ readonly plan: MigrationPlan; readonly vm: VmInventory }>> {
  const facts = await gatherFacts(request, sources);
  if ('ownerElsewhere' in facts) return notOwned(request.vm, facts.ownerElsewhere, sources.host);
  const holder = sources.holderOf(request.vm);
  const vm = { ...facts.vm, job: facts.vm.job ?? holder?.view.id ?? null };
  const isJobCancellable = holder !== undefined && holder.view.id === vm.job && isCancellable(holder);
  const { plan, refusals } = planMigration(request, { ...facts, vm, isJobCancellable });
  return plan === null ? { plan, refusals } : { plan: { plan, vm }, refusals: [] };
}

export async function planForkJob(request: ForkRequest, sources: PlanSources): Promise<Planned<ForkPlan>> {
  const miscounted = [...checkCount(request)];
  if (miscounted.length > 0) return { plan: null, refusals: miscounted };
  const facts = await gatherForkFacts(request, sources);
  if ('ownerElsewhere' in facts) return notOwned(request.vm ?? '', facts.ownerElsewhere, sources.host);
  const { host } = sources;
  const { inventory } = facts;
  const onHosts = facts.hosts === undefined ? {} : { hosts: facts.hosts };
  const holder = request.vm === null ? undefined : sources.holderOf(request.vm);
  const job = inventory.vm.job ?? holder?.view.id ?? null;
  if (holder === undefined || holder.view.id !== job || !isWaitedFor(holder)) {
    const isJobCancellable = holder !== undefined && holder.view.id === job && isCancellable(holder);
    const vm = { ...inventory.vm, job };
    return planFork(request, { host, inventory: { ...inventory, vm }, waitsFor: null, isJobCancellable, ...onHosts });
  }
  // The plan assumes the state of the VM after the holder has ended. The VM is checked again then.
  const vm = { ...inventory.vm, job: null, state: 'running' as const };
  return planFork(request, { host, inventory: { ...inventory, vm, isFilling: false }, waitsFor: job, ...onHosts });
}

/** Checks a fork that has waited. Returns the reason why it cannot begin now, or null. */
export async function reasonAgainst(request: ForkRequest, sources: PlanSources): Promise<MigrationError | null> {
  try {
    const { plan, refusals } = await planForkJob(request, { ...sources, holderOf: () => undefined });
    return plan === null ? refused(whatOf(request), refusals) : null;
  } catch (error) {
    return toMigrationError(error);
  }
}

/** The beginning of a refusal's message. */
export function whatOf({ vm, image }: ForkRequest): string {
  return `${vm ?? `image ${image ?? ''}`} cannot be forked`;
}

interface RecordSources {
  readonly random: Random;
  readonly clock: Clock;
}

export function migrationRecord(
  { plan, vm }: { readonly plan: MigrationPlan; readonly vm: VmInventory },
  { random, clock }: RecordSources,
): MigrationRecord {
  const { spec, epoch, accel, incarnation } = vm;
  return {
    type: 'job',
    job: `job-${random.hex(6)}`,
    session: random.hex(16),
    token: random.hex(32),
    ...(plan.request.verifyMemory === true ? { memoryKey: random.hex(32) } : {}),
    ...{ plan, spec, epoch, accel, ...(incarnation === undefined ? {} : { incarnation }) },
    createdAt: clock.isoNow(),
  };
}

export function forkRecord(plan: ForkPlan, { random, clock }: RecordSources): ForkJobRecord {
  return { type: 'fork', job: `job-${random.hex(6)}`, fork: random.hex(8), plan, createdAt: clock.isoNow() };
}

export function refused(what: string, refusals: readonly Refusal[]): MigrationError {
  const reasons = refusals.map(({ reason }) => reason).join('; ');
  return new MigrationError('PREFLIGHT_REFUSED', `${what}: ${reasons}`, { details: refusals });
}

function notOwned(vm: string, owner: string, host: string) {
  const reason = `${vm} belongs to ${owner}, not to ${host}`;
  return {
    plan: null,
    refusals: [{ code: 'VM_NOT_OWNED', reason, remedy: `ask the daemon on ${owner}` }],
  } as const;
}
