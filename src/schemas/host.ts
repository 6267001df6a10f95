/** Schemas of what a host reports about itself and about a VM, for pre-flight and for people. */
import { z } from 'zod';
import { DATA_SECURITIES, RDMA_TRUSTS } from '../domain/data-security.js';
import type { HostInventory, TargetChecks, VmClaims, VmInventory } from '../domain/host.js';
import { EPOCH_MAX } from '../domain/host.js';
import type { RdmaInventory } from '../domain/transport.js';
import { errorJson } from './error.js';
import { count, list, of, text } from './of.js';
import { accel, exitCode, hostName, incarnationId, vmState } from './words.js';

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

const limitUse = z.object({ used: count, max: count }).nullable();

export const hostLimits = z.object({
  openFiles: limitUse,
  openFilesOfHost: limitUse,
  tasks: limitUse,
  mappings: limitUse,
  fileWatchesMax: count.nullable(),
});

export const hostInventory = of<HostInventory>(
  z.object({
    host: hostName,
    machineId: text,
    protocolVersion: count,
    newestProtocolVersion: count.exactOptional(),
    qemuVersion: text.nullable(),
    machines: list(text),
    isKvmUsable: z.boolean(),
    isUserfaultfdPermitted: z.boolean(),
    hasMinorFaults: z.boolean(),
    isPreloadPresent: z.boolean(),
    containmentProblem: text.nullable().exactOptional(),
    memoryAvailableBytes: count,
    ramFileFreeBytes: count,
    ramDirProblem: text.exactOptional(),
    stateFreeBytes: count.exactOptional(),
    hugePagesFree: z.record(text, count),
    dataAddress: text,
    dataSecurity: z.enum(DATA_SECURITIES).exactOptional(),
    canVerifyMemory: z.boolean().exactOptional(),
    canFetchAhead: z.boolean().exactOptional(),
    canTrackWrites: z.boolean().exactOptional(),
    rdmaTrust: z.enum(RDMA_TRUSTS).exactOptional(),
    socketMark: z.object({ path: text, inode: text }).exactOptional(),
    rdma: rdmaInventory,
    vmNames: list(text),
    bridges: list(text),
    cpuCount: count.exactOptional(),
    certificateExpiresAt: text.nullable(),
    clockMs: z.number(),
    limits: hostLimits.optional(),
    qemuProblem: text.optional(),
  }),
);

const forbidden = z.object({ what: text, value: text, key: z.enum(['paths', 'bridges', 'devices', 'qemuArgs']) });

export const targetChecks = of<TargetChecks>(
  z.object({
    disks: list(
      z.object({
        ...{ path: text, isReadable: z.boolean(), isWritable: z.boolean(), reason: text.optional() },
        forbidden: list(forbidden).optional(),
      }),
    ),
    files: list(z.object({ path: text, isReadable: z.boolean() })),
    forbidden: list(forbidden).optional(),
    rdma: z.object({ isReached: z.boolean(), reason: text.optional() }).nullable(),
  }),
);

/** A VM inventory without the spec, which has its own schema (vm-spec.ts). */
export const vmInventoryBase = z.object({
  state: vmState,
  epoch: count,
  owner: text,
  incarnation: incarnationId.exactOptional(),
  job: text.nullable(),
  arrivingFrom: text.exactOptional(),
  qemuVersion: text,
  accel,
  isRamShared: z.boolean(),
  isRamNamedFile: z.boolean(),
  migrationBlockers: list(text),
  ramAllocatedBytes: count,
  discardingDevices: list(text),
  escapingDevices: list(text).exactOptional(),
  directDisks: list(text).exactOptional(),
  image: z.object({ id: text, isComplete: z.boolean(), ownBytes: count }).nullable(),
  identityIssue: text.nullable(),
  fleetingDisks: list(text),
  exitCode: exitCode.nullable(),
  deviceChanges: list(text).exactOptional(),
}) satisfies z.ZodType<Omit<VmInventory, 'spec'>>;

export const doctorCheck = z.object({
  name: text,
  status: z.enum(['ok', 'warn', 'fail']),
  text,
  /** What to do about it; empty if there is nothing to do. */
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

export const vmClaims = of<VmClaims>(
  z.object({
    vms: list(z.object({ name: text, uuid: text, state: text })),
    lastEpoch: z.int().min(0).max(EPOCH_MAX),
    owner: text.nullable(),
    incarnation: text.nullable(),
  }),
);
