import { z } from 'zod';
import { CLONES_MAX, type ForkReport, type ForkStepName } from '../domain/fork.js';
import type { MigrationReport, StepName } from '../domain/migration.js';
import type { VmSpec } from '../domain/vm.js';
import type { JournalEntry } from '../engine/ports/journal.js';

const STEP_NAMES = [
  'reserve',
  'prepareTarget',
  'exposeSource',
  'connectTarget',
  'stopSource',
  'transferState',
  'commit',
  'resumeTarget',
  'drain',
  'releaseSource',
  'nativeStart',
  'nativeSwitchover',
] as const satisfies readonly StepName[];

const FORK_STEP_NAMES = [
  'reserveParent',
  'prepareClones',
  'armParent',
  'forkPoint',
  'startClones',
  'commitFork',
  'fillImage',
  'releaseParent',
] as const satisfies readonly ForkStepName[];

const id = z.string().min(1).max(255);
/** Whether it is a step of its job's kind is seen when the job's lines are read together (engine/history.ts). */
const step = z.enum([...STEP_NAMES, ...FORK_STEP_NAMES]);
const amount = z.number().min(0);

const request = z.strictObject({
  vm: id,
  target: id,
  mode: z.enum(['postcopy', 'native-precopy', 'native-postcopy']),
  transport: z.enum(['tcp', 'shm', 'rdma']),
  bandwidthBytesPerS: amount,
  downtimeMsMax: amount,
});

const plan = z.strictObject({
  request,
  transportReason: z.string().default(''),
  source: id,
  memoryBytes: amount,
  steps: z.array(
    z.strictObject({
      name: z.enum(STEP_NAMES),
      host: id,
      text: z.string(),
      isInBlackout: z.boolean(),
      timeoutMs: amount,
    }),
  ),
  notes: z.array(z.string()),
});

const imageId = z.string().regex(/^[0-9a-f]{16}$/);

const forkRequest = z
  .strictObject({
    vm: id.nullable(),
    image: imageId.nullable(),
    cloneCount: z.int().min(1).max(CLONES_MAX),
    namePrefix: id.nullable(),
    parentMode: z.enum(['continue', 'stop']),
    memory: z.enum(['cow', 'private']),
    network: z.enum(['fresh', 'isolated', 'none']),
    disks: z.enum(['overlay', 'scratch']),
    isPartialAllowed: z.boolean(),
  })
  .refine(({ vm, image }) => (vm === null) !== (image === null), 'is of a VM or of an image');

const forkPlan = z.strictObject({
  request: forkRequest,
  host: id,
  parent: id,
  memoryBytes: amount,
  steps: z.array(
    z.strictObject({
      name: z.enum(FORK_STEP_NAMES),
      host: id,
      text: z.string(),
      isInPause: z.boolean(),
      timeoutMs: amount,
    }),
  ),
  notes: z.array(z.string()),
});

/** Only looked at by people and by `prepare`, which replay never repeats; what replay reads of it is checked. */
const spec = z.looseObject({ name: id, memory: z.looseObject({ pageBytes: z.int().positive() }) });
const report = z.union([
  z.looseObject({ job: id, vm: id, blackoutMs: amount, totalMs: amount }),
  z.looseObject({
    job: id,
    image: imageId,
    parentPauseMs: amount,
    totalMs: amount,
    clones: z.array(z.looseObject({})),
  }),
]);

const entry = z.discriminatedUnion('type', [
  z.strictObject({
    type: z.literal('job'),
    job: id,
    session: z.string().regex(/^[0-9a-f]{32}$/),
    token: z.string().regex(/^[0-9a-f]{64}$/),
    plan,
    spec,
    epoch: z.int().min(1),
    accel: z.enum(['kvm', 'tcg']),
    createdAt: z.iso.datetime(),
  }),
  z.strictObject({
    type: z.literal('fork'),
    job: id,
    fork: imageId,
    plan: forkPlan,
    createdAt: z.iso.datetime(),
  }),
  z.strictObject({
    type: z.literal('begin'),
    job: id,
    step,
    group: z.array(step).optional(),
    at: z.iso.datetime().optional(),
  }),
  z.strictObject({ type: z.literal('end'), job: id, step, ms: z.number(), result: z.unknown().optional() }),
  z.strictObject({ type: z.literal('undo'), job: id, step }),
  z.strictObject({ type: z.literal('leftover'), job: id, step }),
  z.strictObject({ type: z.literal('cleared'), job: id, step }),
  z.strictObject({
    type: z.literal('state'),
    job: id,
    state: z.enum(['queued', 'running', 'recovering', 'done', 'failed', 'cancelled', 'needsRecovery', 'lost']),
    report: report.optional(),
    error: z.unknown().optional(),
    at: z.iso.datetime().optional(),
  }),
]);

/** Throws on anything that this project's journal would not have written. */
export function decodeJournalEntry(json: unknown): JournalEntry {
  const parsed = entry.parse(json);
  // The loose parts hold what JobManager put there; their whole shape is the engine's, checksummed since.
  if (parsed.type === 'job') {
    return { ...parsed, spec: parsed.spec as unknown as VmSpec };
  }
  return parsed as Exclude<JournalEntry, { type: 'job' }> & { report?: MigrationReport | ForkReport };
}
