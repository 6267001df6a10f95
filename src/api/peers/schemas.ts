/** Schemas of those arguments and results of calls between hosts (methods.ts) that no client sees. */
import { z } from 'zod';
import { DATA_SECURITIES } from '../../domain/data-security.js';
import { CLONES_MAX } from '../../domain/fork.js';
import { EPOCH_MAX } from '../../domain/host.js';
import { CHUNKS_PER_CALL_MAX } from '../../domain/verification.js';
import { FORK_DECISIONS } from '../../engine/ports/fork.js';
import { SESSION_STATES } from '../../engine/ports/session.js';
import { hostFanout, multicastGroup } from '../../schemas/fanout.js';
import { cloneFailure, cloneIdentity, namePrefix } from '../../schemas/fork.js';
import { forkOrigin, forkShare, imageDisks } from '../../schemas/fork-join.js';
import { hostLimits, vmInventoryBase } from '../../schemas/host.js';
import { imageView } from '../../schemas/image.js';
import { count, list, text } from '../../schemas/of.js';
import { vmSpecSchema } from '../../schemas/vm-spec.js';
import {
  accel,
  cloneDisks,
  cloneMemory,
  cloneNetwork,
  hostName,
  imageFetchMode,
  imageId,
  incarnationId,
  jobId,
  migrationMode,
  parentMode,
  sessionId,
  sessionToken,
  transport,
  vmName,
} from '../../schemas/words.js';

const KEYS_MAX = 64;
const ADDRESS_MAX = 255;
const NAME_MAX = 64;
const PARTS_MAX = 64;

const hex = z
  .string()
  .max(1024)
  .regex(/^[0-9a-f]*$/, 'is not hex');

export const counters = z.record(z.string().max(NAME_MAX), z.number());
export const microseconds = z.number().nonnegative();
export const epoch = z.int().min(1).max(EPOCH_MAX);

export const layerPaths = z.array(z.string().max(4096).startsWith('/')).max(256);

export const vmIdentity = z.strictObject({ name: vmName, uuid: z.string().max(NAME_MAX) });

export const vmIdentities = z.array(vmIdentity).max(CLONES_MAX);

// ---- migrations

export const vmInventory = vmInventoryBase.extend({ spec: vmSpecSchema });

export const rdmaPlace = z.strictObject({ host: z.string().min(1).max(ADDRESS_MAX), port: z.int().min(1).max(65_535) });

export const endpoint = z.strictObject({
  transport,
  host: z.string().min(1).max(ADDRESS_MAX),
  port: z.int().min(0).max(65_535),
  keys: z
    .array(z.strictObject({ ram: hex, dataMap: hex, presence: hex.exactOptional(), dirtyMap: hex.exactOptional() }))
    .max(KEYS_MAX),
  dataSecurity: z.enum(DATA_SECURITIES).exactOptional(),
});

export const exposeRequest = z.strictObject({
  session: sessionId,
  vm: vmName,
  token: sessionToken,
  transport,
  target: hostName,
  isTracked: z.boolean().exactOptional(),
});

export const round = z
  .int()
  .min(1)
  .max(2 ** 32 - 1);

export const dirtyRound = z.object({ round, dirtyPages: count, againPages: count });

export const stopReply = z.object({
  stoppedAtUs: microseconds,
  stoppedForMs: count,
  dirty: dirtyRound.exactOptional(),
});

export const nativeOptions = z.strictObject({
  target: hostName,
  isPostcopy: z.boolean(),
  bandwidthBytesPerS: count,
  downtimeMsMax: count,
});

export const nativeReading = z.record(z.string().max(NAME_MAX), z.union([z.number(), z.string().max(1024)]));

export const prepareRequest = z.strictObject({
  session: sessionId,
  job: jobId,
  spec: vmSpecSchema,
  source: hostName,
  epoch,
  incarnation: incarnationId.exactOptional(),
  mode: migrationMode,
  accel,
  token: sessionToken,
  bandwidthBytesPerS: count,
  memoryKey: sessionToken.exactOptional(),
});

export const chunkRange = z.strictObject({
  region: z.int().min(0).max(KEYS_MAX),
  first: z.int().min(0),
  count: z.int().min(1).max(CHUNKS_PER_CALL_MAX),
});

export const sessionProgress = z.object({
  state: z.enum(SESSION_STATES),
  hasRun: z.boolean(),
  error: z.unknown(),
  pagesTotal: count,
  pagesPresent: count,
  pageBytes: count,
  counters,
  // Hosts of earlier builds do not say how a VM has ended.
  ended: z.object({ reason: z.string().max(NAME_MAX), exitCode: z.int().nullable() }).exactOptional(),
});

// ---- forks

/** The ids of forks and images have the same format. */
export const forkId = imageId;

