/**
 * The hosts that one host asks for pages of an image before it asks the root: relays, or hosts that have received the
 * same multicast. Each may lack pages, come late, or end at any time. Nothing depends on them: what they do not bring
 * comes from the root.
 */
import { type MigrationError, toMigrationError } from '../../../domain/errors.js';
import type { NearLevels } from '../../../domain/fanout.js';
import { transportRow } from '../../../domain/transport.js';
import { inTime } from '../../../kit/in-time.js';
import { failureToError } from '../../../native/failure.js';
import type { ImageFetchHandle } from '../../../native/types.js';
import type { ImageContext } from '../../image/context.js';
import { ANY_HOLDER_TRANSPORT } from './image-server.js';
import type { OriginHost } from './origin-host.js';

const ASK_MS_MAX = 5_000;
/** The other host may not have begun yet. */
const RETRY_MS_FIRST = 50;
const RETRY_MS_MAX = 2_000;
/** How often a connection is looked at. */
const LOOK_MS = 200;
/** How long the first sweep waits for them: after it the root's pages are read, as if there were no nearer host. */
const FIRST_MS_MAX = 1_000;

interface NearHost {
  readonly host: string;
  readonly id: number;
  readonly level: number;
  isConnected: boolean;
  /** Of connections that are over. */
  bytesBefore: number;
}

export interface NearHoldersOptions {
  readonly image: string;
  readonly levels: NearLevels;
  readonly origin: Pick<OriginHost, 'transport' | 'raised'>;
  /** The native session. Another one may replace it. */
  readonly reader: () => ImageFetchHandle;
}

export class NearHolders {
  readonly #context: ImageContext;
  readonly #options: NearHoldersOptions;
  readonly #hosts: readonly NearHost[];
  readonly #closing = new AbortController();
  #isStarted = false;
  /** Counts the native sessions: a connection belongs to one of them. */
  #generation = 0;

  constructor(context: ImageContext, options: NearHoldersOptions) {
    this.#context = context;
    this.#options = options;
    this.#hosts = options.levels
      .flatMap((hosts, level) => hosts.map((host) => ({ host, level })))
      .filter(({ host }) => host !== context.host && context.peers.isPeer(host))
      .map(({ host, level }, id) => ({ host, level, id, isConnected: false, bytesBefore: 0 }));
  }

  /** Connects to them, now and after each loss. Resolves when the nearest have answered once, or after a second. */
  async start(): Promise<void> {
    if (this.#isStarted || this.#hosts.length === 0) return;
    this.#isStarted = true;
    const firsts = this.#hosts.map((near) => this.#keep(near));
    const nearest = firsts.filter((_, index) => this.#hosts[index]?.level === 0);
    await Promise.race([Promise.all(nearest), this.#sleep(FIRST_MS_MAX)]);
  }

  /** Bytes of pages by host. */
  get bytes(): Readonly<Record<string, number>> {
    if (!this.#isStarted) return {};
    const now = new Map(
      this.#isClosed
        ? []
        : this.#options
            .reader()
            .nears()
            .map(({ id, bytes }) => [id, Number(bytes)]),
    );
    const entries = this.#hosts.map(({ host, id, bytesBefore }) => [host, bytesBefore + (now.get(id) ?? 0)] as const);
    return Object.fromEntries(entries.filter(([, bytes]) => bytes > 0));
  }

  /** The native session is about to be replaced. */
  forgetReader(): void {
    this.#noteBytes();
    this.#generation++;
    for (const near of this.#hosts) near.isConnected = false;
  }

  /** The native session is about to be closed. */
  close(): void {
    if (this.#isClosed) return;
    this.#noteBytes();
    this.#closing.abort();
  }

  get #isClosed(): boolean {
    return this.#closing.signal.aborted;
  }

  /** Ends early when the holders are closed. */
  async #sleep(ms: number): Promise<void> {
    await this.#context.clock.sleep(ms, this.#closing.signal).catch(() => undefined);
  }

  #noteBytes(): void {
    if (this.#isClosed) return;
    const { bytes } = this;
    for (const near of this.#hosts) near.bytesBefore = bytes[near.host] ?? 0;
  }

  /** Resolves after the first attempt, and goes on. Never rejects. */
  async #keep(near: NearHost): Promise<void> {
    await this.#connect(near);
    this.#keepConnected(near).catch((error: unknown) => {
      const fields = { image: this.#options.image, host: near.host, err: toMigrationError(error) };
      this.#context.log.error(fields, 'a nearer host of an image is not asked any more');
    });
  }

  async #keepConnected(near: NearHost): Promise<void> {
    let retryMs = RETRY_MS_FIRST;
    while (!this.#isClosed && !this.#isComplete) {
      await this.#sleep(near.isConnected ? LOOK_MS : retryMs);
      if (this.#isClosed || this.#isComplete) return;
      if (near.isConnected) {
        const loss = this.#lossOf(near);
        if (loss === null) continue;
        this.#drop(near);
        if (loss?.code === 'DAMAGED') throw loss;
      }
      retryMs = (await this.#connect(near)) ? RETRY_MS_FIRST : Math.min(retryMs * 2, RETRY_MS_MAX);
    }
  }

  get #isComplete(): boolean {
    return this.#options.reader().snapshot().state === 'complete';
  }

  /** Why it is not connected any more; undefined: nobody says why. Null: it is connected. */
  #lossOf({ id, host }: NearHost): MigrationError | undefined | null {
    const nears = this.#options.reader().nears();
    const near = nears.find((one) => one.id === id);
    if (near?.isConnected === true) return null;
    return near?.failure ? failureToError(near.failure, `reading the image from ${host}`) : undefined;
  }

  #drop(near: NearHost): void {
    near.bytesBefore = this.bytes[near.host] ?? 0;
    this.#options.reader().removeNear(near.id);
    near.isConnected = false;
  }

  /** Returns whether it is connected. */
  async #connect(near: NearHost): Promise<boolean> {
    const { image, origin, reader } = this.#options;
    const { peers, host, transports, clock, log } = this.#context;
    const generation = this.#generation;
    try {
      const { transport } = origin;
      const wanted = transportRow(transport).sameMachineOnly ? ANY_HOLDER_TRANSPORT : transport;
      const asking = peers.agent(near.host).fanout.serveHeld(image, host, wanted);
      const holder = origin.raised(await inTime(near.host, ASK_MS_MAX, asking, clock));
      await transports.connecting(holder.endpoint, holder, async (source, timeoutMs) => {
        if (this.#isClosed || generation !== this.#generation) return;
        await reader().addNear(source, { id: near.id, level: near.level }, timeoutMs);
      });
      if (this.#isClosed || generation !== this.#generation) return false;
      near.isConnected = true;
      return true;
    } catch (error) {
      const fields = { image, host: near.host, err: toMigrationError(error) };
      log.debug(fields, 'a nearer host of an image does not answer yet');
      return false;
    }
  }
}
