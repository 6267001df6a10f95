/** Schemas of migration requests, and of the views of migrations: plan, refusals and report. */
import { z } from 'zod';
import type { MigrationOrder, MigrationPlan, MigrationReport, MigrationRequest } from '../domain/migration.js';
import type { Refusal, RefusalCode } from '../domain/refusal.js';
import { count, list, of, text } from './of.js';
import { sharedStorage } from './storage.js';
import { dataSecurity, hostName, migrationMode, migrationStep, transport, transportChoice, vmName } from './words.js';

const BANDWIDTH_MAX = 2 ** 50;

const DOWNTIME_MS_MAX = 600_000;

export const migrationBody = z.strictObject({
  vm: vmName,
  target: hostName,
  mode: migrationMode.default('postcopy'),
  /** auto: rdma if both hosts have it, else tcp */
  transport: transportChoice.default('auto'),
  /** 0: no limit */
  bandwidthBytesPerS: z.int().min(0).max(BANDWIDTH_MAX).default(0),
  downtimeMsMax: z.int().min(1).max(DOWNTIME_MS_MAX).default(300),
  /** prove: refuse unless both hosts see the same disks. assume: do not look. */
  sharedStorage: sharedStorage.default('prove'),
  /** The least protection of the pages on their way. Default: what the hosts demand. */
  dataSecurity: dataSecurity.exactOptional(),
  /** Prove in the end that the target's memory was what the source's was. */
  verifyMemory: z.boolean().exactOptional(),
  /** Return the plan and start nothing. */
  dryRun: z.boolean().default(false),
});

export type MigrationBody = z.input<typeof migrationBody>;

export function migrationOrder(body: z.output<typeof migrationBody>): MigrationOrder {
  const { dryRun: _, verifyMemory, ...request } = body;
  return verifyMemory === true ? { ...request, verifyMemory } : request;
}

const requestView = of<MigrationRequest>(
  z.object({
    vm: vmName,
    target: hostName,
    mode: migrationMode,
    transport,
    bandwidthBytesPerS: count,
    downtimeMsMax: count,
    sharedStorage: sharedStorage.exactOptional(),
    dataSecurity: dataSecurity.exactOptional(),
    verifyMemory: z.boolean().exactOptional(),
  }),
);

const planView = of<MigrationPlan>(
  z.object({
    request: requestView,
    transportReason: text,
    source: hostName,
    memoryBytes: count,
    steps: list(z.object({ name: migrationStep, host: hostName, text, isInBlackout: z.boolean(), timeoutMs: count })),
    notes: list(text),
  }),
);

/** Any code: a newer peer may have codes that this build does not know. They are shown, not acted upon. */
const refusalCode = text as z.ZodType<string> as z.ZodType<RefusalCode>;

export const refusalView = of<Refusal>(z.object({ code: refusalCode, reason: text, remedy: text }));

export const dryRunView = z.object({ plan: planView.nullable(), refusals: list(refusalView) });

export const reportView = of<MigrationReport>(
  z.object({
    job: text,
    vm: vmName,
    mode: migrationMode,
    transport,
    transportReason: text,
    source: hostName,
    target: hostName,
    memoryBytes: count,
    sharedStorage: sharedStorage.exactOptional(),
    dataSecurity: dataSecurity.exactOptional(),
    verified: z
      .object({ isComplete: z.boolean(), chunks: count, pages: count, ms: count, reason: text.exactOptional() })
      .exactOptional(),
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
    guestEnd: z.object({ reason: text, exitCode: z.int().nullable() }).nullable().exactOptional(),
    phases: list(z.object({ name: text, ms: z.number() })),
  }),
);
