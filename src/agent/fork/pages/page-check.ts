/**
 * Checks the pages of an image that this host reads, against digests that the host of the image computes and sends
 * through mutual TLS. What is read later is checked before a clone sees it; what is here already is checked when its
 * digest comes (docs/PAGE_STATES.md, "Digests").
 */
import { type ErrorCode, MigrationError, toMigrationError } from '../../../domain/errors.js';
import type { ImageDigestsHandle } from '../../../native/types.js';
import type { ImageContext } from '../../image/context.js';
import type { ImageRecord } from '../../image/record.js';
import type { AgentLog } from '../../vm/context.js';
import { pagesInPiece } from './digest-server.js';
import { isFinal } from './failed-image.js';

/** The clones of all hosts are to run first. The host of the image copies it for longer than that. */
const ASK_MS_FIRST = 250;
const ASK_MS_MAX = 2_000;
/** An image that is all here does not wait longer than this for a host that has gone. */
const PATIENCE_MS = 30_000;

export type CheckOutcome =
  | { readonly kind: 'checked' }
  /** With the last error, or null if the host of the image has no digests. */
  | { readonly kind: 'unknown'; readonly error: MigrationError | null }
  | { readonly kind: 'damaged'; readonly page: string }
  /** The image is of no use, here or on its host. */
  | { readonly kind: 'failed'; readonly error: MigrationError };

/** Errors of the files here that another attempt would meet again. */
const FATAL: ReadonlySet<ErrorCode> = new Set(['REGION_CHANGED', 'IO_FAILED']);

export interface PageCheckParts {
  readonly log: AgentLog;
  readonly image: string;
  readonly memory: {
    readonly pageBytes: number;
    readonly regions: readonly { readonly id: string; readonly lengthBytes: number }[];
  };
  /** Null: no digests can be kept, so nothing is checked. */
  readonly digests: Pick<ImageDigestsHandle, 'known' | 'accept'> | null;
  /** Asks the host of the image, as DigestServer answers. */
  readonly ask: (regionIndex: number, firstPage: number) => Promise<string | null>;
  /** As ImageFetchHandle.check, of the session that reads the image now. */
  readonly check: (regionIndex: number, firstPage: number, pageCount: number) => Promise<number | null>;
  /** Every page is here. */
  readonly isComplete: () => boolean;
  readonly onOver: (outcome: CheckOutcome) => void;
}

type KnownDigests = NonNullable<PageCheckParts['digests']>;

interface RegionPages {
  readonly index: number;
  readonly id: string;
  readonly pageCount: number;
}

export class PageCheck {
  readonly #parts: PageCheckParts;
  readonly #closing = new AbortController();
  /** Rejects when the check is closed. */
  readonly #closed: Promise<never>;
  #running: Promise<void> | null = null;
  #outcome: CheckOutcome | null = null;
  #askMs = ASK_MS_FIRST;
  #endPause: () => void = () => undefined;
  /** Why it does not go on at present, or null. */
  trouble: MigrationError | null = null;
  /** How many pages it has been through. */
  checkedPages = 0;

