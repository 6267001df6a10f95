import { z } from 'zod';
import { CLONES_MAX, DISK_ACCESSES, EARLIER_FORK_STEPS, FORK_STEPS, type ForkReport } from '../domain/fork.js';
import { MIGRATION_STEPS, type MigrationReport } from '../domain/migration.js';
import type { VmSpec } from '../domain/vm.js';
import type { JournalEntry } from '../engine/ports/journal.js';
import { parseKept } from '../kit/unknown-keys.js';
import { fanoutChoice, fanoutPlan } from './fanout.js';
import { sharedStorage } from './storage.js';
import {
  accel,
  cloneDisks,
  cloneMemory,
  cloneNetwork,
  dataSecurity,
  imageFetchMode,
  imageId,
  incarnationId,
  jobState,
  migrationMode,
  migrationStep,
  parentMode,
  placement,
  sessionId,
  sessionToken,
  transport,
  transportChoice,
} from './words.js';

const id = z.string().min(1).max(255);
/**
 * A step of either kind of job. Whether it fits its job's kind is checked when the job's lines are read together
 * (jobs/history.ts).
 */
const step = z.enum([...MIGRATION_STEPS, ...FORK_STEPS, ...EARLIER_FORK_STEPS]);
const amount = z.number().min(0);

const request = z.strictObject({
  vm: id,
  target: id,
  mode: migrationMode,
  transport,
  bandwidthBytesPerS: amount,
  downtimeMsMax: amount,
  sharedStorage: sharedStorage.exactOptional(),
  dataSecurity: dataSecurity.exactOptional(),
  verifyMemory: z.boolean().exactOptional(),
});

const plan = z.strictObject({
  request,
  transportReason: z.string().default(''),
  source: id,
  memoryBytes: amount,
  steps: z.array(
    z.strictObject({
      name: migrationStep,
      host: id,
      text: z.string(),
      isInBlackout: z.boolean(),
      timeoutMs: amount,
    }),
  ),
  notes: z.array(z.string()),
  coldReason: z.string().exactOptional(),
});

const forkRequest = z
  .strictObject({
    vm: id.nullable(),
    image: imageId.nullable(),
    cloneCount: z.int().min(0).max(CLONES_MAX),
    namePrefix: id.nullable(),
    parentMode,
    memory: cloneMemory,
    network: cloneNetwork,
    disks: cloneDisks,
    isPartialAllowed: z.boolean(),
    isReplacing: z.boolean().exactOptional(),
    hosts: z.array(z.strictObject({ host: id, cloneCount: amount.nullable() })).exactOptional(),
    placement: placement.exactOptional(),
    fetch: imageFetchMode.exactOptional(),
    transport: transportChoice.exactOptional(),
    sharedStorage: sharedStorage.exactOptional(),
    dataSecurity: dataSecurity.exactOptional(),
    fanout: fanoutChoice.exactOptional(),
  })
  .refine(({ vm, image }) => (vm === null) !== (image === null), 'must have either a VM or an image');

const forkPlan = z.strictObject({
  request: forkRequest,
  host: id,
  parent: id,
  memoryBytes: amount,
  steps: z.array(
    z.strictObject({
      name: z.enum([...FORK_STEPS, ...EARLIER_FORK_STEPS]),
      host: id,
      text: z.string(),
      isInPause: z.boolean(),
      timeoutMs: amount,
    }),
  ),
  notes: z.array(z.string()),
  shares: z
    .array(
      z.strictObject({
        host: id,
        first: z.int().min(0),
        count: z.int().min(0),
        disks: z.array(z.strictObject({ id, access: z.enum(DISK_ACCESSES) })).exactOptional(),
      }),
    )
    .min(1)
    .exactOptional(),
  transport: transport.exactOptional(),
  transportReason: z.string().exactOptional(),
  fanout: fanoutPlan.exactOptional(),
  coldReason: z.string().exactOptional(),
});

/** Replay reads only these members, so only they are checked. `prepare`, which needs the rest, is never replayed. */
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
    session: sessionId,
    token: sessionToken,
    memoryKey: sessionToken.exactOptional(),
    plan,
    spec,
    epoch: z.int().min(1),
    incarnation: incarnationId.exactOptional(),
    accel,
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
    found: z.unknown().optional(),
  }),
  z.strictObject({ type: z.literal('end'), job: id, step, ms: z.number(), result: z.unknown().optional() }),
  z.strictObject({ type: z.literal('undo'), job: id, step }),
  z.strictObject({ type: z.literal('leftover'), job: id, step }),
  z.strictObject({ type: z.literal('cleared'), job: id, step }),
  z.strictObject({
    type: z.literal('state'),
    job: id,
    state: jobState,
    report: report.optional(),
    error: z.unknown().optional(),
    at: z.iso.datetime().optional(),
  }),
]);

/** Decodes a journal entry. Throws for anything that the journal would not have written. */
export function decodeJournalEntry(json: unknown): JournalEntry {
  const parsed = parseKept(entry, json);
  // The loose parts hold what JobManager wrote; the checksum of the line has protected them since.
  if (parsed.type === 'job') {
    return { ...parsed, spec: parsed.spec as unknown as VmSpec };
  }
  return parsed as Exclude<JournalEntry, { type: 'job' }> & { report?: MigrationReport | ForkReport };
}
