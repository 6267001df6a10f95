/**
 * One daemon's part of fan-out in the simulation: the agent's own classes, on a simulated addon. Only what an
 * ImageServer and a FetchSession do is simulated, in the same order.
 */
import { FanoutAgent } from '../../../src/agent/fork/pages/fanout-agent.js';
import type { ImageServers } from '../../../src/agent/fork/pages/image-servers.js';
import { takeSeat } from '../../../src/agent/fork/pages/multicast-reader.js';
import { MulticastServer } from '../../../src/agent/fork/pages/multicast-server.js';
import { NearHolders } from '../../../src/agent/fork/pages/near-holders.js';
import { OriginHost } from '../../../src/agent/fork/pages/origin-host.js';
import type { ImageContext } from '../../../src/agent/image/context.js';
import type { FanoutPort } from '../../../src/engine/ports/fanout.js';
import type { ImageHolder } from '../../../src/engine/ports/fork.js';
import type { HostPort } from '../../../src/engine/ports/host.js';
import type { MulticastSenderOptions } from '../../../src/native/multicast-types.js';
import type { ForkHost, ForkNote, ForkWorld } from '../fork-world.js';
import { type Life, NEVER } from '../time.js';
import { type ReaderParts, SimReader } from './reader.js';
import { failure } from './replies.js';
import { SimSender } from './sender.js';

/** Sooner and later than a host waits for an answer. */
const LATE_MS = [700, 5_100];
const PROBE_BYTES = 1_500;

export interface HostFanoutParts {
  readonly world: ForkWorld;
  readonly host: ForkHost;
  readonly life: Life;
  readonly peer: (host: string) => HostPort;
}

export class HostFanout {
  readonly port: FanoutPort;
  readonly #parts: HostFanoutParts;
  readonly #context: ImageContext;
  readonly #multicasts: MulticastServer;
  /** By fork. */
  readonly #reading = new Map<string, { readonly reader: SimReader; readonly near: NearHolders }>();
  /** The images that this life of the daemon has read, and serves to others since. */
  readonly #held = new Set<string>();

