/** Checks what must hold when all faults have ended, all daemons run and the job of a fork has ended. */
import type { ForkJobView } from '../../src/domain/job.js';
import { CLONES, type Clone, EARLIER_IMAGE, type ForkHost, type ForkWorld } from './fork-world.js';

export interface AtRest {
  readonly world: ForkWorld;
  readonly job: ForkJobView | null;
  /** The parent's state after a fork that is done. */
  readonly parentState: 'running' | 'paused';
  /** The hosts that take part in every fork that is done. */
  readonly hosts: readonly string[];
}

export function checkAtRest({ world, job, parentState, hosts }: AtRest): void {
  const { parent, clones, killed, ended } = world;
  const state = job?.state ?? null;
  const fail = (what: string): void => world.fail(`at rest (${state}): ${what}`);
  const all = [...world.hosts.values()];
  if (parent.job !== null) fail('the parent is still reserved');
  if (parent.protectedFor !== null) fail('the parent is still write-protected');
  for (const { name, forks } of all) if (forks.size > 0) fail(`a fork is left over on ${name}`);
  const reading = world.fanout.leftOver();
  if (reading !== null) fail(reading);
  const waiting = clones.filter(({ isAlive, hasRun }) => isAlive && !hasRun);
  if (waiting.length > 0) fail(`${waiting.map(({ name }) => name).join(', ')} never ran`);
  const isParentWell = killed.parent || ended.parent;
  if (state === 'done' && job !== null) {
    checkEachClone(world, job, fail);
    const missing = all.filter(({ images }) => [...images.values()].some(({ pages }) => pages.includes(null)));
    const without = hosts.filter((name) => world.host(name).images.size === 0 && !isExcused(world, world.host(name)));
    if (missing.length > 0 || without.length > 0) fail('pages are missing');
    if (!isParentWell && parent.state !== parentState) fail(`the parent is ${parent.state}`);
    return;
  }
  if (state === 'lost') fail('lost, although its files are there');
  if (clones.length > 0) fail(`${clones.length} clones are left over`);
  const images = all.flatMap(({ images: own }) => [...own.keys()]).filter((id) => id !== EARLIER_IMAGE);
  if (images.length > 0) fail('an image is left over');
  if (!isParentWell && parent.state !== 'running') fail('the parent does not run');
}

/** Every clone runs and is named, or is named as a failure. Nothing fails of which nothing has been killed. */
function checkEachClone(world: ForkWorld, { report }: ForkJobView, fail: (what: string) => void): void {
  const named = new Map((report?.clones ?? []).map((clone) => [clone.index, clone]));
  const failed = new Set((report?.failures ?? []).map(({ index }) => index));
  let unexcusedCount = 0;
  for (let index = 0; index < CLONES; index++) {
    const [host, clone] = find(world, index);
    const ready = named.get(index);
    if (ready !== undefined && failed.has(index)) fail(`clone ${index} is named twice`);
    if (ready === undefined && !failed.has(index)) fail(`the report does not name clone ${index}`);
    if (ready !== undefined && (clone === null || !clone.hasRun)) fail(`clone ${index} is ready, but has not run`);
    if (ready !== undefined && ready.host !== host?.name) fail(`clone ${index} is on ${host?.name}`);
    if (failed.has(index) && clone?.hasRun === true && host?.wasDown === false)
      fail(`clone ${index} has run, and failed`);
    const isRunning = clone?.isAlive === true && clone.state === 'running';
    if (!isRunning && host?.wasDown !== true) unexcusedCount++;
  }
  const isAnyDown = [...world.hosts.values()].some(({ wasDown }) => wasDown);
  const { killed, ended, isPartial } = world;
  if (isPartial) return;
  if (unexcusedCount > killed.clones + ended.clones && !isAnyDown) fail(`${unexcusedCount} clones do not run`);
}

function find(world: ForkWorld, index: number): readonly [ForkHost | null, Clone | null] {
  for (const host of world.hosts.values()) {
    for (const clone of host.clones.values()) if (clone.index === index) return [host, clone];
  }
  return [null, null];
}

/** A host that has been down has lost its image, and a partial fork goes on without hosts. */
function isExcused({ isPartial }: ForkWorld, { wasDown }: ForkHost): boolean {
  return isPartial || wasDown;
}
