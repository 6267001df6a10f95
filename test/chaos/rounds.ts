/** One move or one fork under one fault, with all checks. A round that throws has found a violation. */
import type { ForkJobView, JobView, MigrationJobView } from '../../src/domain/job.js';
import { isFinal } from '../../src/domain/job.js';
import { eventually } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';
import { expectNothingLeft, expectOnly, homesOf, vmsOn, Watch } from './checks.js';
import { type Fault, inflict, type Scene } from './faults.js';
import type { Field } from './field.js';

const JOB_ENDED_MS = 180_000;
const CLONES = 2;
const MIB = 2 ** 20;

export interface Timing {
  readonly delayMs: number;
  readonly lastingMs: number;
}

export interface MoveRound extends Timing {
  readonly fault: Fault;
  readonly source: string;
  readonly target: string;
  readonly transport: 'tcp' | 'shm';
  /** 0: no limit. */
  readonly bandwidthMiBPerS: number;
}

export interface ForkRound extends Timing {
  readonly fault: Fault;
  readonly host: string;
  readonly parentMode: 'continue' | 'stop';
}

/** The host at which the guest is afterwards; null if it has ended. */
export interface RoundEnd {
  readonly home: string | null;
  readonly outcome: string;
}

export async function moveRound(field: Field, vm: string, round: MoveRound): Promise<RoundEnd> {
  const { fault, source, target, transport, bandwidthMiBPerS } = round;
  // After a cut the kernel takes a host for unreachable for another moment.
  await field.cluster.expectAcquaintance(source);
  const watch = new Watch(field, vm);
  watch.start();
  try {
    const { id } = await field.cluster.api(source).post<MigrationJobView>('/v1/migrations', {
      ...{ vm, target, transport, mode: 'postcopy', bandwidthBytesPerS: bandwidthMiBPerS * MIB },
    });
    const job = await underFault(field, { field, vm, source, target, job: id }, round);
    await watch.stop();
    const home = await theHome(field, vm, fault, job);
    if (home === null) {
      await endEverywhere(field, vm);
      return { home, outcome: job.state };
    }
    const guest = new Guest(field.cluster, vm);
    await guest.expectProgress(home, 2);
    await watch.expectOnce(source, home);
    await guest.expectClean(home);
    for (const host of field.others(home)) await expectNothingLeft(field, host, vm);
    return { home, outcome: job.state };
  } finally {
    await watch.stop();
  }
}

export async function forkRound(field: Field, vm: string, round: ForkRound): Promise<RoundEnd> {
  const { fault, host, parentMode } = round;
  const api = field.cluster.api(host);
  const { id } = await api.post<ForkJobView>('/v1/forks', { vm, cloneCount: CLONES, parentMode });
  const job = await underFault(field, { field, vm, source: host, target: host, job: id }, round);
  const { clones } = job as ForkJobView;
  const [home] = await homesOf(field, vm);
  if (home === undefined && fault.costs?.vm !== true && parentMode === 'continue')
    throw new Error(`the parent has ended: ${describe(job)}`);
  if (job.state === 'lost' && fault.costs?.clones !== true && fault.costs?.vm !== true)
    throw new Error(`the fork is lost: ${describe(job)}`);
  const running = (await vmsOn(field, host)).filter(({ name, state }) => clones.includes(name) && state === 'running');
  if (job.state === 'done' && running.length !== clones.length && fault.costs?.clones !== true)
    throw new Error(`${running.length} of ${clones.length} clones run: ${describe(job)}`);
  for (const name of [...(home === undefined ? [] : [vm]), ...running.map((clone) => clone.name)])
    await new Guest(field.cluster, name).expectClean(host);
  for (const { name } of await vmsOn(field, host))
    if (name !== vm || home === undefined) await field.cluster.must(field.cluster.vmctl(host, 'stop', name, '--force'));
  for (const image of await api.get<{ id: string }[]>('/v1/images'))
    await field.cluster.must(field.cluster.vmctl(host, 'image', 'rm', image.id));
  await expectOnly(field, host, home === undefined ? null : vm);
  return { home: home ?? null, outcome: job.state };
}

/** Returns the job when it has ended and the fault is healed. */
async function underFault(field: Field, scene: Scene, round: Timing & { readonly fault: Fault }): Promise<JobView> {
  await inflict(round.fault, scene, round.delayMs, round.lastingMs);
  // A job that gave up goes on by itself, because every fault is healed.
  return eventually(`job ${scene.job} has ended`, JOB_ENDED_MS, async () => {
    const job = await field.cluster.api(scene.source).get<JobView>(`/v1/jobs/${scene.job}`);
    return isFinal(job.state) ? job : undefined;
  });
}

async function theHome(field: Field, vm: string, fault: Fault, job: JobView): Promise<string | null> {
  const homes = await homesOf(field, vm);
  const [home] = homes;
  if (homes.length > 1) throw new Error(`${vm} runs on ${homes.join(' and ')}: ${describe(job)}`);
  if (home !== undefined) {
    if (job.state === 'lost') throw new Error(`${vm} runs on ${home}, its job says: ${describe(job)}`);
    return home;
  }
  if (fault.costs?.vm !== true) throw new Error(`${vm} runs nowhere: ${describe(job)}`);
  return null;
}

/** Ends what is left of a VM that a fault has ended, as its user would, and expects that nothing remains. */
async function endEverywhere(field: Field, vm: string): Promise<void> {
  for (const host of field.hosts)
    if ((await vmsOn(field, host)).some(({ name }) => name === vm))
      await field.cluster.must(field.cluster.vmctl(host, 'stop', vm, '--force'));
  for (const host of field.hosts) await expectNothingLeft(field, host, vm);
}

function describe({ id, state, error }: JobView): string {
  return `job ${id} is ${state} ${JSON.stringify(error)}`;
}
