/**
 * The host-to-host calls: one line for each method of AgentPort. Server and client both walk this table, and a method
 * of the port that is missing here does not compile.
 */

import { z } from 'zod';
import type { AgentPort } from '../../engine/ports/agent.js';
import { SESSION_STATES } from '../../engine/ports/session.js';
import { hostInventory, targetChecks, vmInventoryBase } from '../../schemas/host.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import {
  accel,
  exitCode,
  hostName,
  jobId,
  migrationMode,
  sessionId,
  sessionToken,
  transport,
  vmName,
} from '../../schemas/words.js';

export type AgentMethod = {
  [M in keyof AgentPort]: AgentPort[M] extends (...args: never[]) => Promise<unknown> ? M : never;
}[keyof AgentPort];

/** Arguments travel as a JSON array, the answer as `{"result": ...}`; what has no result answers null. */
export interface MethodDefinition {
  readonly args: z.ZodType<readonly unknown[]>;
  readonly result: z.ZodType;
  /**
   * How long the caller waits. Generous: the engine has deadlines of its own, this one frees what a dead peer would
   * hold for ever.
   */
  readonly timeoutMs: number;
}

const SHORT_MS = 5_000;
const USUAL_MS = 30_000;
const LONG_MS = 180_000;
/** All of a VM's memory is registered with an RDMA device, which may have to allocate it first. */
const REGISTER_MS = 900_000;
/** QEMU's own migration may take as long as the memory is large. */
const NATIVE_MS = 24 * 3_600_000;
const KEYS_MAX = 64;
const ADDRESS_MAX = 255;

const hex = z
  .string()
  .max(1024)
  .regex(/^[0-9a-f]*$/, 'is not hex');
const counters = z.record(z.string().max(64), z.number());
const endpoint = z.strictObject({
  transport,
  host: z.string().min(1).max(ADDRESS_MAX),
  port: z.int().min(0).max(65_535),
  keys: z.array(z.strictObject({ ram: hex, dataMap: hex })).max(KEYS_MAX),
});
const rdmaPlace = z.strictObject({ host: z.string().min(1).max(ADDRESS_MAX), port: z.int().min(1).max(65_535) });
const epoch = z.int().min(1);
const microseconds = z.number().nonnegative();
const nothing = z.null();

const prepareRequest = z.strictObject({
  session: sessionId,
  job: jobId,
  spec: vmSpecSchema,
  source: hostName,
  epoch,
  mode: migrationMode,
  accel,
  token: sessionToken,
  bandwidthBytesPerS: z.number().nonnegative(),
});

const sessionProgress = z.object({
  state: z.enum(SESSION_STATES),
  hasRun: z.boolean(),
  error: z.unknown(),
  pagesTotal: z.number().nonnegative(),
  pagesPresent: z.number().nonnegative(),
  pageBytes: z.number().nonnegative(),
  counters,
});

const method = (args: z.ZodType<readonly unknown[]>, result: z.ZodType, timeoutMs: number): MethodDefinition => ({
  args,
  result,
  timeoutMs,
});
const session = z.tuple([sessionId]);
const vmSession = z.tuple([vmName, sessionId]);

export const AGENT_METHODS: { readonly [M in AgentMethod]: MethodDefinition } = {
  inventory: method(z.tuple([]), hostInventory, USUAL_MS),
  vmInventory: method(z.tuple([vmName]), vmInventoryBase.extend({ spec: vmSpecSchema }), USUAL_MS),
  checkTarget: method(z.tuple([vmSpecSchema, rdmaPlace.nullable()]), targetChecks, USUAL_MS),

  prepare: method(z.tuple([prepareRequest]), z.object({ nativeUri: z.string().max(1024).nullable() }), LONG_MS),
  connect: method(z.tuple([sessionId, endpoint]), nothing, REGISTER_MS),
  awaitLoaded: method(session, nothing, LONG_MS),
  resume: method(z.tuple([sessionId, epoch]), z.object({ resumedAtUs: microseconds }), USUAL_MS),
  progress: method(session, sessionProgress, SHORT_MS),
  reconnect: method(z.tuple([sessionId, endpoint]), nothing, REGISTER_MS),
  inherit: method(z.tuple([sessionId, z.strictObject({ exitCode })]), nothing, USUAL_MS),
  finish: method(session, nothing, USUAL_MS),
  discard: method(session, nothing, USUAL_MS),

  reserve: method(z.tuple([vmName, jobId]), nothing, USUAL_MS),
  unreserve: method(z.tuple([vmName, jobId]), nothing, USUAL_MS),
  expose: method(
    z.tuple([
      z.strictObject({
        session: sessionId,
        vm: vmName,
        token: sessionToken,
        transport,
        target: hostName,
      }),
    ]),
    endpoint,
    USUAL_MS,
  ),
  unexpose: method(session, nothing, USUAL_MS),
  stop: method(vmSession, z.object({ stoppedAtUs: microseconds, stoppedForMs: z.number().nonnegative() }), USUAL_MS),
  continueVm: method(vmSession, nothing, USUAL_MS),
  transferState: method(
    z.tuple([vmName, sessionId, hostName]),
    z.object({ deviceStateBytes: z.number().nonnegative() }),
    LONG_MS,
  ),
  nativeMigrate: method(
    z.tuple([
      vmName,
      sessionId,
      z.strictObject({
        uri: z.string().min(1).max(1024),
        isPostcopy: z.boolean(),
        bandwidthBytesPerS: z.number().nonnegative(),
        downtimeMsMax: z.number().nonnegative(),
      }),
    ]),
    nothing,
    NATIVE_MS,
  ),
  nativeProgress: method(
    z.tuple([vmName]),
    z.record(z.string().max(64), z.union([z.number(), z.string().max(1024)])),
    SHORT_MS,
  ),
  nativeCancel: method(vmSession, nothing, USUAL_MS),
  sourceCounters: method(session, counters, SHORT_MS),
  release: method(vmSession, nothing, USUAL_MS),
};

export const AGENT_METHOD_NAMES = Object.keys(AGENT_METHODS) as readonly AgentMethod[];
