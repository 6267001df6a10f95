/**
 * What goes over the API, as zod schemas: requests of clients, and the domain's views as they travel between hosts.
 * Requests are strict: an unknown key is an error that names it. The types are the domain's own; a schema that falls
 * behind its type does not compile.
 */
import { z } from 'zod';
import type { CauseJson, ErrorCode, ErrorJson } from '../domain/errors.js';
import { CAUSES_MAX, ERROR_CODES } from '../domain/errors.js';
import type { HostInventory, TargetChecks, VmInventory } from '../domain/host.js';
import type { MigrationOrder, MigrationPlan, MigrationReport, MigrationRequest } from '../domain/migration.js';
import type { Refusal, RefusalCode } from '../domain/refusal.js';
import type { RdmaInventory } from '../domain/transport.js';
import type { VmView } from '../domain/vm.js';

const TEXT_MAX = 4096;
const LIST_MAX = 4096;

export const text = z.string().max(TEXT_MAX);
export const count = z.number().nonnegative();
export const list = <T extends z.ZodType>(item: T) => z.array(item).max(LIST_MAX);

/** T as zod writes it: what may be missing may also be undefined. */
type Shape<T> = T extends readonly (infer Item)[]
  ? readonly Shape<Item>[]
  : T extends object
    ? { [K in keyof T]: Shape<T[K]> | (Pick<T, K> extends Required<Pick<T, K>> ? never : undefined) }
    : T;

/** The schema of a domain type: one that lacks a member, or holds a wider one, does not compile. */
export function of<T>(schema: z.ZodType<Shape<T>>): z.ZodType<T> {
  return schema as z.ZodType<unknown> as z.ZodType<T>;
}

export const vmName = z
  .string()
  .min(1)
  .max(64)
  .regex(/^[A-Za-z0-9][A-Za-z0-9._-]*$/, 'is not a VM name');
export const hostName = z
  .string()
  .min(1)
  .max(48)
  .regex(/^[A-Za-z0-9][A-Za-z0-9._-]*$/, 'is not a host name');
export const jobId = z
  .string()
  .min(1)
  .max(64)
  .regex(/^[A-Za-z0-9-]+$/, 'is not a job id');
/** 128 bits. */
export const exitCode = z.int().min(0).max(255);
export const sessionId = z.string().regex(/^[0-9a-f]{32}$/, 'is not a session id');
export const sessionToken = z.string().regex(/^[0-9a-f]{64}$/, 'is not a session token');

export const accelSchema = z.enum(['kvm', 'tcg']);
export const transportSchema = z.enum(['tcp', 'shm', 'rdma']);
const transportChoice = z.enum(['auto', 'tcp', 'shm', 'rdma']);
export const modeSchema = z.enum(['postcopy', 'native-precopy', 'native-postcopy']);
const vmState = z.enum(['starting', 'running', 'paused', 'incoming', 'departed', 'stopped']);
export const stepName = z.enum([
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
]);

// ---- requests
// ---------------------------------------------------------------------------------------------------------------------------

const BANDWIDTH_MAX = 2 ** 50;
const DOWNTIME_MS_MAX = 600_000;

export const migrationBody = z.strictObject({
  vm: vmName,
  target: hostName,
  mode: modeSchema.default('postcopy'),
  /** auto: rdma where both hosts have it, else tcp */
  transport: transportChoice.default('auto'),
  /** 0: no limit */
  bandwidthBytesPerS: z.int().min(0).max(BANDWIDTH_MAX).default(0),
  downtimeMsMax: z.int().min(1).max(DOWNTIME_MS_MAX).default(300),
  /** Answer the plan and start nothing. */
  dryRun: z.boolean().default(false),
});
export type MigrationBody = z.input<typeof migrationBody>;

export const stopBody = z.strictObject({ force: z.boolean().default(false) }).nullish();
export const emptyBody = z.strictObject({}).nullish();
export const vmParams = z.strictObject({ name: vmName });
export const jobParams = z.strictObject({ id: jobId });

export function migrationOrder(body: z.output<typeof migrationBody>): MigrationOrder {
  const { dryRun: _, ...request } = body;
  return request;
}

// ---- views
// ------------------------------------------------------------------------------------------------------------------------------

const errorCode = z.enum(Object.keys(ERROR_CODES) as [ErrorCode, ...ErrorCode[]]);
const ofAnyCause = {
  message: z.string(),
  remedy: z.string().optional(),
  step: z.string().optional(),
  session: z.string().optional(),
  isRetryable: z.boolean().optional(),
  details: z.unknown().optional(),
};

/** A cause with at most so many below it. Level by level: JSON of a peer must not decide how deep a parser goes. */
function causeJson(levels: number): z.ZodType<CauseJson> {
  const own = { code: errorCode.optional(), name: z.string().optional(), ...ofAnyCause };
  if (levels === 0) return of<CauseJson>(z.object(own));
  return of<CauseJson>(z.object({ ...own, cause: causeJson(levels - 1).optional() }));
}

export const errorJson = of<ErrorJson>(
  z.object({ code: errorCode, ...ofAnyCause, cause: causeJson(CAUSES_MAX - 1).optional() }),
).meta({ id: 'Error', description: 'What failed, and below it why.' });

