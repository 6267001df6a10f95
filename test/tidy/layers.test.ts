import { posix } from 'node:path';
import { describe, expect, test } from 'vitest';
import { circlesOf, graphOfRooms } from './graph.js';
import { complaints, filesUnder, type TextFile } from './tree.js';

/** Rooms that every room of src/ may import. */
const WORDS = ['domain', 'kit'] as const;
const PORTS = 'engine/ports';
/** What the agent knows of whatever runs its VMs. */
const BACKEND = 'backends';

/**
 * The imports that each room of src/ may have: other rooms, or single files of them. A room is a folder, named by its
 * path. The files directly in `engine` are a room beside `engine/migration`. A room may always import itself. The
 * daemon's entry point puts everything together, so it may import everything.
 */
const TYPESCRIPT_LAYERS: Record<string, readonly string[]> = {
  transports: [],
  domain: ['transports'],
  kit: ['domain'],
  protocol: ['domain'],
  durable: WORDS,
  config: WORDS,
  access: [...WORDS, 'durable'],
  tls: WORDS,
  schemas: [...WORDS, PORTS],
  native: [...WORDS, 'protocol'],

  planner: WORDS,
  'planner/migration': [...WORDS, 'planner'],
  // The choice of a transport is the same for the image of a fork.
  'planner/fork': [...WORDS, 'planner', 'planner/migration/transport', 'planner/fanout'],
  'planner/fanout': WORDS,
  'engine/ports': WORDS,
  engine: [...WORDS, PORTS],
  'engine/migration': [...WORDS, PORTS, 'engine', 'planner', 'planner/migration'],
  'engine/fork': [...WORDS, PORTS, 'engine', 'planner', 'planner/fork'],
  cluster: [...WORDS, PORTS, 'durable'],
  jobs: [
    ...[...WORDS, PORTS, 'durable', 'schemas', 'planner/migration', 'planner/fork', 'planner/fanout'],
    ...['engine', 'engine/migration', 'engine/fork'],
  ],

  'transports/host': [...WORDS, 'native', 'transports'],
  'transports/rdma': [...WORDS, 'native', 'transports', 'transports/host'],
  backends: WORDS,
  'backends/qemu/qmp': WORDS,
  'backends/qemu/export': [...WORDS, BACKEND],
  'backends/qemu/launcher': [...WORDS, BACKEND],
  'backends/qemu': [...WORDS, BACKEND, 'backends/qemu/qmp', 'backends/qemu/export', 'backends/qemu/launcher'],
  'agent/contain': WORDS,
  'agent/vm': [
    ...WORDS,
    PORTS,
    BACKEND,
    'agent/contain',
    'durable',
    'schemas',
    'native',
    'transports/host',
    'transports/rdma',
  ],
  'agent/memory': [...WORDS, 'durable', 'agent/vm'],
  'agent/policy': [...WORDS, BACKEND, 'agent/vm'],
  'agent/image': [...WORDS, PORTS, BACKEND, 'protocol', 'durable', 'schemas', 'native', 'agent/vm', 'agent/policy'],
  'agent/storage': [...WORDS, BACKEND, 'durable', 'schemas', 'agent/vm', 'agent/policy'],
  'agent/inventory': [
    ...[...WORDS, PORTS, BACKEND, 'protocol', 'agent/vm', 'agent/image', 'agent/policy', 'agent/storage'],
  ],
  'agent/migration': [
    ...[...WORDS, PORTS, BACKEND, 'protocol', 'durable', 'schemas', 'native', 'agent/vm', 'agent/policy'],
  ],
  'agent/fork/clones': [...WORDS, PORTS, BACKEND, 'agent/vm'],
  'agent/fork/bases': [...WORDS, BACKEND, 'agent/vm', 'agent/image'],
  'agent/fork/decision': [...WORDS, PORTS],
  'agent/fork/pages': [
    ...[...WORDS, PORTS, BACKEND, 'protocol', 'native'],
    ...['agent/vm', 'agent/image', 'agent/migration'],
  ],
  'agent/fork': [
    ...[...WORDS, PORTS, BACKEND, 'protocol', 'durable', 'schemas', 'native'],
    ...[
      'agent/fork/bases',
      'agent/fork/clones',
      'agent/fork/decision',
      'agent/fork/pages',
      'agent/vm',
      'agent/image',
      'agent/inventory',
      'agent/migration',
      'agent/policy',
    ],
  ],
  agent: [
    ...[...WORDS, PORTS, BACKEND, 'agent/vm', 'agent/image', 'agent/storage', 'agent/inventory'],
    ...['agent/migration', 'agent/fork', 'agent/fork/bases', 'agent/fork/pages/image-servers', 'agent/memory'],
    'agent/fork/pages/fanout-agent',
  ],

  'api/contract': [...WORDS, PORTS, 'tls'],
  'api/public': [...WORDS, 'protocol', 'schemas', 'api/contract'],
  'api/peers': [...WORDS, PORTS, 'tls', 'schemas', 'api/contract'],
  api: [...WORDS, 'tls', 'config', 'schemas', 'api/contract', 'api/public', 'api/peers'],
  state: [
    ...[...WORDS, PORTS, 'durable', 'schemas', 'cluster', 'access'],
    ...['agent/vm', 'agent/image', 'agent/migration', 'agent/fork'],
    ...['agent/memory/mark', 'agent/storage/markers', 'agent/peer-claims'],
  ],
  // Its files put the parts of the daemon together.
  daemon: WORDS,
  cli: [
    ...[...WORDS, 'transports', 'config', 'api/client', 'schemas', 'tls', 'state', 'durable/directory-lock', 'native'],
    // For the repair of a state directory whose daemon does not run.
    ...['api/peers/client', 'agent/peer-claims'],
  ],
};
const COMPOSITION_ROOTS = new Set(['src/cli/vmigrated.ts', 'src/daemon/daemon.ts', 'src/daemon/api-services.ts']);
/** The one file that says which back end there is. */
const MAKER_OF_BACKENDS = 'daemon/daemon';
/** The commands load the API's client, and must not load the server with it. */
const API_CLIENT_MAY_IMPORT = ['domain', 'config', 'schemas', 'tls/identity'];