export const forkQuestion = z.strictObject({
  vm: vmName.nullable(),
  image: imageId.nullable(),
  cloneCount: z.int().min(0).max(CLONES_MAX),
  namePrefix: namePrefix.nullable(),
  parentMode,
  memory: cloneMemory,
  network: cloneNetwork,
  disks: cloneDisks,
  isReplacing: z.boolean().exactOptional(),
  share: forkShare.exactOptional(),
  origin: forkOrigin.exactOptional(),
});

export const prepareForkRequest = forkQuestion.extend({
  fork: forkId,
  job: jobId,
  isPartialAllowed: z.boolean(),
  fetch: imageFetchMode.exactOptional(),
  fanout: hostFanout.exactOptional(),
  hosts: z.array(hostName).max(1024).exactOptional(),
});

export const multicastOffer = z.discriminatedUnion('state', [
  z.object({ state: z.enum(['wait', 'over']) }),
  z.object({
    state: z.literal('joined'),
    seat: z.strictObject({
      group: multicastGroup,
      member: z.int().min(1).max(0xffff),
    }),
  }),
]);

export const multicastSent = z.object({ sentBytes: count });

export const heardProbe = z.object({ largestBytes: count });

export const imageHolder = z.strictObject({
  session: sessionId,
  token: sessionToken,
  endpoint,
  disks: imageDisks.exactOptional(),
});

/** An answer has the digests of 64 MiB, or of one page. */
const DIGESTS_CHARS_MAX = 350_000;

const base64 = z
  .string()
  .max(DIGESTS_CHARS_MAX)
  .regex(/^[A-Za-z0-9+/]*={0,2}$/);

export const imageDigests = z.object({ digests: base64.nullable() });

export const frozenDigests = z.object({ digests: base64 });

export const arrivedDigests = z.object({ digests: base64.nullable(), reason: text.exactOptional() });

/** Why a VM is stopped for good; for people. */
export const damage = z.string().min(1).max(1024);

/** The longest order fits. */
export const touchOrder = z.object({ order: base64 });

export const digestsHash = z.object({
  pageCount: count.nullable(),
  sha256: z.string().regex(/^([0-9a-f]{64})?$/),
});

export const forkInventory = z.object({
  vm: vmInventory,
  image: imageView.nullable(),
  escapingDevices: list(text),
  isWriteProtectSupported: z.boolean(),
  hasPreload: z.boolean(),
  isFilling: z.boolean(),
  diskBlockers: list(text),
  imageBytesFree: count,
  cloneBytesFree: count.optional(),
  memoryAvailableBytes: count,
  imageBytesNeeded: count,
  cloneBytesNeeded: count,
  warmCloneCount: count,
  namesTaken: list(text),
  hostResources: list(z.object({ argument: text, what: text, isOfNetwork: z.boolean() })).exactOptional(),
  namesElsewhere: list(text).exactOptional(),
  namesOfEnded: list(text).exactOptional(),
  diskProblem: z
    .object({ code: z.enum(['DISK_CHANGED', 'DISK_IN_USE']), reason: text })
    .nullable()
    .exactOptional(),
  longChains: list(text).exactOptional(),
  coldReason: text.nullable().exactOptional(),
  servingProblem: text.nullable().exactOptional(),
  argumentFiles: list(text).exactOptional(),
  limits: hostLimits.exactOptional(),
  stateFreeBytes: count.exactOptional(),
});

const clones = z.array(cloneIdentity).max(CLONES_MAX);
const failures = z.array(cloneFailure).max(CLONES_MAX);

export const prepareForkReply = z.object({ image: imageId, isWarm: z.boolean(), clones, failures });

export const forkDecision = z.object({ decision: z.enum(FORK_DECISIONS) });

export const forkPointReply = z.object({
  parentPauseMs: count,
  deviceStateBytes: count,
  parts: z.array(z.object({ name: z.string().max(NAME_MAX), ms: z.number() })).max(PARTS_MAX),
});

export const loadClonesReply = z.object({ failures });

export const runClonesReply = z.object({
  ready: z.array(z.object({ index: count, atMs: z.number() })).max(CLONES_MAX),
  failures,
});

export const forkProgress = z.object({
  state: z.enum(['filling', 'lazy', 'complete', 'failed']),
  error: z.unknown(),
  pagesTotal: count,
  pagesDone: count,
  pageBytes: count,
  counters,
  nearBytes: z.record(hostName, count).exactOptional(),
  committed: z
    .object({
      image: imageId,
      isWarm: z.boolean(),
      clones,
      failures,
      parentPauseMs: count,
      deviceStateBytes: count,
      ready: z.array(z.object({ index: count, at: z.iso.datetime() })).max(CLONES_MAX),
    })
    .nullable(),
});

// ---- images

export const removeImageOptions = z.strictObject({ isForced: z.boolean(), isDroppingSaved: z.boolean() });

export const stoppedVms = z.object({
  stopped: list(vmName),
  failures: list(z.object({ name: vmName, error: z.unknown() })),
});
