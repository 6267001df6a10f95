/**
 * The record of a fork: what a daemon must know to finish or undo it after a restart. Saving a record with the state
 * `committed` is the one write after which the clones may run.
 */

import { z } from 'zod';
import type { ErrorJson } from '../../domain/errors.js';
import type { CloneIdentity } from '../../domain/fork.js';
import type { Transport } from '../../domain/transport.js';
import { RecordFiles, type RecordKind } from '../../durable/record-files.js';
import type { CommittedFork, PrepareForkRequest } from '../../engine/ports/fork.js';
import { hostFanout } from '../../schemas/fanout.js';
import { forkOrigin, forkShare } from '../../schemas/fork-join.js';
import {
  cloneDisks,
  cloneMemory,
  cloneNetwork,
  hostName,
  imageFetchMode,
  imageId,
  incarnationId,
  parentMode,
  transport,
} from '../../schemas/words.js';
import { checkImageId } from '../image/record.js';

/**
 * preparing: nothing of the fork is kept after a crash · prepared: until the commit · committed: its clones run or wait
 * for the go, and its image may still be filling
 */
const FORK_RECORD_STATES = ['preparing', 'prepared', 'committed'] as const;
export type ForkRecordState = (typeof FORK_RECORD_STATES)[number];

export interface ForkRecord {
  readonly version: 1;
  readonly request: PrepareForkRequest;
  readonly state: ForkRecordState;
  /** Absent: an earlier build has prepared the fork. Its clones run before the commit. */
  readonly runsAfterCommit?: true;
  /** It differs from the fork's id if the fork took a waiting set or runs an existing image. */
  readonly image: string;
  readonly isWarm: boolean;
  /** How a host that joins wants to read the image. Absent: nobody has said so yet. */
  readonly transport?: Transport;
  /** Present: a host that joined has been let go by the coordinator, and reads on demand what its clones touch. */
  readonly isReleased?: true;
  /** Present: a user wants all of the image here, although the fork does not. */
  readonly isCompleting?: true;
  /** Present: the fork is over here. The record only says, to its coordinator, that it was committed. */
  readonly isFinished?: true;
  /** The start of the parent that was forked (`OwnerRecord`). Another VM may have its name when the fork is undone. */
  readonly incarnation?: string;
  /** The clones that have not failed. In a committed record these are the clones that may run. */
  readonly clones: readonly CloneIdentity[];
  /**
   * The other results, for a coordinator that has lost them. Null before the commit. `ready` is written once more when
   * the clones run. It may lack clones that have run, because nobody waits for that write.
   */
  readonly outcome: ForkOutcome | null;
  /** The reason why the image cannot be filled, or null. With a failure, the clones are ended. */
  readonly failure: ErrorJson | null;
}

export type ForkOutcome = Omit<CommittedFork, 'image' | 'isWarm' | 'clones'>;

const requestSchema: z.ZodType<PrepareForkRequest> = z.strictObject({
  fork: imageId,
  job: z.string().max(256),
  vm: z.string().nullable(),
  image: imageId.nullable(),
  cloneCount: z.int().min(0),
  namePrefix: z.string().nullable(),
  parentMode,
  memory: cloneMemory,
  network: cloneNetwork,
  disks: cloneDisks,
  isPartialAllowed: z.boolean(),
  isReplacing: z.boolean().exactOptional(),
  share: forkShare.exactOptional(),
  origin: forkOrigin.exactOptional(),
  fetch: imageFetchMode.exactOptional(),
  fanout: hostFanout.exactOptional(),
  hosts: z.array(hostName).exactOptional(),
});

const outcomeSchema: z.ZodType<ForkOutcome> = z.strictObject({
  failures: z.array(z.strictObject({ index: z.int().min(0), name: z.string(), error: z.unknown() })),
  parentPauseMs: z.number(),
  deviceStateBytes: z.number(),
  ready: z.array(z.strictObject({ index: z.int().min(0), at: z.iso.datetime() })),
});

const schema: z.ZodType<ForkRecord> = z.strictObject({
  version: z.literal(1),
  request: requestSchema,
  state: z.enum(FORK_RECORD_STATES),
  runsAfterCommit: z.literal(true).exactOptional(),
  image: imageId,
  isWarm: z.boolean(),
  transport: transport.exactOptional(),
  isReleased: z.literal(true).exactOptional(),
  isCompleting: z.literal(true).exactOptional(),
  isFinished: z.literal(true).exactOptional(),
  incarnation: incarnationId.exactOptional(),
  clones: z.array(
    z.strictObject({
      index: z.int().min(0),
      cloneCount: z.int().min(1),
      name: z.string(),
      uuid: z.string(),
      vmGenerationId: z.string(),
      macs: z.record(z.string(), z.string()),
    }),
  ),
  outcome: outcomeSchema.nullable(),
  failure: z.custom<ErrorJson>((value) => typeof value === 'object' && value !== null).nullable(),
});

export type ForkStore = RecordFiles<ForkRecord>;

export const FORK_RECORD: RecordKind<ForkRecord> = {
  what: 'fork record',
  schema,
  version: 1,
  nameOf: ({ request }) => {
    checkImageId(request.fork);
    return request.fork;
  },
};

/**
 * The fork is over on this host. If other hosts had joined, its coordinator may still have to learn that it was
 * committed, and the journal may lack it.
 */
export async function finishRecord(
  { forkStore }: { readonly forkStore: ForkStore },
  record: ForkRecord,
): Promise<void> {
  const { request } = record;
  const isAsked = request.share !== undefined && request.origin === undefined;
  if (!isAsked) return forkStore.remove(request.fork);
  await forkStore.save({ ...record, isFinished: true, clones: [], outcome: null });
}

export function openForkStore(stateDir: string): Promise<ForkStore> {
  return RecordFiles.open<ForkRecord>(stateDir, 'forks', FORK_RECORD);
}