  constructor(parts: HostFanoutParts) {
    this.#parts = parts;
    this.#context = contextOf(parts);
    this.#multicasts = new MulticastServer(this.#context);
    const servers = { multicasts: this.#multicasts, serveHeld: (image: string) => this.#serveHeld(image) };
    const held = () => ({ filling: null, isFixed: true });
    this.port = new FanoutAgent(this.#context, { servers: servers as unknown as ImageServers, held });
  }

  /** From now on this daemon knows which pages of the image are here. */
  hold(image: string): void {
    this.#held.add(image);
  }

  /** Reads an image as FetchSession does. Resolves when it is complete, or not wanted any more. */
  async read(note: ForkNote, readRoot: ReaderParts['readRoot']): Promise<void> {
    const { world, host, life } = this.#parts;
    const { fork, image: id, origin } = note;
    const image = host.images.get(id);
    if (image === undefined || origin === null) return;
    const reader = new SimReader({ world, host, life, note, image, readRoot });
    const levels = note.fanout?.levels ?? [];
    const near = new NearHolders(this.#context, {
      ...{
        image: id,
        levels,
        origin: { transport: 'tcp' as const, raised: (holder) => holder },
        reader: () => reader as never,
      },
    });
    this.#reading.set(fork, { reader, near });
    void this.#feed(note, reader, near);
    await reader.run();
    near.close();
    reader.close();
  }

  async #feed({ image, origin, fanout }: ForkNote, reader: SimReader, near: NearHolders): Promise<void> {
    const { world, life, peer, host } = this.#parts;
    if (fanout?.kind === 'multicast') {
      const root = new OriginHost(this.#context, { host: origin ?? '', image });
      const isSeated = await takeSeat({
        ...{ image, clock: life.clock, log: this.#context.log, isOver: () => !reader.isWanted || reader.isComplete },
        ask: () => root.joinMulticast(fanout.provider ?? 'udp', fanout.datagramBytesMax ?? 0),
        join: async ({ group, member }) => {
          const number = world.fanout.is('sameSeat') ? 1 : member;
          await reader.joinMulticast({ ...group, member: number, interfaceAddress: null });
        },
      });
      if (!isSeated && world.fanout.is('needSeat')) return;
    }
    for (const name of world.fanout.is('waitForNear') ? (fanout?.levels ?? []).flat() : []) {
      await peer(name)
        .fanout.serveHeld(image, host.name, 'tcp')
        .catch(() => undefined);
    }
    if (!reader.isWanted || reader.isComplete) return;
    await near.start();
    reader.sweep();
  }

  progress(fork: string) {
    const { reader, near } = this.#reading.get(fork) ?? {};
    const nearBytes = near?.bytes ?? {};
    const sum = Object.values(nearBytes).reduce((one, other) => one + other, 0);
    return { nearBytes, counters: { nearBytes: sum, multicastBytes: (reader?.multicastPages ?? 0) * 4096 } };
  }

  /** The image is about to be removed. */
  close(image: string): Promise<void> {
    return this.#multicasts.close(image);
  }

  async #serveHeld(image: string): Promise<ImageHolder> {
    const { world, host, life } = this.#parts;
    world.event(`${host.name} serves what it has`);
    await life.survive();
    const fault = world.fanout.heldFaultOf(host.name);
    if (fault === 'hangHeld') await NEVER;
    if (fault === 'delayHeld') await life.sleep(world.chance.pick(LATE_MS));
    if (fault === 'refuseHeld' || !host.images.has(image) || !this.#held.has(image)) {
      throw failure('CONFLICT', `${host.name} has no record of the pages of ${image}`);
    }
    const endpoint = { transport: 'tcp', host: host.name, port: 1, keys: [] } as const;
    return { session: '', token: '', endpoint };
  }
}

/** What the agent's classes see of their host. */
function contextOf({ world, host, life, peer }: HostFanoutParts): ImageContext {
  const { fanout } = world;
  const silent = () => undefined;
  const stateOf = (id: string): string => {
    const image = host.images.get(id);
    if (image === undefined) throw failure('NOT_FOUND', `no image ${id}`);
    if (fanout.is('sendIncomplete')) return 'complete';
    if (!image.hasState) return 'capturing';
    return image.pages.includes(null) ? 'filling' : 'complete';
  };
  const native = {
    openMulticastSender: async ({ image: [file], group: { session }, onEdge }: MulticastSenderOptions) =>
      new SimSender({ world, host: host.name, life, image: file?.path ?? '', session, onEdge }),
    sendMulticastProbe: (_group: unknown, ms: number, signal: AbortSignal) => life.sleep(ms, signal),
    receiveMulticastProbe: async () => {
      await life.sleep(1);
      return { largestBytes: fanout.isGroupSilent ? 0 : PROBE_BYTES };
    },
  };
  const context = {
    ...{ host: host.name, clock: life.clock, dataAddress: '0.0.0.0', native },
    multicast: { group: null, port: 7403, ttl: 1, bandwidthBytesPerS: 0 },
    log: { debug: silent, info: silent, warn: silent, error: silent },
    peers: { isPeer: (name: string) => world.hosts.has(name), agent: peer },
    transports: {
      connecting: (endpoint: object, holder: object, connect: (source: object, timeoutMs: number) => Promise<void>) =>
        connect({ ...holder, ...endpoint }, 1_000),
    },
    images: {
      get: (id: string) => ({ id, state: stateOf(id), readers: fanout.readersOf(id) }),
      regions: async ({ id }: { id: string }) => [{ path: id }],
      touchOrder: async () => new Uint32Array(0),
    },
    inject: {
      hit: async (point: string) => {
        world.event(`${host.name} ${point}`);
        await life.survive();
        if (fanout.areSeatsRefused) throw failure('CONFLICT', 'no seats');
      },
    },
  };
  return context as unknown as ImageContext;
}