export const vmView = of<VmView>(
  z.object({
    name: vmName,
    uuid: text,
    host: hostName,
    state: vmState,
    epoch: count,
    memoryBytes: count,
    pid: count.nullable(),
    machine: text,
    accel: accelSchema,
    job: text.nullable(),
    serialLog: text.nullable(),
    image: text.nullable(),
    exitCode: z.int().nullable(),
    exit: z
      .object({
        at: text,
        reason: text,
        code: z.int().nullable(),
        signal: text.nullable(),
        exitCode: z.int().nullable(),
      })
      .nullable(),
    identityIssue: text.nullable(),
  }),
);

const rdmaInventory = of<RdmaInventory>(
  z.object({
    problem: z.object({ reason: text, remedy: text }).nullable(),
    devices: list(
      z.object({
        name: text,
        isOnDemandPaging: z.boolean(),
        ports: list(
          z.object({
            number: count,
            isActive: z.boolean(),
            state: text,
            linkLayer: text,
            mtuBytes: count,
            gids: list(text),
            addresses: list(text),
          }),
        ),
      }),
    ),
    address: text.nullable(),
    port: count.nullable(),
    lockableBytes: count.nullable(),
    cgroupFreeBytes: count.nullable(),
  }),
);

export const hostInventory = of<HostInventory>(
  z.object({
    host: hostName,
    machineId: text,
    protocolVersion: count,
    qemuVersion: text.nullable(),
    machines: list(text),
    isKvmUsable: z.boolean(),
    isUserfaultfdPermitted: z.boolean(),
    hasMinorFaults: z.boolean(),
    isPreloadPresent: z.boolean(),
    memoryAvailableBytes: count,
    ramFileFreeBytes: count,
    hugePagesFree: z.record(text, count),
    dataAddress: text,
    rdma: rdmaInventory,
    vmNames: list(text),
    bridges: list(text),
    certificateExpiresAt: text.nullable(),
    clockMs: z.number(),
  }),
);

export const targetChecks = of<TargetChecks>(
  z.object({
    disks: list(z.object({ path: text, isReadable: z.boolean(), isWritable: z.boolean(), reason: text.optional() })),
    files: list(z.object({ path: text, isReadable: z.boolean() })),
    rdma: z.object({ isReached: z.boolean(), reason: text.optional() }).nullable(),
  }),
);

/** Without the spec, which has a schema of its own (agent/spec.ts). */
export const vmInventoryBase = z.object({
  state: vmState,
  epoch: count,
  owner: text,
  job: text.nullable(),
  qemuVersion: text,
  accel: accelSchema,
  isRamShared: z.boolean(),
  isRamNamedFile: z.boolean(),
  migrationBlockers: list(text),
  ramAllocatedBytes: count,
  discardingDevices: list(text),
  image: z.object({ id: text, isComplete: z.boolean(), ownBytes: count }).nullable(),
  identityIssue: text.nullable(),
  fleetingDisks: list(text),
  exitCode: exitCode.nullable(),
}) satisfies z.ZodType<Omit<VmInventory, 'spec'>>;

const requestView = of<MigrationRequest>(
  z.object({
    vm: vmName,
    target: hostName,
    mode: modeSchema,
    transport: transportSchema,
    bandwidthBytesPerS: count,
    downtimeMsMax: count,
  }),
);

export const planView = of<MigrationPlan>(
  z.object({
    request: requestView,
    transportReason: text,
    source: hostName,
    memoryBytes: count,
    steps: list(z.object({ name: stepName, host: hostName, text, isInBlackout: z.boolean(), timeoutMs: count })),
    notes: list(text),
  }),
);

/** A newer peer may know more reasons than we do; they are shown, not acted upon. */
const refusalCode = text as z.ZodType<string> as z.ZodType<RefusalCode>;
export const refusalView = of<Refusal>(z.object({ code: refusalCode, reason: text, remedy: text }));
export const dryRunView = z.object({ plan: planView.nullable(), refusals: list(refusalView) });

export const reportView = of<MigrationReport>(
  z.object({
    job: text,
    vm: vmName,
    mode: modeSchema,
    transport: transportSchema,
    transportReason: text,
    source: hostName,
    target: hostName,
    memoryBytes: count,
    blackoutMs: count,
    blackoutByEventsMs: z.number(),
    degradedMs: count,
    totalMs: count,
    rounds: count,
    bytes: z.object({ push: count, demand: count, prefetch: count, zeroSkipped: count, deviceState: count }),
    faults: z.object({ count, p50Us: count, p99Us: count, maxUs: count }),
    sourceCpuS: count,
    targetCpuS: count,
    reconnects: count,
    phases: list(z.object({ name: text, ms: z.number() })),
  }),
);

export const doctorCheck = z.object({
  name: text,
  status: z.enum(['ok', 'warn', 'fail']),
  text,
  /** What to do about it; empty when there is nothing to do. */
  remedy: text,
});
export type DoctorCheck = z.output<typeof doctorCheck>;

export const hostView = z.object({
  host: hostName,
  url: text.nullable(),
  isSelf: z.boolean(),
  isReachable: z.boolean(),
  roundTripMs: count.nullable(),
  error: errorJson.nullable(),
  inventory: hostInventory.nullable(),
});
export type HostView = z.output<typeof hostView>;

export const daemonView = z.object({
  host: hostName,
  version: text,
  pid: count,
  startedAt: text,
  residentBytes: count,
  inventory: hostInventory,
});
export type DaemonView = z.output<typeof daemonView>;
