/**
 * The table of calls between hosts: each method of HostPort once, by role, with the schemas of its arguments and its
 * result. The client (client.ts) and the server (routes.ts) are built from this table. The compiler reports a method
 * that is missing here, and a schema that does not fit the method's types.
 */
import { z } from 'zod';
import type { HostPort, HostRole } from '../../engine/ports/host.js';
import { heardProbes, hearMs, multicastGroup, multicastProvider, roundTrips } from '../../schemas/fanout.js';
import { hostInventory, targetChecks, vmClaims } from '../../schemas/host.js';
import { imageView, removalView } from '../../schemas/image.js';
import { count, list, text } from '../../schemas/of.js';
import { fileView, proofId, storageFile, storageOffer } from '../../schemas/storage.js';
import { vmView } from '../../schemas/vm.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import { exitCode, hostName, imageId, jobId, sessionId, sessionToken, transport, vmName } from '../../schemas/words.js';
import {
  arrivedDigests,
  chunkRange,
  counters,
  damage,
  digestsHash,
  dirtyRound,
  endpoint,
  epoch,
  exposeRequest,
  forkDecision,
  forkId,
  forkInventory,
  forkPointReply,
  forkProgress,
  forkQuestion,
  frozenDigests,
  heardProbe,
  imageDigests,
  imageHolder,
  layerPaths,
  loadClonesReply,
  microseconds,
  multicastOffer,
  multicastSent,
  nativeOptions,
  nativeReading,
  prepareForkReply,
  prepareForkRequest,
  prepareRequest,
  rdmaPlace,
  removeImageOptions,
  round,
  runClonesReply,
  sessionProgress,
  stoppedVms,
  stopReply,
  touchOrder,
  vmIdentities,
  vmIdentity,
  vmInventory,
} from './schemas.js';

