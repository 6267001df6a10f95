/**
 * The connection of a native session that reads pages from another host: it connects, connects again after a loss, and
 * opens the session anew where it cannot continue. What the session fills, and when it starts, its owner says.
 */
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import type { SourceEndpointInfo } from '../../engine/ports/session.js';
import type { NativeFailure, SourceAddress } from '../../native/types.js';
import type { HostContext } from '../vm/context.js';

const RETRY_MS_FIRST = 100;
const RETRY_MS_MAX = 5_000;
/** The first attempt of a session that can find its holder by itself. Guests wait for it, and nobody else helps. */
const FIND_MS_FIRST = 5;
/** A connection that is lost sooner than this counts as a failed attempt. */
const STEADY_MS = 1_000;

/** What the link needs of the native session. */
export interface PageReader {
  connect(source: SourceAddress, timeoutMs: number): Promise<void>;
  snapshot(): { readonly state: string; readonly failure: NativeFailure | null };
  close(): Promise<void>;
}

/** Where the pages are, and the secret for them. */
export interface PageHolder {
  readonly session: string;
  readonly token: string;
  readonly endpoint: SourceEndpointInfo;
}

export interface PageLinkOptions<Reader extends PageReader> {
  /** Opens the native session. It is called again to replace one that cannot continue; `isResume` is true then. */
  readonly open: (isResume: boolean) => Reader;
  readonly isResume: boolean;
  /** The state of a session that is connected and reads: it takes no other connection. */
  readonly reading: 'filling' | 'copying';
  /** Starts what the owner wants. Called after each connect. */
  readonly onConnected: (reader: Reader) => void;
  /** The session will be closed, and replaced by another that starts anew. */
  readonly onReplace: (reader: Reader) => void;
  /** False: the session has failed for good, and another must not hide that. Absent: any may be replaced. */
  readonly mayReplace?: () => boolean;
  /** Asks for a holder, when the last one does not take the session back. Absent: somebody else names one. */
  readonly findHolder?: () => Promise<PageHolder>;
  /** The fields that name the session in the log. */
  readonly fields: object;
}

export class PageLink<Reader extends PageReader> {
  readonly #context: Pick<HostContext, 'transports' | 'log'>;
  readonly #options: PageLinkOptions<Reader>;
  #reader: Reader;
  #holder: PageHolder | null = null;
  #isConnected = false;
  #isLostMeanwhile = false;
  #isClosed = false;
  #connecting: Promise<void> | null = null;
  #retryTimer: NodeJS.Timeout | null = null;
  #isRetrying = false;
  #retryMs: number;
  #connectedAtMs = 0;
  #lostAtMs: number | null = null;
  /** The last holder has not refused the session since its connection was lost. */
  #mayTakeBack = false;
  #trouble: MigrationError | null = null;

  constructor(context: Pick<HostContext, 'transports' | 'log'>, options: PageLinkOptions<Reader>) {
    this.#context = context;
    this.#options = options;
    this.#retryMs = this.#retryMsFirst;
    this.#reader = options.open(options.isResume);
  }

  get reader(): Reader {
    return this.#reader;
  }

  /** This session has been connected and has not reported the loss of its connection. */
  get isConnected(): boolean {
    return this.#isConnected;
  }

  /** Why the last attempt to connect again has failed. Null while it is connected, or before the first attempt. */
  get trouble(): MigrationError | null {
    return this.#trouble;
  }

