/**
 * The disks of images that another host serves. For each there is a socket here, to which the processes of the clones
 * connect; each connection is passed on to that host (`Peers.openDisk`). If the host does not answer, the connection
 * ends, and the clone's process tries again for a while. So a clone needs no key, and no daemon needs to live on.
 */
import { chmod, link, mkdir, rm } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { type ErrorCode, MigrationError, toMigrationError } from '../../../domain/errors.js';
import { KeyedLocks } from '../../../kit/locks.js';
import { Turns } from '../../../kit/turns.js';
import type { ImageContext } from '../../image/context.js';
import type { ImageRecord } from '../../image/record.js';

/** All clones of an image connect again at once. The other host bounds the handshakes of one address. */
const CONNECTS_AT_ONCE = 8;
/** How long a host that joins waits until the other host has the image: both prepare at the same time. */
const APPEAR_MS = 20_000;
const APPEAR_POLL_MS = 100;
/** The image is not there, or not shared with this host. */
const NOT_YET: ReadonlySet<ErrorCode> = new Set(['NOT_FOUND', 'NOT_PERMITTED']);
/** A request that is not answered for so long is asked again on another connection. */
const SILENT_MS_MAX = 30_000;
const LOOK_MS = 5_000;

type ReaderContext = Pick<ImageContext, 'images' | 'peers' | 'log'>;

interface Place {
  readonly host: string;
  readonly image: string;
  readonly disk: string;
}

interface Passage {
  /** The socket to which the clone's process has connected. */
  readonly path: string;
  readonly local: Socket;
  readonly remote: Duplex;
  /** Since when the other host owes an answer. */
  waitsSinceMs: number | null;
}

export class DiskReader {
  readonly #context: ReaderContext;
  readonly #directory: string;
  readonly #servers = new Map<string, { readonly server: Server; readonly image: string }>();
  readonly #passages = new Set<Passage>();
  readonly #locks = new KeyedLocks();
  readonly #turns = new Map<string, Turns>();
  #timer: NodeJS.Timeout | null = null;
  #isClosed = false;

  constructor(context: ReaderContext, stateDir: string) {
    this.#context = context;
    this.#directory = join(stateDir, 'disk-reader');
  }

