/**
 * Proves that the target's memory was what the source's was, if the user has asked for it. It comes after the last page
 * and before the source is released: the source's memory is frozen until then, and the target has noted of each page
 * what came. Both ends digest chunks under a key of this move, and they are compared here. Data connections have no
 * part in it.
 */
import { type ErrorCode, MigrationError, toMigrationError } from '../../domain/errors.js';
import {
  CHUNK_BYTES,
  CHUNKS_PER_CALL_MAX,
  DIGEST_BYTES,
  type DifferentChunk,
  type MemoryVerification,
} from '../../domain/verification.js';
import { withDeadline } from '../deadline.js';
import type { ChunkRange } from '../ports/session.js';
import { neverUndone } from '../walk.js';
import type { Comparison, StepContext, StepExecutor } from './context.js';
import { isCommitted } from './is-committed.js';

/** Memory that one call digests: some tenths of a second of one thread. The next call waits for it. */
const CALL_BYTES = 2 ** 27;
/** How long such a call may take, on a processor without instructions for it, too. */
const CALL_MS_MAX = 30_000;
/** The errors of a source that has nothing of the move any more. */
const GONE_CODES: ReadonlySet<ErrorCode> = new Set(['NOT_FOUND', 'OWNER_CHANGED', 'VM_LOST']);
/** The most chunks that an error names. */
const NAMED_MAX = 32;

export const verifyMemory: StepExecutor = {
  async forward(context) {
    const { findings, ports, halt, marks } = context;
    if (findings.guestEnd !== null) return unproven(context, 'the guest ended before all of its memory had come');
    const lost = await exposeAgain(context);
    if (lost !== null) return unproven(context, lost);
    context.comparison ??= begin(ports.clock.nowMs());
    for (;;) {
      halt.throwIfAborted();
      const range = nextRange(context, context.comparison);
      if (range === null) break;
      const reason = await compare(context, context.comparison, range);
      if (reason !== null) return unproven(context, reason);
      marks.advancedAtMs = ports.clock.nowMs();
    }
    if (context.comparison.differentCount > 0) throw damaged(context, context.comparison);
    return { verified: { isComplete: true, ...figures(context, context.comparison) } };
  },
  undo: neverUndone,
};

/**
 * An earlier life of the source's daemon may have frozen the memory. Returns why the source cannot say any more what it
 * was, or null.
 */
async function exposeAgain(context: StepContext): Promise<string | null> {
  const { ports, limits, record } = context;
  const { vm, transport, target } = record.plan.request;
  await isCommitted(context, 'proven');
  const exposing = ports.source.expose({ session: record.session, vm, token: record.token, transport, target });
  try {
    await withDeadline(ports.clock, exposing, limits.callMsMax, 'exposing the source again');
    return null;
  } catch (thrown) {
    const error = toMigrationError(thrown);
    if (!GONE_CODES.has(error.code)) throw error;
    return `${record.plan.source} does not have the memory any more: ${error.message}`;
  }
}

function begin(beganAtMs: number): Comparison {
  const nothing = { region: 0, chunk: 0, chunksEqual: 0, pagesEqual: 0 };
  return { beganAtMs, ...nothing, different: [], differentCount: 0, isCondemned: false };
}

function unproven(context: StepContext, reason: string): { verified: MemoryVerification } {
  const { comparison, observer } = context;
  // A difference that was found is one, whatever else cannot be compared.
  if (comparison !== null && comparison.differentCount > 0) throw damaged(context, comparison);
  observer.onWarning('the memory of the VM is not verified', new MigrationError('UNSUPPORTED', reason));
  const done = comparison ?? begin(context.ports.clock.nowMs());
  return { verified: { isComplete: false, ...figures(context, done), reason } };
}

function figures({ ports }: StepContext, { chunksEqual, pagesEqual, beganAtMs }: Comparison) {
  return { chunks: chunksEqual, pages: pagesEqual, ms: ports.clock.nowMs() - beganAtMs };
}

/** Null: everything has been compared. */
function nextRange({ record }: StepContext, comparison: Comparison): ChunkRange | null {
  const { regions, pageBytes } = record.spec.memory;
  for (; comparison.region < regions.length; comparison.region++, comparison.chunk = 0) {
    const chunkCount = Math.ceil((regions[comparison.region]?.lengthBytes ?? 0) / chunkBytesOf(pageBytes));
    const first = comparison.chunk;
    const atOnce = Math.min(CHUNKS_PER_CALL_MAX, Math.max(1, CALL_BYTES / chunkBytesOf(pageBytes)));
    if (first < chunkCount) return { region: comparison.region, first, count: Math.min(atOnce, chunkCount - first) };
  }
  return null;
}

