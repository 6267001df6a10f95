/**
 * Checks the pages of an image that this host reads, against digests that the host of the image computes and sends
 * through mutual TLS. What is read later is checked before a clone sees it; what is here already is checked when its
 * digest comes (docs/PAGE_STATES.md, "Digests").
 */
import { MigrationError, toMigrationError } from '../../../domain/errors.js';
import type { ImageDigestsHandle } from '../../../native/types.js';
import type { AgentLog } from '../../vm/context.js';
import { pagesInPiece } from './digest-server.js';

/** The clones of all hosts are to run first. The host of the image copies it for longer than that. */
const ASK_MS_FIRST = 250;
const ASK_MS_MAX = 2_000;
/** An image that is all here does not wait longer than this for a host that has gone. */
const PATIENCE_MS = 30_000;

export type CheckOutcome =
  | { readonly kind: 'checked' | 'unknown' }
  | { readonly kind: 'damaged'; readonly page: string };

export interface PageCheckParts {
  readonly log: AgentLog;
  readonly image: string;
  readonly memory: {
    readonly pageBytes: number;
    readonly regions: readonly { readonly id: string; readonly lengthBytes: number }[];
  };
  readonly digests: Pick<ImageDigestsHandle, 'known' | 'accept'>;
  /** Asks the host of the image, as DigestServer answers. */
  readonly ask: (regionIndex: number, firstPage: number) => Promise<string | null>;
  /** As ImageFetchHandle.check, of the session that reads the image now. */
  readonly check: (regionIndex: number, firstPage: number, pageCount: number) => Promise<number | null>;
  /** Every page is here. */
  readonly isComplete: () => boolean;
  readonly onOver: (outcome: CheckOutcome) => void;
}

export class PageCheck {
  readonly #parts: PageCheckParts;
  readonly #closing = new AbortController();
  #running: Promise<void> | null = null;
  #outcome: CheckOutcome | null = null;
  #askMs = ASK_MS_FIRST;
  #endPause: () => void = () => undefined;
  /** How many pages it has been through. */
  checkedPages = 0;

  constructor(parts: PageCheckParts) {
    this.#parts = parts;
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
    const { pageBytes, regions } = this.#parts.memory;
    await this.#pause();
    for (const [index, { id, lengthBytes }] of regions.entries()) {
      const outcome = await this.#checkRegion(index, lengthBytes / pageBytes);
      if (outcome === null) continue;
      if (typeof outcome === 'number') return { kind: 'damaged', page: `page ${outcome} of region ${id}` };
      return { kind: outcome };
    }
    return { kind: 'checked' };
  }

  /** Returns the first page that differs, or null if none does. */
  async #checkRegion(index: number, pageCount: number): Promise<number | 'unknown' | null> {
    let checkedCount = 0;
    let troubleSinceMs: number | null = null;
    while (checkedCount < pageCount) {
      try {
        const known = await this.#learn(index, checkedCount);
        troubleSinceMs = null;
        if (known === null) return 'unknown';
        const count = Math.min(known - checkedCount, pagesInPiece(this.#parts.memory.pageBytes));
        if (count === 0) {
          await this.#pause();
          continue;
        }
        const page = await this.#parts.check(index, checkedCount, count);
        if (page !== null) return page;
        checkedCount += count;
        this.checkedPages += count;
        this.#askMs = ASK_MS_FIRST;
      } catch (thrown) {
        this.#closing.signal.throwIfAborted();
        const { log, image, isComplete } = this.#parts;
        const nowMs = performance.now();
        troubleSinceMs ??= nowMs;
        if (!isComplete()) troubleSinceMs = nowMs;
        log.debug({ image, err: toMigrationError(thrown) }, 'pages of an image cannot be checked now');
        if (nowMs - troubleSinceMs > PATIENCE_MS) return 'unknown';
        await this.#pause();
      }
    }
    return null;
  }

  /** Returns of how many pages the digests are known, after asking for more if none are left to be checked. */
  async #learn(index: number, checkedCount: number): Promise<number | null> {
    const { digests, ask } = this.#parts;
    const known = digests.known(index);
    if (known > checkedCount) return known;
    const answer = await ask(index, known);
    this.#closing.signal.throwIfAborted();
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
