import { posix } from 'node:path';
import { describe, expect, test } from 'vitest';
import { complaints, filesUnder, type TextFile } from './tree.js';

const PORTS = ['engine/ports', 'engine/fork-ports'] as const;

/**
 * What each part of src/ may import: another part, or one file of it. A part may always import itself. The daemon's
 * entry point puts everything together, and so may import everything.
 */
const TYPESCRIPT_LAYERS: Record<string, readonly string[]> = {
  domain: [],
  errors: ['domain'],
  protocol: ['domain', 'errors'],
  config: ['domain', 'errors'],
  planner: ['domain', 'errors', ...PORTS],
  engine: ['domain', 'errors', 'planner'],
  registry: ['domain', 'errors', ...PORTS],
  jobs: ['domain', 'errors', 'engine', 'planner', 'registry'],
  native: ['domain', 'errors', 'protocol'],
  qemu: ['domain', 'errors', 'protocol'],
  agent: ['domain', 'errors', 'protocol', 'config', ...PORTS, 'native', 'qemu', 'registry'],
  tls: ['domain', 'errors'],
  api: ['domain', 'errors', 'protocol', 'config', ...PORTS, 'jobs', 'planner', 'tls', 'agent/spec'],
  cli: ['domain', 'errors', 'config', 'api/client', 'api/schemas', 'api/schemas-fork', 'tls'],
};
const COMPOSITION_ROOTS = new Set(['src/cli/vmigrated.ts', 'src/cli/daemon.ts']);
const API_CLIENT_MAY_IMPORT = ['domain', 'errors', 'config', 'api/schemas', 'tls/identity'];

/** What a room of native/ sees of transports: the contract, and the keys that go with it. */
const TRANSPORT_CONTRACT = ['transport/transport', 'transport/region_keys'] as const;
const PROVIDER = ['transport', 'transport/stream', 'base', 'wire'] as const;
const PAGES = ['vm', 'uffd', 'memory', 'base', 'wire'] as const;

/**
 * Includes between the rooms of native/, same reading. A room is a folder, and a folder in it is a room of its own.
 * tests/ and bench/ may include everything but the addon.
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
  'transport/testing': ['transport', 'base', 'wire'],
  vm: ['uffd', 'memory', 'base', 'wire'],
  target: [...TRANSPORT_CONTRACT, ...PAGES],
  source: [...TRANSPORT_CONTRACT, ...PAGES],
  image: PAGES,
  preload: [],
  addon: ['target', 'source', 'image', ...TRANSPORT_CONTRACT, ...PAGES],
};
const NATIVE_UNBOUND = /^(tests|bench)(\/|$)/;

const IMPORT = /(?:^|\s)(?:import|export)\b[^'"]*?from\s*['"]([^'"]+)['"]|import\s*\(?\s*['"]([^'"]+)['"]/g;

function importsOf(file: TextFile): string[] {
  return [...file.text.matchAll(IMPORT)].map((match) => match[1] ?? match[2] ?? '');
}

/** The part of src/ that a file belongs to; domain.ts and its neighbours (domain-fork.ts) are one. */
function partOf(path: string): string {
  return (path.split('/')[0] ?? '').replace(/\.ts$/, '').replace(/^domain-.*/, 'domain');
}

function isAllowed(target: string, from: string, allowed: readonly string[]): boolean {
  const part = partOf(target);
  return part === from || allowed.some((name) => name === part || name === target);
}

/** The room of a path below native/: its folder, two deep at most. Files of native/ itself are in none. */
function roomOf(path: string): string {
  return path.split('/').slice(0, -1).slice(0, 2).join('/');
}

