/**
 * The calls between hosts: each method of HostPort once, by role, with the schemas of its arguments and its result.
 * Client (client.ts) and server (routes.ts) are made of this table. A method of a port that is missing here, or whose
 * schema does not fit its types, does not compile.
 */
import { z } from 'zod';
import type { HostPort, HostRole } from '../../engine/ports/host.js';
import { hostInventory, targetChecks } from '../../schemas/host.js';
import { count } from '../../schemas/of.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import { exitCode, hostName, jobId, sessionId, vmName } from '../../schemas/words.js';
import {
  counters,
  endpoint,
  epoch,
  exposeRequest,
  forkId,
  forkInventory,
  forkPointReply,
  forkProgress,
  forkQuestion,
  microseconds,
  nativeOptions,
  nativeReading,
  prepareForkReply,
  prepareForkRequest,
  prepareRequest,
  rdmaPlace,
  sessionProgress,
  startClonesReply,
  vmInventory,
} from './schemas.js';

/** Arguments travel as a JSON array, the answer as `{"result": ...}`; what has no result answers null. */
interface Method<Args extends readonly unknown[], Result> {
  readonly args: z.ZodType<Args>;
  readonly result: z.ZodType<Result>;
  /**
   * How long the caller waits. Generous: the engine has deadlines of its own, this one frees what a dead peer would
   * hold for ever.
   */
  readonly timeoutMs: number;
}

type MethodOf<Call> = Call extends (...args: infer Args) => Promise<infer Result>
  ? Method<Args, [Result] extends [void] ? null : Result>
  : never;

type HostMethods = {
  readonly [Role in HostRole]: { readonly [Name in keyof HostPort[Role]]: MethodOf<HostPort[Role][Name]> };
};

const SHORT_MS = 5_000;
const USUAL_MS = 30_000;
const LONG_MS = 180_000;
/** All of a VM's memory is registered with an RDMA device, which may have to allocate it first. */
const REGISTER_MS = 900_000;
/** QEMU's own migration may take as long as the memory is large. */
const NATIVE_MS = 24 * 3_600_000;
/** As many QEMUs as a fork may have clones, one after the other; memory of any size that is write-protected. */
const CLONES_MS = 1_800_000;

const method = <Args extends readonly unknown[], Result>(
  args: z.ZodType<Args>,
  result: z.ZodType<Result>,
  timeoutMs: number,
): Method<Args, Result> => ({ args, result, timeoutMs });

const nothing = z.null();
const session = z.tuple([sessionId]);
const vmSession = z.tuple([vmName, sessionId]);
const vmJob = z.tuple([vmName, jobId]);
const fork = z.tuple([forkId]);

const HOST_METHODS: HostMethods = {
  inventory: {
    inventory: method(z.tuple([]), hostInventory, USUAL_MS),
    vmInventory: method(z.tuple([vmName]), vmInventory, USUAL_MS),
    checkTarget: method(z.tuple([vmSpecSchema, rdmaPlace.nullable()]), targetChecks, USUAL_MS),
  },

  source: {
    reserve: method(vmJob, nothing, USUAL_MS),
    unreserve: method(vmJob, nothing, USUAL_MS),
    expose: method(z.tuple([exposeRequest]), endpoint, USUAL_MS),
    unexpose: method(session, nothing, USUAL_MS),
    stop: method(vmSession, z.object({ stoppedAtUs: microseconds, stoppedForMs: count }), USUAL_MS),
    continueVm: method(vmSession, nothing, USUAL_MS),
    transferState: method(z.tuple([vmName, sessionId, hostName]), z.object({ deviceStateBytes: count }), LONG_MS),
    nativeMigrate: method(z.tuple([vmName, sessionId, nativeOptions]), nothing, NATIVE_MS),
    nativeProgress: method(z.tuple([vmName]), nativeReading, SHORT_MS),
    nativeCancel: method(vmSession, nothing, USUAL_MS),
    sourceCounters: method(session, counters, SHORT_MS),
    release: method(vmSession, nothing, USUAL_MS),
  },

  target: {
    prepare: method(z.tuple([prepareRequest]), z.object({ nativeUri: z.string().max(1024).nullable() }), LONG_MS),
    connect: method(z.tuple([sessionId, endpoint]), nothing, REGISTER_MS),
    awaitLoaded: method(session, nothing, LONG_MS),
    resume: method(z.tuple([sessionId, epoch]), z.object({ resumedAtUs: microseconds }), USUAL_MS),
    progress: method(session, sessionProgress, SHORT_MS),
    reconnect: method(z.tuple([sessionId, endpoint]), nothing, REGISTER_MS),
    inherit: method(z.tuple([sessionId, z.strictObject({ exitCode })]), nothing, USUAL_MS),
    finish: method(session, nothing, USUAL_MS),
    discard: method(session, nothing, USUAL_MS),
  },

  forks: {
    forkInventory: method(z.tuple([forkQuestion]), forkInventory, USUAL_MS),
    prepareClones: method(z.tuple([prepareForkRequest]), prepareForkReply, CLONES_MS),
    armParent: method(fork, nothing, CLONES_MS),
    forkPoint: method(fork, forkPointReply, LONG_MS),
    startClones: method(fork, startClonesReply, CLONES_MS),
    commitFork: method(fork, nothing, USUAL_MS),
    forkProgress: method(fork, forkProgress, SHORT_MS),
    finishFork: method(fork, nothing, USUAL_MS),
    discardFork: method(fork, nothing, LONG_MS),
  },
};

/** One line of the table. */
export interface HostCall extends Method<readonly unknown[], unknown> {
  readonly role: HostRole;
  /** Unlike that of any other call. */
  readonly name: string;
}

export const HOST_CALLS: readonly HostCall[] = Object.entries(HOST_METHODS).flatMap(([role, methods]) =>
  Object.entries(methods as Readonly<Record<string, Method<readonly unknown[], unknown>>>).map(([name, line]) => ({
    role: role as HostRole,
    name,
    ...line,
  })),
);

type AnyCall = (...args: readonly unknown[]) => Promise<unknown>;

/** The call on that host. */
export function callOn(host: HostPort, { role, name }: HostCall, args: readonly unknown[]): Promise<unknown> {
  const port = host[role];
  // The table has the methods of the ports and no other.
  const call = Reflect.get(port, name) as AnyCall;
  return call.apply(port, [...args]);
}

/** A host whose every call is made by `call`, which answers what the call's schema says. */
export function hostOfCalls(
  host: string,
  call: (line: HostCall, args: readonly unknown[]) => Promise<unknown>,
): HostPort {
  const roles: Record<HostRole, Record<string, AnyCall>> = { inventory: {}, source: {}, target: {}, forks: {} };
  for (const line of HOST_CALLS) roles[line.role][line.name] = (...args) => call(line, args);
  return { host, ...roles } as unknown as HostPort;
}