function chunkBytesOf(pageBytes: number): number {
  return Math.max(CHUNK_BYTES, pageBytes);
}

/** Returns why the range cannot be compared, or null. */
async function compare(context: StepContext, comparison: Comparison, range: ChunkRange): Promise<string | null> {
  const { ports, record, halt } = context;
  const { target } = record.plan.request;
  const { session, memoryKey } = record;
  if (memoryKey === undefined) return 'the job has no key';
  const frozen = ports.source.digestFrozen(session, memoryKey, range);
  const arrived = ports.target.digestArrived(session, range).catch((thrown: unknown) => {
    const error = toMigrationError(thrown);
    if (error.code !== 'NOT_FOUND') throw error;
    return { digests: null, reason: `${target} does not know the move any more` };
  });
  const [ours, theirs] = await withDeadline(
    ports.clock,
    Promise.all([frozen, arrived]),
    CALL_MS_MAX,
    'comparing memory',
    halt,
  );
  if (theirs.digests === null) return theirs.reason ?? `${target} cannot say what has arrived`;
  const length = range.count * DIGEST_BYTES;
  const [source, copy] = [ours.digests, theirs.digests].map((digests) => Buffer.from(digests, 'base64'));
  if (source?.length !== length || copy?.length !== length)
    throw new MigrationError('PEER_PROTOCOL', `${target} answers with digests of another length`);
  const chunks = Array.from({ length: range.count }, (_, index) => {
    const at = index * DIGEST_BYTES;
    const end = at + DIGEST_BYTES;
    const isEqual = source.subarray(at, end).equals(copy.subarray(at, end));
    return { isEqual, place: placeOf(context, range.region, range.first + index) };
  });
  const different = chunks.filter(({ isEqual }) => !isEqual).map(({ place }) => place);
  if (different[0] !== undefined && !comparison.isCondemned) {
    await condemn(context, different[0]);
    comparison.isCondemned = true;
  }
  const equalBytes = chunks.reduce((sum, { isEqual, place }) => sum + (isEqual ? place.lengthBytes : 0), 0);
  comparison.pagesEqual += equalBytes / record.spec.memory.pageBytes;
  comparison.chunksEqual += range.count - different.length;
  comparison.differentCount += different.length;
  comparison.different.push(...different.slice(0, NAMED_MAX - comparison.different.length));
  comparison.chunk += range.count;
  return null;
}

function placeOf({ record }: StepContext, region: number, chunk: number): DifferentChunk {
  const { regions, pageBytes } = record.spec.memory;
  const { id, lengthBytes } = regions[region] ?? { id: '', lengthBytes: 0 };
  const offsetBytes = chunk * chunkBytesOf(pageBytes);
  return { region: id, offsetBytes, lengthBytes: Math.min(chunkBytesOf(pageBytes), lengthBytes - offsetBytes) };
}

/** Stops the VM at the first difference: it runs on wrong memory. Then the rest is compared, so that all is named. */
async function condemn({ record, ports, limits }: StepContext, { region, offsetBytes }: DifferentChunk): Promise<void> {
  const damage = `memory that came from ${record.plan.source} is not what it was there (${region} at ${offsetBytes})`;
  const stopping = ports.target.condemn(record.session, damage).catch((thrown: unknown) => {
    // The VM has ended meanwhile, and nothing of it is left to stop.
    if (toMigrationError(thrown).code !== 'NOT_FOUND') throw thrown;
  });
  await withDeadline(ports.clock, stopping, limits.callMsMax, 'stopping a VM whose memory is damaged');
}

function damaged({ record }: StepContext, { different, differentCount }: Comparison): MigrationError {
  const { source } = record.plan;
  const { vm, target } = record.plan.request;
  const places = different.map(({ region, offsetBytes }) => `${region} at ${offsetBytes}`);
  const named = differentCount > places.length ? [...places, '…'] : places;
  return new MigrationError(
    'DAMAGED',
    `the memory of ${vm} on ${target} is not what it was on ${source}: ` +
      `${differentCount} chunks differ (${named.join(', ')})`,
    {
      remedy:
        `${vm} stands still on ${target} for good: look at it there, then end it with "vmctl stop ${vm}"; ` +
        `${source} keeps the memory of the switchover, frozen, until "vmctl stop ${vm}" is run there; ` +
        'then find out who changes data between the hosts, and use --data-security',
      details: { differentCount, chunks: different },
    },
  );
}