const IMPORT = /(?:^|\s)(?:import|export)\b[^'"]*?from\s*['"]([^'"]+)['"]|import\s*\(?\s*['"]([^'"]+)['"]/g;

function importsOf(file: TextFile): string[] {
  return [...file.text.matchAll(IMPORT)].map((match) => match[1] ?? match[2] ?? '');
}

/** Returns the room of a file in src/: its folder, or its own name if it is directly in src/. */
function roomOf(path: string): string {
  const folder = posix.dirname(path);
  return folder === '.' ? path.replace(/\.ts$/, '') : folder;
}

/** Returns the imports of each file of src/. Paths are without `src/` and the extension. */
function importGraph(): Map<string, string[]> {
  const named = (path: string) => path.replace(/^src\/|\.[jt]s$/g, '');
  return new Map(
    filesUnder('src').map((file) => {
      const own = importsOf(file).filter((specifier) => specifier.startsWith('.'));
      return [named(file.path), own.map((specifier) => named(posix.join(posix.dirname(file.path), specifier)))];
    }),
  );
}

function isAllowed(target: string, from: string, allowed: readonly string[]): boolean {
  const room = roomOf(target);
  return room === from || allowed.some((name) => name === room || name === target);
}

describe('circles', () => {
  test('are found', () => {
    const chain = { a: ['b'], b: ['c'], c: [] };
    expect(circlesOf(new Map(Object.entries(chain)))).toEqual([]);
    expect(circlesOf(new Map(Object.entries({ ...chain, c: ['b'], d: ['a'] })))).toEqual([['b', 'c']]);
    expect(circlesOf(new Map(Object.entries({ ...chain, c: ['a'], d: ['e'], e: ['d'] })))).toEqual([
      ['a', 'b', 'c'],
      ['d', 'e'],
    ]);
  });

  test('do not exist between files, nor between rooms', () => {
    const files = importGraph();
    expect(circlesOf(files)).toEqual([]);
    expect(circlesOf(graphOfRooms(files, roomOf))).toEqual([]);
  });
});

describe('imports point one way', () => {
  test('every room of src/ has a rule, and every rule a room', () => {
    const rooms = new Set([...importGraph().keys()].map(roomOf));
    expect([...rooms].filter((room) => !(room in TYPESCRIPT_LAYERS))).toEqual([]);
    expect(Object.keys(TYPESCRIPT_LAYERS).filter((room) => !rooms.has(room))).toEqual([]);
  });

  test('in src/', () => {
    const wrong: string[] = [];
    for (const [file, targets] of importGraph()) {
      if (COMPOSITION_ROOTS.has(`src/${file}.ts`)) continue;
      const from = roomOf(file);
      const allowed = file === 'api/client' ? API_CLIENT_MAY_IMPORT : (TYPESCRIPT_LAYERS[from] ?? []);
      for (const target of targets) {
        if (!isAllowed(target, from, allowed)) wrong.push(`src/${file}.ts must not import ${target}`);
      }
    }
    expect(wrong).toEqual([]);
  });

  test('only native/binding.ts loads the addon', () => {
    const others = filesUnder('src').filter(({ path }) => path !== 'src/native/binding.ts');
    expect(complaints(others, (line) => (/createRequire|dlopen|\.node['"`]/.test(line) ? line.trim() : null))).toEqual(
      [],
    );
  });
});

describe('back ends', () => {
  test('are known to the daemon’s entry point alone', () => {
    const isBackend = (path: string) => /^backends\/[^/]+\//.test(path);
    const knowing = [...importGraph()].filter(([file, targets]) => !isBackend(file) && targets.some(isBackend));
    expect(knowing.map(([file]) => file)).toEqual([MAKER_OF_BACKENDS]);
  });

  test('do not know of each other', () => {
    const backendOf = (path: string) => /^backends\/([^/]+)\//.exec(path)?.[1];
    const wrong = [...importGraph()].flatMap(([file, targets]) => {
      const own = backendOf(file);
      const others = targets.filter((target) => own !== undefined && (backendOf(target) ?? own) !== own);
      return others.map((target) => `src/${file}.ts must not import ${target}`);
    });
    expect(wrong).toEqual([]);
  });

  test('QMP is spoken in backends/qemu alone', () => {
    // The schema of specs refuses arguments that are our own: `-qmp` is one.
    const others = filesUnder('src').filter(
      ({ path }) => !path.startsWith('src/backends/qemu/') && path !== 'src/schemas/vm-spec.ts',
    );
    const spoken = /qmp|\.execute(Untyped)?\(/i;
    expect(complaints(others, (line) => (spoken.test(line) ? line.trim() : null))).toEqual([]);
  });
});

test('planner and engine have no clock, no chance and no I/O: they take them from engine/ports', () => {
  const pure = [...filesUnder('src/planner'), ...filesUnder('src/engine')];
  const impure = new RegExp(
    [
      /['"]node:/,
      /\bDate\.now\b/,
      /\bnew Date\(\)/,
      /\bperformance\./,
      /\bMath\.random\b/,
      /\bset(Timeout|Interval|Immediate)\b/,
      /\bprocess\./,
      /\bfetch\(/,
      /\bcrypto\b/,
    ]
      .map(({ source }) => source)
      .join('|'),
  );
  expect(complaints(pure, (line) => (impure.test(line) ? line.trim() : null))).toEqual([]);
});
