/** From a request to the plan of a job and its first line in the journal, or to the reasons why there is none. */
import type { MigrationOrder, MigrationPlan, Refusal, VmInventory } from '../domain.js';
import type { ForkPlan, ForkRequest } from '../domain-fork.js';
import type { JobRecord } from '../engine/context.js';
import type { ForkRecord } from '../engine/fork-context.js';
import type { Clock, Random } from '../engine/ports.js';
import { MigrationError } from '../errors.js';
import { planFork } from '../planner/fork-plan.js';
import { checkCount } from '../planner/fork-preflight.js';
import { planMigration } from '../planner/plan.js';
import { type FactSources, gatherFacts, gatherForkFacts } from './facts.js';

export type Planned<Plan> =
  | { readonly plan: Plan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

interface PlanSources extends FactSources {
  /** The job of this daemon that has the VM. */
  readonly jobOf: (vm: string) => string | undefined;
}

export async function planMigrationJob(
  request: MigrationOrder,
  sources: PlanSources,
): Promise<Planned<{ readonly plan: MigrationPlan; readonly vm: VmInventory }>> {
  const facts = await gatherFacts(request, sources);
  if ('ownerElsewhere' in facts) return notOwned(request.vm, facts.ownerElsewhere, sources.host);
  const vm = { ...facts.vm, job: facts.vm.job ?? sources.jobOf(request.vm) ?? null };
  const { plan, refusals } = planMigration(request, { ...facts, vm });
  return plan === null ? { plan, refusals } : { plan: { plan, vm }, refusals: [] };
}

export async function planForkJob(request: ForkRequest, sources: PlanSources): Promise<Planned<ForkPlan>> {
  const miscounted = [...checkCount(request)];
  if (miscounted.length > 0) return { plan: null, refusals: miscounted };
  const facts = await gatherForkFacts(request, sources);
  if ('ownerElsewhere' in facts) return notOwned(request.vm ?? '', facts.ownerElsewhere, sources.host);
  const { inventory } = facts;
  const job = inventory.vm.job ?? (request.vm === null ? undefined : sources.jobOf(request.vm)) ?? null;
  return planFork(request, { host: sources.host, inventory: { ...inventory, vm: { ...inventory.vm, job } } });
}

interface RecordSources {
  readonly random: Random;
  readonly clock: Clock;
}

export function migrationRecord(
  { plan, vm }: { readonly plan: MigrationPlan; readonly vm: VmInventory },
  { random, clock }: RecordSources,
): JobRecord {
  const { spec, epoch, accel } = vm;
  return {
    type: 'job',
    job: `job-${random.hex(6)}`,
    session: random.hex(16),
    token: random.hex(32),
    ...{ plan, spec, epoch, accel },
    createdAt: clock.isoNow(),
  };
}

export function forkRecord(plan: ForkPlan, { random, clock }: RecordSources): ForkRecord {
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