/** The arguments are sent as a JSON array, the answer as `{"result": ...}`. A call without a result answers null. */
interface Method<Args extends readonly unknown[], Result> {
  readonly args: z.ZodType<Args>;
  readonly result: z.ZodType<Result>;
  /**
   * How long the caller waits. This limit is generous, because the engine has deadlines of its own. It frees resources
   * that a dead peer would hold for ever.
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
/** For calls that register all memory of a VM with an RDMA device, which may have to allocate it first. */
const REGISTER_MS = 900_000;
/** For QEMU's own migration, whose duration grows with the memory. */
const NATIVE_MS = 24 * 3_600_000;
/** For calls that start one QEMU after the other, for each clone of a fork, or write-protect memory of any size. */
export const CLONES_MS = 1_800_000;

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

/** How long one call fetches: no call between hosts is long. */
const fetchMs = z.int().min(0).max(10_000);

const HOST_METHODS: HostMethods = {
  inventory: {
    inventory: method(z.tuple([]), hostInventory, USUAL_MS),
    vmInventory: method(z.tuple([vmName]), vmInventory, USUAL_MS),
    vmClaims: method(z.tuple([vmIdentities]), z.object({ claims: list(vmClaims) }), SHORT_MS),
    layerHolders: method(z.tuple([layerPaths, vmName.nullable()]), z.object({ holders: list(text) }), SHORT_MS),
    vmViews: method(z.tuple([]), z.object({ vms: list(vmView) }), SHORT_MS),
    checkTarget: method(z.tuple([vmSpecSchema, rdmaPlace.nullable()]), targetChecks, USUAL_MS),
    offerStorage: method(z.tuple([vmName]), storageOffer, USUAL_MS),
    viewStorage: method(z.tuple([proofId, list(storageFile)]), list(fileView), USUAL_MS),
    endStorage: method(z.tuple([proofId]), nothing, USUAL_MS),
  },

  source: {
    reserve: method(vmJob, nothing, USUAL_MS),
    unreserve: method(vmJob, nothing, USUAL_MS),
    expose: method(z.tuple([exposeRequest]), endpoint, USUAL_MS),
    unexpose: method(session, nothing, USUAL_MS),
    noteDirty: method(vmSession, dirtyRound, USUAL_MS),
    stop: method(vmSession, stopReply, USUAL_MS),
    continueVm: method(vmSession, nothing, USUAL_MS),
    transferState: method(z.tuple([vmName, sessionId, hostName]), z.object({ deviceStateBytes: count }), LONG_MS),
    nativeMigrate: method(z.tuple([vmName, sessionId, nativeOptions]), nothing, NATIVE_MS),
    nativeProgress: method(z.tuple([vmName]), nativeReading, SHORT_MS),
    nativeRecover: method(z.tuple([vmName, sessionId, hostName]), nothing, USUAL_MS),
    nativeCancel: method(vmSession, nothing, USUAL_MS),
    digestFrozen: method(z.tuple([sessionId, sessionToken, chunkRange]), frozenDigests, USUAL_MS),
    sourceCounters: method(session, counters, SHORT_MS),
    release: method(vmSession, nothing, USUAL_MS),
  },

  target: {
    prepare: method(z.tuple([prepareRequest]), z.object({ nativeUri: z.string().max(1024).nullable() }), LONG_MS),
    connect: method(z.tuple([sessionId, endpoint]), nothing, REGISTER_MS),
    fetchAhead: method(
      z.tuple([sessionId, fetchMs, z.boolean()]),
      z.object({ isDone: z.boolean(), isHeld: z.boolean() }),
      USUAL_MS,
    ),
    takeBack: method(z.tuple([sessionId, round]), z.object({ pages: count }), USUAL_MS),
    awaitLoaded: method(z.tuple([sessionId, round.optional()]), nothing, LONG_MS),
    resume: method(z.tuple([sessionId, epoch]), z.object({ resumedAtUs: microseconds }), USUAL_MS),
    progress: method(session, sessionProgress, SHORT_MS),
    reconnect: method(z.tuple([sessionId, endpoint]), nothing, REGISTER_MS),
    inherit: method(z.tuple([sessionId, z.strictObject({ exitCode })]), nothing, USUAL_MS),
    digestArrived: method(z.tuple([sessionId, chunkRange]), arrivedDigests, USUAL_MS),
    condemn: method(z.tuple([sessionId, damage]), nothing, USUAL_MS),
    finish: method(session, nothing, USUAL_MS),
    discard: method(session, nothing, USUAL_MS),
  },

  forks: {
    forkInventory: method(z.tuple([forkQuestion]), forkInventory, USUAL_MS),
    prepareClones: method(z.tuple([prepareForkRequest]), prepareForkReply, CLONES_MS),
    armParent: method(fork, nothing, CLONES_MS),
    forkPoint: method(fork, forkPointReply, LONG_MS),
    serveImage: method(z.tuple([imageId, hostName, transport]), imageHolder, REGISTER_MS),
    imageDigests: method(z.tuple([imageId, hostName, count, count]), imageDigests, USUAL_MS),
    endImage: method(z.tuple([imageId, hostName]), nothing, USUAL_MS),
    connectImage: method(z.tuple([forkId, transport]), nothing, REGISTER_MS),
    completeImage: method(z.tuple([imageId]), nothing, USUAL_MS),
    sendForkState: method(z.tuple([forkId, hostName]), loadClonesReply, CLONES_MS),
    loadClones: method(fork, loadClonesReply, CLONES_MS),
    commitFork: method(fork, nothing, USUAL_MS),
    runClones: method(z.tuple([forkId, z.literal('committed').optional()]), runClonesReply, CLONES_MS),
    forkProgress: method(fork, forkProgress, SHORT_MS),
    finishFork: method(fork, nothing, USUAL_MS),
    forkDecision: method(fork, forkDecision, SHORT_MS),
    discardFork: method(fork, nothing, LONG_MS),
  },

  fanout: {
    heldDigests: method(z.tuple([imageId, count, count]), imageDigests, USUAL_MS),
    digestsHash: method(z.tuple([imageId, hostName, count, count]), digestsHash, USUAL_MS),
    serveHeld: method(z.tuple([imageId, hostName, transport]), imageHolder, REGISTER_MS),
    joinMulticast: method(z.tuple([imageId, hostName, multicastProvider, count]), multicastOffer, USUAL_MS),
    touchOrder: method(z.tuple([imageId, hostName]), touchOrder, SHORT_MS),
    multicastSent: method(z.tuple([imageId]), multicastSent, SHORT_MS),
    probeMulticast: method(z.tuple([list(hostName), hearMs, multicastProvider]), heardProbes, USUAL_MS),
    roundTrips: method(z.tuple([list(hostName)]), roundTrips, USUAL_MS),
    echo: method(z.tuple([]), nothing, SHORT_MS),
    // To join a group of an InfiniBand may take as long as its subnet manager does.
    hearMulticast: method(z.tuple([multicastGroup, hearMs]), heardProbe, USUAL_MS),
  },

  images: {
    imageViews: method(z.tuple([imageId.nullable()]), z.object({ images: list(imageView) }), SHORT_MS),
    imageClones: method(z.tuple([imageId]), z.object({ clones: list(vmView) }), SHORT_MS),
    stopClones: method(z.tuple([list(vmIdentity), z.boolean()]), stoppedVms, CLONES_MS),
    removeImage: method(z.tuple([imageId, removeImageOptions]), removalView, CLONES_MS),
  },
};

/** One row of the table. */
export interface HostCall extends Method<readonly unknown[], unknown> {
  readonly role: HostRole;
  /** Unique among all calls. */
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

/** Makes the call on that host. */
export function callOn(host: HostPort, { role, name }: HostCall, args: readonly unknown[]): Promise<unknown> {
  const port = host[role];
  // The table has exactly the methods of the ports.
  const call = Reflect.get(port, name) as AnyCall;
  return call.apply(port, [...args]);
}

/** Returns a host whose calls are all made by `call`. The result of `call` must match the schema of the row. */
export function hostOfCalls(
  host: string,
  call: (line: HostCall, args: readonly unknown[]) => Promise<unknown>,
): HostPort {
  const roles: Record<HostRole, Record<string, AnyCall>> = {
    ...{ inventory: {}, source: {}, target: {}, forks: {}, fanout: {}, images: {} },
  };
  for (const line of HOST_CALLS) roles[line.role][line.name] = (...args) => call(line, args);
  return { host, ...roles } as unknown as HostPort;
}