  /**
   * Connects to `holder`, now and after each loss of the connection. If the native session cannot continue (its keys
   * are from before a restart of the holder's daemon), it is closed and opened anew. The pages that have arrived stay.
   */
  async connect(holder: PageHolder): Promise<void> {
    await this.#connecting?.catch(() => undefined);
    if (this.#isClosed) throw closedError();
    const isNew = JSON.stringify(holder) !== JSON.stringify(this.#holder);
    this.#holder = holder;
    if (this.#isConnected && !isNew) return;
    await this.#connectOnce(isNew).catch((error: unknown) => {
      // The attempt has taken the place of the next one of its own.
      if (this.#options.findHolder !== undefined) this.retryLater();
      throw error;
    });
  }

  /** The native session has reported a loss. */
  noteLost(failure: NativeFailure | null): void {
    this.#mayTakeBack = this.#isConnected && performance.now() - this.#connectedAtMs >= STEADY_MS;
    this.#isConnected = false;
    this.#lostAtMs ??= performance.now();
    if (this.#mayTakeBack) this.#retryMs = this.#retryMsFirst;
    this.#context.log.warn({ ...this.#options.fields, failure }, 'the connection to the source is lost');
    this.retryLater();
  }

  /** The native session has failed. Only another holder helps. */
  noteFailed(): void {
    this.#isConnected = false;
  }

  /**
   * Retries with the last holder, then with the one that `findHolder` names. Without that function the coordinator
   * reconnects the session too, with current keys, but takes longer to notice. The retry is enough for a short loss of
   * the connection.
   */
  retryLater(): void {
    const hasHolder = this.#holder !== null || this.#options.findHolder !== undefined;
    if (!hasHolder || this.#retryTimer !== null || this.#isBusy || this.#isClosed) return;
    this.#retryTimer = setTimeout(() => {
      this.#retryTimer = null;
      if (this.#isClosed || this.#isConnected || this.#isBusy) return;
      this.#isRetrying = true;
      const failing = this.#retry().then(() => null, toMigrationError);
      void failing.then((failure) => {
        this.#isRetrying = false;
        if (this.#isConnected || this.#isClosed || this.#reader.snapshot().state === 'complete') return;
        this.#trouble = failure;
        this.#context.log.debug({ ...this.#options.fields, err: failure }, 'the source still cannot be reached');
        this.retryLater();
      });
    }, this.#retryMs);
    this.#retryMs = Math.min(Math.max(this.#retryMs * 2, this.#retryMsFirst), RETRY_MS_MAX);
  }

  /** Makes the next attempt to connect at once, if one is due. */
  hurry(): void {
    if (this.#retryTimer === null) return;
    this.stopRetrying();
    this.#retryMs = 0;
    this.retryLater();
  }

  stopRetrying(): void {
    if (this.#retryTimer !== null) clearTimeout(this.#retryTimer);
    this.#retryTimer = null;
  }

  /** Closes the native session. Missing pages stay missing. Idempotent. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.stopRetrying();
    await this.#reader.close();
  }

  get #retryMsFirst(): number {
    return this.#options.findHolder === undefined ? RETRY_MS_FIRST : FIND_MS_FIRST;
  }

  get #isBusy(): boolean {
    return this.#isRetrying || this.#connecting !== null;
  }

  async #retry(): Promise<void> {
    const { findHolder } = this.#options;
    if (findHolder === undefined) return this.#connectOnce(false);
    if (this.#mayTakeBack) {
      this.#mayTakeBack = false;
      await this.#connectOnce(false).catch(() => undefined);
      if (this.#isConnected) return;
    }
    const holder = await findHolder();
    // Somebody else may have connected it meanwhile.
    await this.#connecting?.catch(() => undefined);
    if (this.#isClosed || this.#isConnected) return;
    this.#holder = holder;
    await this.#connectOnce(false);
  }

  #connectOnce(isAnew: boolean): Promise<void> {
    const attempt = this.#connectNow(isAnew).finally(() => {
      this.#connecting = null;
      // Its loss was reported before the connect had returned.
      if (this.#isLostMeanwhile) this.retryLater();
    });
    this.#connecting = attempt;
    return attempt;
  }

  async #connectNow(isAnew: boolean): Promise<void> {
    const holder = this.#holder;
    if (holder === null) throw new MigrationError('CONFLICT', 'a page session has no endpoint of its source');
    this.stopRetrying();
    this.#isLostMeanwhile = false;
    const { state } = this.#reader.snapshot();
    if (state === 'complete') return;
    if (state === 'failed' || (state === this.#options.reading && isAnew)) await this.#replace();
    const { endpoint } = holder;
    await this.#context.transports
      .connecting(endpoint, holder, (source, timeoutMs) => this.#reader.connect(source, timeoutMs))
      .catch((error: unknown) => {
        throw withMountHint(toMigrationError(error), endpoint.host);
      });
    this.#isLostMeanwhile = this.#reader.snapshot().state === 'disconnected';
    if (this.#isLostMeanwhile) return;
    this.#isConnected = true;
    this.#connectedAtMs = performance.now();
    this.#trouble = null;
    if (this.#options.findHolder === undefined) this.#retryMs = RETRY_MS_FIRST;
    else if (this.#lostAtMs !== null) {
      const lostMs = Math.round(performance.now() - this.#lostAtMs);
      this.#context.log.info({ ...this.#options.fields, lostMs }, 'the source is connected again');
    }
    this.#lostAtMs = null;
    this.#options.onConnected(this.#reader);
  }

  async #replace(): Promise<void> {
    const { mayReplace = () => true, onReplace } = this.#options;
    this.#isConnected = false;
    if (!mayReplace()) throw failedError();
    onReplace(this.#reader);
    await this.#reader.close();
    if (this.#isClosed) throw closedError();
    // What its threads have found last shows only now.
    if (!mayReplace()) throw failedError();
    this.#reader = this.#options.open(true);
  }
}

function closedError(): MigrationError {
  return new MigrationError('CONFLICT', 'the page session has ended');
}

function failedError(): MigrationError {
  return new MigrationError('CONFLICT', 'the page session has failed for good');
}

/**
 * A daemon that refuses the session on a socket of this machine is another one: the path names a different socket in
 * this daemon's mount namespace than in the source's.
 */
export function withMountHint(error: MigrationError, host: string): MigrationError {
  if (error.code !== 'UNAUTHENTICATED' || !host.startsWith('/')) return error;
  return new MigrationError(error.code, `${error.message}: the daemon that answers at ${host} is not the source's`, {
    remedy:
      'use --tcp; --shm needs both daemons in one mount namespace, or the same files under their state directories',
    isRetryable: error.isRetryable,
    details: error.details,
    cause: error,
  });
}