  constructor(parts: PageCheckParts) {
    this.#parts = parts;
    const { signal } = this.#closing;
    this.#closed = new Promise((_, reject) => {
      signal.addEventListener('abort', () => reject(toMigrationError(signal.reason)));
    });
    this.#closed.catch(() => undefined);
  }

  /** Null: it is not over. */
  get outcome(): CheckOutcome | null {
    return this.#outcome;
  }

  /** To be called once pages are read. Idempotent. */
  start(): void {
    this.#running ??= this.#run().then(
      (outcome) => this.#end(outcome),
      () => undefined,
    );
  }

  /** Every page is here, so the host of the image has them all, too: asks at once. */
  hurry(): void {
    this.#askMs = ASK_MS_FIRST;
    this.#endPause();
  }

  /** Ends it, wherever it is. The next one begins from the digests that are known. */
  async close(): Promise<void> {
    this.#closing.abort();
    await this.#running;
  }

  #end(outcome: CheckOutcome): void {
    this.#outcome = outcome;
    this.#parts.onOver(outcome);
  }

  async #run(): Promise<CheckOutcome> {
    const { memory, digests } = this.#parts;
    if (digests === null) return { kind: 'unknown', error: null };
    await this.#pause();
    for (const [index, { id, lengthBytes }] of memory.regions.entries()) {
      const outcome = await this.#checkRegion(digests, { index, id, pageCount: lengthBytes / memory.pageBytes });
      if (outcome !== null) return outcome;
    }
    return { kind: 'checked' };
  }

  /** Returns null if every page of the region is what its digest says. */
  async #checkRegion(digests: KnownDigests, { index, id, pageCount }: RegionPages): Promise<CheckOutcome | null> {
    const { check, memory } = this.#parts;
    let checkedCount = 0;
    let troubleSinceMs: number | null = null;
    while (checkedCount < pageCount) {
      try {
        const known = await this.#learn(digests, index, checkedCount);
        if (known === null) return { kind: 'unknown', error: null };
        const count = Math.min(known - checkedCount, pagesInPiece(memory.pageBytes));
        if (count > 0) {
          const page = await check(index, checkedCount, count);
          if (page !== null) return { kind: 'damaged', page: `page ${page} of region ${id}` };
          checkedCount += count;
          this.checkedPages += count;
          this.#askMs = ASK_MS_FIRST;
        }
        troubleSinceMs = null;
        this.trouble = null;
        if (count === 0) await this.#pause();
      } catch (thrown) {
        this.#closing.signal.throwIfAborted();
        const error = toMigrationError(thrown);
        if (isFinal(error) || FATAL.has(error.code)) return { kind: 'failed', error };
        const { log, image, isComplete } = this.#parts;
        const nowMs = performance.now();
        troubleSinceMs = isComplete() ? (troubleSinceMs ?? nowMs) : nowMs;
        this.trouble = error;
        log.debug({ image, err: error }, 'pages of an image cannot be checked now');
        if (nowMs - troubleSinceMs > PATIENCE_MS) return { kind: 'unknown', error };
        await this.#pause();
      }
    }
    return null;
  }

  /** Returns of how many pages the digests are known, after asking for more if none are left to be checked. */
  async #learn(digests: KnownDigests, index: number, checkedCount: number): Promise<number | null> {
    const known = digests.known(index);
    if (known > checkedCount) return known;
    // Nobody waits for a host that does not answer when the check is closed.
    const answer = await Promise.race([this.#parts.ask(index, known), this.#closed]);
    if (answer === null) return null;
    if (answer !== '') digests.accept(index, known, Buffer.from(answer, 'base64'));
    return digests.known(index);
  }

  async #pause(): Promise<void> {
    const { signal } = this.#closing;
    await new Promise<void>((resolve) => {
      const over = (): void => {
        clearTimeout(timer);
        signal.removeEventListener('abort', over);
        resolve();
      };
      const timer = setTimeout(over, this.#askMs).unref();
      signal.addEventListener('abort', over);
      this.#endPause = over;
    });
    signal.throwIfAborted();
    this.#askMs = Math.min(this.#askMs * 2, ASK_MS_MAX);
  }
}

/** For people, and for the records of the image and its clones. */
export function damagedError(image: string, page: string): MigrationError {
  return new MigrationError('DAMAGED', `${page} of image ${image} is not what the host of the image has`);
}

/** What an earlier daemon has begun goes on without digests, if there is no room for them now. */
export async function openDigests(
  { native, images, log }: ImageContext,
  image: ImageRecord,
  { isResume }: { readonly isResume: boolean },
): Promise<ImageDigestsHandle | null> {
  const files = await images.withDigests(image);
  try {
    return native.openImageDigests({ image: files });
  } catch (thrown) {
    if (!isResume) throw thrown;
    log.warn({ image: image.id, err: toMigrationError(thrown) }, 'the digests of an image cannot be kept');
    return null;
  }
}
