/** A host of a fork, with fakes of native and of images: the host that joins, or that of the image. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ImageServers } from '../../src/agent/fork/pages/image-servers.js';
import { ForkSession } from '../../src/agent/fork/session.js';

export const IMAGE = '3'.repeat(16);
export const FORK = '4'.repeat(16);
export const HOLDER = {
  ...{ session: 's', token: 't' },
  endpoint: { transport: 'tcp', host: 'h', port: 1, keys: [] },
} as const;

const nothing = async (): Promise<void> => undefined;
const directories: string[] = [];

export function removeScenes(): void {
  for (const directory of directories.splice(0)) rmSync(directory, { recursive: true, force: true });
}

export interface Change {
  readonly image?: object;
  readonly request?: object;
  readonly state?: string;
  readonly isCut?: boolean;
  readonly isRootRemoved?: boolean;
  /** Awaited while a capture is taken up. */
  readonly resuming?: Promise<void>;
}

export function scene(change: Change = {}) {
  const directory = mkdtempSync(join(tmpdir(), 'vmg-join-'));
  directories.push(directory);
  const calls: string[] = [];
  const saved: object[] = [];
  const memory = { sizeBytes: 1 << 24, pageBytes: 4096, regions: [] };
  let image: object = {
    ...{ id: IMAGE, state: 'capturing', spec: { name: 'web', memory }, deviceStateBytes: 0, overlays: [], disks: [] },
    ...change.image,
  };
  const images = {
    has: () => true,
    get: () => image,
    update: async (_: string, changed: object) => {
      image = { ...image, ...changed };
    },
    statePath: () => join(directory, 'state'),
    ...{ withPresence: async () => [], withDigests: async () => [], regions: async () => [] },
    setFilling: () => undefined,
    orders: { read: async () => new Uint32Array(0), write: nothing },
    delete: async () => void calls.push('delete image'),
    dropMemory: nothing,
  };
  let edge = () => undefined as void;
  const counters = { pagesCopied: 0n, pagesZero: 0n, reconnectCount: 0n };
  const reading: { state: string; failure: object | null; onClose: () => void } = {
    ...{ state: 'copying', failure: null, onClose: () => undefined },
  };
  const reader = () => ({
    connect: async () => void calls.push('connect'),
    start: () => {
      if (change.isCut === true) throw new Error('not connected');
      calls.push('start');
    },
    sweep: () => {
      if (reading.state === 'failed') throw new Error('failed');
      calls.push('sweep');
    },
    touched: () => new Uint32Array(0),
    snapshot: () => ({ state: reading.state, failure: reading.failure, counters }),
    close: async () => {
      calls.push('close');
      reading.onClose();
    },
  });
  const native = {
    openImageFetch: ({ onEdge }: { onEdge: () => void }) => {
      edge = onEdge;
      return reader();
    },
    openImageDigests: () => ({ close: () => void calls.push('close the digests') }),
    openImageCapture: () => ({ ...reader(), arm: nothing, resume: () => change.resuming ?? nothing(), leave: nothing }),
    openSourceSession: async (options: object) => {
      calls.push('image' in options ? 'serve the capture' : 'serve the files');
      return { keys: [], scan: () => void calls.push('scan'), close: nothing };
    },
  };
  const transports = {
    connecting: async (
      endpoint: object,
      holder: object,
      connect: (source: object, timeoutMs: number) => Promise<void>,
    ) => connect({ ...holder, ...endpoint }, 1),
    registering: (_: string, work: () => Promise<unknown>) => work(),
    served: async () => ({ provider: 'tcp', listener: {} }),
    place: () => ({ host: 'h', port: 1 }),
  };
  const quiet = () => undefined;
  const root = {
    serveImage: async (): Promise<object> => HOLDER,
    endImage: async () => void calls.push('end reading'),
  };
  const context = {
    ...{
      images,
      native,
      transports,
      host: 'A',
      peers: { agent: () => ({ forks: root }), isPeer: () => change.isRootRemoved !== true },
    },
    log: { debug: quiet, warn: quiet, error: quiet, info: quiet },
    vms: { endClone: nothing, room: { release: quiet }, has: () => false },
    inject: { hit: nothing },
    forkStore: { save: async (record: object) => void saved.push(record), remove: nothing },
  };
  const servers = new ImageServers(context as never);
  Object.assign(context, { servers });
  const request = {
    ...{ fork: FORK, job: 'j', vm: null, image: null, cloneCount: 2, parentMode: 'continue', memory: 'cow' },
    ...{ isPartialAllowed: false, ...change.request },
  };
  const record = {
    ...{ version: 1, request, image: IMAGE, state: change.state ?? 'prepared', runsAfterCommit: true },
    ...{ isWarm: false, clones: [], outcome: null, failure: null },
  } as never;
  const session = () => new ForkSession(context as never, { record, parent: null, clones: [], failures: [] });
  return {
    context: context as never,
    servers,
    root,
    record,
    calls,
    saved,
    directory,
    session,
    image: () => image,
    reader: reading,
    edge: () => edge(),
  };
}