/** C and C++ files, with paths below native/; what they include is named from there, too. */
const nativeFiles = filesUnder('native')
  .filter(({ path }) => /\.(c|h|cpp|hpp)$/.test(path))
  .map(({ path, text }) => ({
    path: path.replace(/^native\//, ''),
    includes: [...text.matchAll(/^\s*#\s*include\s*"([^"]+)"/gm)].map(([, included = '']) => included),
  }));

/** A way from a node back to itself, or null where there is none. */
function circleIn(graph: ReadonlyMap<string, ReadonlySet<string>>): string[] | null {
  const done = new Set<string>();
  const visit = (node: string, way: readonly string[]): string[] | null => {
    if (way.includes(node)) return [...way.slice(way.indexOf(node)), node];
    if (done.has(node)) return null;
    for (const next of graph.get(node) ?? []) {
      const circle = visit(next, [...way, node]);
      if (circle !== null) return circle;
    }
    done.add(node);
    return null;
  };
  for (const node of graph.keys()) {
    const circle = visit(node, []);
    if (circle !== null) return circle;
  }
  return null;
}

describe('imports point one way', () => {
  test('every part of src/ has a rule', () => {
    const parts = filesUnder('src').map(({ path }) => partOf(path.replace(/^src\//, '')));
    expect([...new Set(parts)].filter((part) => !(part in TYPESCRIPT_LAYERS))).toEqual([]);
  });

  test('in src/', () => {
    const wrong: string[] = [];
    for (const file of filesUnder('src')) {
      if (COMPOSITION_ROOTS.has(file.path)) continue;
      const from = partOf(file.path.replace(/^src\//, ''));
      const allowed = file.path === 'src/api/client.ts' ? API_CLIENT_MAY_IMPORT : (TYPESCRIPT_LAYERS[from] ?? []);
      for (const specifier of importsOf(file)) {
        if (!specifier.startsWith('.')) continue;
        const target = posix.join(posix.dirname(file.path), specifier).replace(/^src\/|\.js$/g, '');
        if (!isAllowed(target, from, allowed)) wrong.push(`${file.path} must not import ${target}`);
      }
    }
    expect(wrong).toEqual([]);
  });

  test('every room of native/ has a rule', () => {
    const rooms = new Set(nativeFiles.map(({ path }) => roomOf(path)));
    expect([...rooms].filter((room) => !NATIVE_UNBOUND.test(room) && !(room in NATIVE_LAYERS))).toEqual([]);
    expect(Object.keys(NATIVE_LAYERS).filter((room) => !rooms.has(room))).toEqual([]);
  });

  test('in native/', () => {
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

  test('in native/, never in a circle', () => {
    const files = new Map(nativeFiles.map(({ path, includes }) => [path, new Set(includes)]));
    expect(circleIn(files), 'of files').toBeNull();
    const rooms = new Map<string, Set<string>>();
    for (const { path, includes } of nativeFiles) {
      const room = roomOf(path);
      if (NATIVE_UNBOUND.test(room)) continue;
      const others = includes.map(roomOf).filter((other) => other !== room);
      rooms.set(room, new Set([...(rooms.get(room) ?? []), ...others]));
    }
    expect(circleIn(rooms), 'of rooms').toBeNull();
  });

  test('a circle is found, and nothing else is taken for one', () => {
    const graph = (edges: Record<string, string[]>) => new Map(Object.entries(edges).map(([a, b]) => [a, new Set(b)]));
    expect(circleIn(graph({ a: ['b', 'c'], b: ['d'], c: ['d'], d: ['unknown'] }))).toBeNull();
    expect(circleIn(graph({ a: ['b'], b: ['c'], c: ['d'], d: ['b'] }))).toEqual(['b', 'c', 'd', 'b']);
    expect(circleIn(graph({ a: ['a'] }))).toEqual(['a', 'a']);
  });

  test('only the addon knows Node', () => {
    const outside = filesUnder('native').filter(({ path }) => !path.startsWith('native/addon/'));
    expect(
      complaints(outside, (line) =>
        /^\s*#\s*include\s*[<"](napi|node_api|uv|js_native_api)/.test(line) ? line : null,
      ),
    ).toEqual([]);
  });

  test('the preload is plain C on libc', () => {
    const files = filesUnder('native/preload');
    expect(files.map(({ path }) => path).filter((path) => !/\.(c|h)$/.test(path))).toEqual([]);
  });

  test('only native/binding.ts loads the addon', () => {
    const others = filesUnder('src').filter(({ path }) => path !== 'src/native/binding.ts');
    expect(complaints(others, (line) => (/createRequire|dlopen|\.node['"`]/.test(line) ? line.trim() : null))).toEqual(
      [],
    );
  });
});

test('planner and engine have no clock, no chance and no I/O: they take them from engine/ports', () => {
  const pure = [...filesUnder('src/planner'), ...filesUnder('src/engine')];
  const impure =
    /['"]node:|\bDate\.now\b|\bnew Date\(\)|\bperformance\.|\bMath\.random\b|\bset(Timeout|Interval|Immediate)\b|\bprocess\.|\bfetch\(|\bcrypto\b/;
  expect(complaints(pure, (line) => (impure.test(line) ? line.trim() : null))).toEqual([]);
});
