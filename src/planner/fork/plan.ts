/**
 * Plans a fork: turns request and inventory into typed steps, without side effects. The engine walks exactly these
 * steps, and `--dry-run` prints them.
 */

import type { ForkPlan, ForkRequest, ForkStep, ForkStepName, HostShare } from '../../domain/fork.js';
import type { ForkInventory } from '../../domain/host.js';
import type { Refusal } from '../../domain/refusal.js';
import { transportRow } from '../../domain/transport.js';
import { describeBytes } from '../bytes.js';
import { cloneCountThatFits } from './clone-room.js';
import { type HostsPlan, planHosts } from './hosts.js';
import { type ForkFacts, preflightFork } from './preflight.js';

/** The steps of a fork of a running VM, and those of a fork of an existing image. */
const STEPS_OF_VM: readonly ForkStepName[] = [
  'reserveParent',
  'prepareClones',
  'armParent',
  'connectHosts',
  'forkPoint',
  'loadClones',
  'commitFork',
  'runClones',
  'fillImage',
  'releaseParent',
];
const STEPS_OF_IMAGE: readonly ForkStepName[] = [
  'prepareClones',
  'connectHosts',
  'loadClones',
  'commitFork',
  'runClones',
  'fillImage',
  'releaseParent',
];
/** The steps that only a fork over hosts has. An image that is forked on its own host is complete. */
const STEPS_OF_HOSTS: readonly ForkStepName[] = ['connectHosts'];
const STEPS_OF_IMAGE_ON_HOSTS: readonly ForkStepName[] = ['connectHosts', 'fillImage'];

export const FORK_STEPS_AFTER_COMMIT: readonly ForkStepName[] = ['runClones', 'fillImage', 'releaseParent'];
/** The steps that the journal announces by themselves. The others are announced together, before the first of them. */
export const UNGROUPED_FORK_STEPS: readonly ForkStepName[] = ['fillImage', 'releaseParent'];

type Planned =
  | { readonly plan: ForkPlan; readonly refusals: readonly [] }
  | { readonly plan: null; readonly refusals: readonly Refusal[] };

export function planFork(request: ForkRequest, facts: ForkFacts): Planned {
  const refusals = preflightFork(request, facts);
  if (refusals.length > 0) return { plan: null, refusals };
  const { host, inventory } = facts;
  const parent = inventory.image?.parent ?? inventory.vm.spec.name;
  const memoryBytes = inventory.image?.memoryBytes ?? inventory.vm.spec.memory.sizeBytes;
  const onHosts = planOnHosts(request, facts);
  if (onHosts.plan === null) return onHosts;
  const { notes, ...placed } = onHosts.plan;
  const names = { request, parent, host, memory: describeBytes(memoryBytes), shares: placed.shares ?? [] };
  const steps = stepNames(request.vm !== null, names.shares.length > 1).map(
    (name): ForkStep => ({
      name,
      host,
      text: TEXTS[name](names),
      isInPause: name === 'forkPoint',
      timeoutMs: timeoutMs(name, request, memoryBytes, placed),
    }),
  );
  const { coldReason } = inventory;
  const why = coldReason === undefined || coldReason === null ? {} : { coldReason };
  const { topology: _, ...kept } = request;
  const plan = { request: kept, host, parent, memoryBytes, steps, ...placed, ...why };
  return { plan: { ...plan, notes: [...notesOf(request, facts), ...notes] }, refusals: [] };
}

/** An empty plan if the request names no hosts. */
function planOnHosts(request: ForkRequest, { inventory, hosts }: ForkFacts) {
  const none: Partial<HostsPlan> & Pick<HostsPlan, 'notes'> = { notes: [] };
  if (request.hosts === undefined || hosts === undefined) return { plan: none, refusals: [] as const };
  return planHosts(request, request.hosts, inventory, hosts);
}

function stepNames(isOfVm: boolean, areOtherHosts: boolean): readonly ForkStepName[] {
  const all = isOfVm ? STEPS_OF_VM : STEPS_OF_IMAGE;
  const left = areOtherHosts ? [] : isOfVm ? STEPS_OF_HOSTS : STEPS_OF_IMAGE_ON_HOSTS;
  return all.filter((name) => !left.includes(name));
}

/** Returns the first step that is out of order, or null. The engine refuses a plan that has one. */
export function firstForkStepOutOfOrder(steps: readonly { readonly name: ForkStepName }[]): ForkStepName | null {
  const isOfVm = steps.some(({ name }) => name === 'forkPoint');
  const areOtherHosts = steps.some(({ name }) => name === 'connectHosts');
  const expected = stepNames(isOfVm, areOtherHosts);
  for (const [index, { name }] of steps.entries()) if (expected[index] !== name) return name;
  return expected[steps.length] ?? null;
}

/**
 * Deadlines, shorter than a person would wait. A step that hangs is undone, and the parent is not stopped before
 * `forkPoint`.
 */
const BASE_MS: { readonly [Name in ForkStepName]: number } = {
  reserveParent: 5_000,
  prepareClones: 60_000,
  armParent: 30_000,
  connectHosts: 30_000,
  forkPoint: 10_000,
  loadClones: 30_000,
  runClones: 30_000,
  // 0: no deadline. After one, the outcome of commitFork would be unknown. For fillImage the engine watches progress.
  commitFork: 0,
  fillImage: 0,
  releaseParent: 30_000,
};
const PREPARE_MS_PER_CLONE = 1_000;
const LOAD_MS_PER_CLONE = 500;
const RUN_MS_PER_CLONE = 100;
/** Far slower than write-protecting really is (2 GiB take about 50 ms), to allow for machines under load. */
const ARM_BYTES_PER_MS = 256 * 1024;

