import { describe, expect, test } from 'vitest';
import { circlesOf, graphOfRooms } from './graph.js';
import { complaints, filesUnder } from './tree.js';

/** The part of transports that other rooms of native/ may include: the contract and its keys. */
const TRANSPORT_CONTRACT = ['transport/transport', 'transport/region_keys'] as const;
const MULTICAST = ['multicast', 'multicast/datagram'] as const;
const PROVIDER = ['transport', 'transport/stream', 'base', 'wire'] as const;
const PAGES = ['vm', 'uffd', 'memory', 'base', 'wire'] as const;

/**
 * The includes that each room of native/ may have, as in layers.test.ts. A room is a folder, and a folder in it is
 * another room. tests/ and bench/ may include everything but the addon.
 */
const NATIVE_LAYERS: Record<string, readonly string[]> = {
  wire: [],
  base: ['wire'],
  memory: ['base', 'wire'],
  uffd: ['base', 'wire'],
  transport: ['base', 'wire'],
  'transport/stream': ['transport', 'base', 'wire'],
  'transport/tcp': PROVIDER,
  'transport/shm': PROVIDER,
  'transport/verbs': ['transport', 'base', 'wire'],
  'transport/registry': ['transport', 'transport/tcp', 'transport/shm', 'transport/verbs'],
  'transport/testing': ['transport', 'base', 'wire'],
  vm: ['uffd', 'memory', 'base', 'wire'],
  fetch: [...TRANSPORT_CONTRACT, 'memory', 'base', 'wire'],
  'fetch/near': ['fetch', ...TRANSPORT_CONTRACT, 'memory', 'base', 'wire'],
  target: ['fetch', ...PAGES],
  source: [...TRANSPORT_CONTRACT, ...PAGES],
  'image/digests': ['memory', 'base', 'wire'],
  'image/serve': PAGES,
  'image/parent': ['image/serve', 'source', ...PAGES],
  'image/holder': [
    ...['image/digests', 'image/serve', 'fetch', 'fetch/near', 'source', 'transport/memory_access'],
    ...[...MULTICAST, ...PAGES],
  ],
  image: [
    ...['image/digests', 'image/parent', 'image/holder', 'image/serve', 'source', 'fetch', 'fetch/near'],
    ...[...MULTICAST, ...PAGES],
  ],
  'multicast/datagram': ['base', 'wire'],
  'multicast/udp': ['multicast/datagram', 'base', 'wire'],
  'multicast/verbs': ['multicast/datagram', 'transport', 'transport/verbs', 'base', 'wire'],
  multicast: ['multicast/datagram', 'multicast/udp', 'multicast/verbs', 'memory', 'base', 'wire'],
  preload: [],
  launcher: [],
  addon: [
    ...['fetch', 'fetch/near', 'target', 'source', 'image', 'image/digests', 'image/serve', 'transport/registry'],
    ...MULTICAST,
    ...[...TRANSPORT_CONTRACT, ...PAGES],
  ],
};
const NATIVE_UNBOUND = /^(tests|bench)(\/|$)/;

/** Returns the room of a path below native/: its folder, at most two levels deep. Files of native/ itself have none. */
function roomOf(path: string): string {
  return path.split('/').slice(0, -1).slice(0, 2).join('/');
}

/** The C and C++ files. Their paths, and those of their includes, are relative to native/. */
const nativeFiles = filesUnder('native')
  .filter(({ path }) => /\.(c|h|cpp|hpp)$/.test(path))
  .map(({ path, text }) => ({
    path: path.replace(/^native\//, ''),
    includes: [...text.matchAll(/^\s*#\s*include\s*"([^"]+)"/gm)].map(([, included = '']) => included),
  }));

describe('includes point one way', () => {
  test('every room of native/ has a rule', () => {
    const rooms = new Set(nativeFiles.map(({ path }) => roomOf(path)));
    expect([...rooms].filter((room) => !NATIVE_UNBOUND.test(room) && !(room in NATIVE_LAYERS))).toEqual([]);
    expect(Object.keys(NATIVE_LAYERS).filter((room) => !rooms.has(room))).toEqual([]);
  });

  test('between rooms', () => {
    const wrong: string[] = [];
    for (const { path, includes } of nativeFiles) {
      const room = roomOf(path);
      const allowed = NATIVE_LAYERS[room];
      for (const included of includes) {
        const name = included.replace(/\.(hpp|h)$/, '');
        const isRight =
          allowed === undefined
            ? !included.startsWith('addon/')
            : [room, ...allowed].some((one) => one === roomOf(included) || one === name);
        if (!isRight) wrong.push(`native/${path} must not include ${included}`);
      }
    }
    expect(wrong).toEqual([]);
  });

  test('and never in a circle, of files or of rooms', () => {
    const files = new Map(nativeFiles.map(({ path, includes }) => [path, includes]));
    expect(circlesOf(files)).toEqual([]);
    const bound = new Map([...files].filter(([path]) => !NATIVE_UNBOUND.test(roomOf(path))));
    expect(circlesOf(graphOfRooms(bound, roomOf))).toEqual([]);
  });

  test('only the addon knows Node', () => {
    const outside = filesUnder('native').filter(({ path }) => !path.startsWith('native/addon/'));
    expect(
      complaints(outside, (line) =>
        /^\s*#\s*include\s*[<"](napi|node_api|uv|js_native_api)/.test(line) ? line : null,
      ),
    ).toEqual([]);
  });

  test.each(['preload', 'launcher'])('the %s is plain C on libc', (room) => {
    const files = filesUnder(`native/${room}`);
    expect(files.map(({ path }) => path).filter((path) => !/\.(c|h)$/.test(path))).toEqual([]);
  });
});