  /** Listens for the clones of an earlier daemon. */
  async start(): Promise<void> {
    await mkdir(this.#directory, { recursive: true, mode: 0o700 });
    await chmod(this.#directory, 0o700);
    for (const image of this.#context.images.all()) await this.#listenAll(image);
    this.#timer = setInterval(() => {
      this.#endSilent();
      this.#forgetImages();
    }, LOOK_MS);
    this.#timer.unref();
  }

  /**
   * Returns the sockets of the image's served disks, by the disk's id. They lead to the other host: the call waits for
   * it. Throws the reason why it does not serve a disk.
   */
  async open(image: ImageRecord, signal: AbortSignal): Promise<Readonly<Record<string, string>>> {
    const { served } = image;
    if (served === undefined) return {};
    for (const disk of served.disks) await this.#untilServed(served.host, image.id, disk, signal);
    return this.#listenAll(image);
  }

  /** Throws the reason why the host does not serve the disk now. */
  async probe(host: string, image: string, disk: string): Promise<void> {
    (await this.#connect(host, image, disk)).destroy();
  }

  /** The clones wait for the next daemon. */
  async close(): Promise<void> {
    this.#isClosed = true;
    if (this.#timer !== null) clearInterval(this.#timer);
    for (const [path, { server }] of this.#servers) await this.#closeServer(path, server);
    for (const passage of this.#passages) end(passage);
  }

  async #untilServed(host: string, image: string, disk: string, signal: AbortSignal): Promise<void> {
    const deadlineMs = performance.now() + APPEAR_MS;
    for (;;) {
      if (signal.aborted) throw new MigrationError('CANCELLED', 'the fork was cancelled');
      try {
        return await this.probe(host, image, disk);
      } catch (error) {
        if (!NOT_YET.has(toMigrationError(error).code) || performance.now() > deadlineMs) throw error;
      }
      await sleep(APPEAR_POLL_MS);
    }
  }

  async #listenAll({ id, served, spec }: ImageRecord): Promise<Record<string, string>> {
    const sockets: Record<string, string> = {};
    for (const disk of served?.disks ?? []) {
      // Names of fixed length, because the path of a socket is short.
      const index = spec.disks.findIndex((other) => other.id === disk);
      const path = join(this.#directory, `${id}-${index}.sock`);
      await this.#locks.hold(path, async () => {
        if (!this.#servers.has(path)) await this.#listen(path, { host: served?.host ?? '', image: id, disk });
        sockets[disk] = await this.#linkForContained(path, id, index);
      });
    }
    return sockets;
  }

  /**
   * Gives the socket a second name in a directory of its image, the only one that the image's clones see if they are
   * contained. The first name is that of clones which an earlier build has started.
   */
  async #linkForContained(path: string, image: string, index: number): Promise<string> {
    const directory = join(this.#directory, image);
    const name = join(directory, `${index}.sock`);
    await mkdir(directory, { recursive: true });
    await rm(name, { force: true });
    await link(path, name);
    return name;
  }

  async #listen(path: string, place: Place): Promise<void> {
    await rm(path, { force: true });
    const server = createServer({ pauseOnConnect: true }, (local) => {
      local.on('error', () => local.destroy());
      this.#pass(path, local, place).catch((error: unknown) => {
        local.destroy();
        const { log } = this.#context;
        if (!this.#isClosed) log.warn({ ...place, err: toMigrationError(error) }, 'a served disk cannot be reached');
      });
    });
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, resolve);
    });
    server.on('error', () => undefined);
    // Only this daemon, and the clones that are shown the directory of the image, get as far as the socket.
    await chmod(path, 0o666);
    this.#servers.set(path, { server, image: place.image });
  }

  async #pass(path: string, local: Socket, { host, image, disk }: Place): Promise<void> {
    const remote = await this.#connect(host, image, disk);
    const passage: Passage = { path, local, remote, waitsSinceMs: null };
    if (local.destroyed || this.#isClosed) {
      end(passage);
      return;
    }
    this.#passages.add(passage);
    for (const side of [local, remote]) {
      side.on('error', () => end(passage));
      side.once('close', () => {
        this.#passages.delete(passage);
        end(passage);
      });
    }
    local.on('data', () => (passage.waitsSinceMs ??= performance.now()));
    remote.on('data', () => (passage.waitsSinceMs = null));
    local.pipe(remote);
    remote.pipe(local);
  }

  #connect(host: string, image: string, disk: string): Promise<Duplex> {
    const turns = this.#turns.get(host) ?? new Turns(CONNECTS_AT_ONCE);
    this.#turns.set(host, turns);
    return turns.take(() => this.#context.peers.openDisk(host, image, disk));
  }

  /** No clone is left on an image that has been removed. */
  #forgetImages(): void {
    const { images, log } = this.#context;
    for (const [path, { image, server }] of this.#servers) {
      if (images.has(image)) continue;
      void rm(join(this.#directory, image), { recursive: true, force: true }).catch(() => undefined);
      this.#closeServer(path, server).catch((error: unknown) => {
        log.warn({ image, err: toMigrationError(error) }, 'the socket of a disk cannot be removed');
      });
    }
  }

  /** The network says nothing of a host that is gone as long as it has not acknowledged what was sent. */
  #endSilent(): void {
    const nowMs = performance.now();
    for (const passage of this.#passages) {
      const { waitsSinceMs } = passage;
      if (waitsSinceMs !== null && nowMs - waitsSinceMs > SILENT_MS_MAX) end(passage);
    }
  }

  async #closeServer(path: string, server: Server): Promise<void> {
    this.#servers.delete(path);
    const closed = new Promise<void>((resolve) => void server.close(() => resolve()));
    for (const passage of this.#passages) if (passage.path === path) end(passage);
    await closed;
  }
}

function end({ local, remote }: Passage): void {
  local.destroy();
  remote.destroy();
}