/** An RDMA device registers the image on both hosts. A slow machine allocates, clears and locks memory at this rate. */
const REGISTERED_BYTES_PER_MS = 256 * 1024;
/** Clones with memory of their own load when all of the image has arrived, also over a slow network. */
const READ_BYTES_PER_MS = 4 * 1024;

function timeoutMs(
  step: ForkStepName,
  { cloneCount, memory }: ForkRequest,
  memoryBytes: number,
  { transport }: Partial<HostsPlan>,
): number {
  const registerMs =
    transport !== undefined && transportRow(transport).registersMemory ? memoryBytes / REGISTERED_BYTES_PER_MS : 0;
  const readMs = transport !== undefined && memory === 'private' ? memoryBytes / READ_BYTES_PER_MS : 0;
  switch (step) {
    case 'prepareClones':
      return BASE_MS[step] + cloneCount * PREPARE_MS_PER_CLONE;
    case 'loadClones':
      return BASE_MS[step] + cloneCount * LOAD_MS_PER_CLONE + Math.ceil(readMs);
    case 'connectHosts':
      return BASE_MS[step] + Math.ceil(registerMs);
    case 'runClones':
      return BASE_MS[step] + cloneCount * RUN_MS_PER_CLONE;
    case 'armParent':
      return BASE_MS[step] + Math.ceil(memoryBytes / ARM_BYTES_PER_MS);
    default:
      return BASE_MS[step];
  }
}

function notesOf(request: ForkRequest, { inventory, waitsFor }: ForkFacts): string[] {
  const notes: string[] = [];
  if (waitsFor !== null) notes.push(`starts when ${waitsFor}, another fork of ${request.vm}, has ended`);
  const warm = Math.min(inventory.warmCloneCount, request.cloneCount);
  // Waiting processes are used on one host only.
  if (request.hosts !== undefined) return [...notes, ...notesOfAny(request, inventory)];
  notes.push(
    warm === request.cloneCount
      ? 'all QEMU processes are already waiting (warm)'
      : `${request.cloneCount - warm} QEMU processes must be started (cold)`,
  );
  if (inventory.coldReason !== undefined && inventory.coldReason !== null) notes.push(inventory.coldReason);
  const count = cloneCountThatFits(request, inventory);
  if (count < request.cloneCount)
    notes.push(`memory suffices for about ${count} clones; the report will list the others`);
  return [...notes, ...notesOfAny(request, inventory)];
}

function notesOfAny(request: ForkRequest, inventory: ForkInventory): string[] {
  const notes: string[] = [];
  if (request.vm !== null && request.parentMode === 'continue') {
    notes.push(`the pause of ${request.vm} does not depend on its memory size: pages are copied while it runs`);
  }
  if (request.network === 'none' && inventory.vm.spec.nics.length > 0) {
    notes.push('the NICs of the clones are not connected to a network');
  }
  return notes;
}

interface Names {
  readonly request: ForkRequest;
  readonly parent: string;
  readonly host: string;
  readonly memory: string;
  /** Empty if the request names no hosts. */
  readonly shares: readonly HostShare[];
}

const count = (request: ForkRequest): string =>
  request.cloneCount === 1 ? 'one clone' : `${request.cloneCount} clones`;

const TEXTS: { readonly [Name in ForkStepName]: (names: Names) => string } = {
  reserveParent: ({ parent }) => `reserve ${parent} for this job`,
  prepareClones: ({ request, memory, shares }) =>
    `${imageText(request, memory)}, and start a waiting QEMU for each of ${count(request)}${onHosts(shares)}`,
  armParent: ({ request, parent }) =>
    request.parentMode === 'stop'
      ? `create the snapshot files for the disks of ${parent}`
      : `write-protect the memory of ${parent} while it runs, create the snapshot files for its disks`,
  connectHosts: ({ host, shares }) => `let ${othersOf(shares)} connect to ${host}, from which they read the image`,
  forkPoint: ({ request, parent }) =>
    request.parentMode === 'stop'
      ? `stop ${parent} for good, save its device state, snapshot its disks; its memory becomes the image`
      : `stop ${parent}, save its device state, snapshot its disks, protect the pages it has written; resume it`,
  loadClones: ({ request, shares }) =>
    shares.length > 1
      ? `send the device state to ${othersOf(shares)}, and load it into ${count(request)}; none runs yet`
      : `load the device state into ${count(request)}; none runs yet`,
  commitFork: ({ request }) => `commit: from here on the fork stays, and ${count(request)} may run`,
  runClones: ({ request }) => `let ${count(request)} run, and give each its identity`,
  fillImage: ({ request, parent, shares }) =>
    request.parentMode === 'stop'
      ? 'wait until the image is complete'
      : request.vm === null
        ? `let ${othersOf(shares)} read the image; pages that a clone waits for come first`
        : `copy the memory of ${parent} into the image; pages that ${parent} or a clone waits for come first`,
  releaseParent: ({ request, parent }) =>
    request.vm === null || request.parentMode === 'stop'
      ? 'end the fork'
      : `remove the write protection of ${parent} and end its reservation`,
};

const onHosts = (shares: readonly HostShare[]): string => (shares.length > 1 ? `, on ${shares.length} hosts` : '');
const othersOf = (shares: readonly HostShare[]): string =>
  shares.length === 2 ? (shares[1]?.host ?? '') : `${shares.length - 1} other hosts`;

function imageText({ image, parentMode }: ForkRequest, memory: string): string {
  if (image !== null) return `use image ${image} (${memory})`;
  return parentMode === 'stop'
    ? `create an image of the memory files (${memory})`
    : `create an empty image (${memory})`;
}
