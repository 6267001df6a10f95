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

/** Includes between the parts of native/, same reading. tests/ and bench/ may include everything but the addon. */
const NATIVE_LAYERS: Record<string, readonly string[]> = {
  wire: [],
  base: ['wire'],
  memory: ['base', 'wire'],
  uffd: ['base', 'wire', 'memory'],
  transport: ['base', 'wire'],
  pager: ['base', 'wire', 'memory', 'uffd', 'transport/transport'],
  preload: [],
  addon: ['base', 'wire', 'memory', 'uffd', 'transport', 'pager'],
};

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

  test('in native/', () => {
    const wrong: string[] = [];
    for (const file of filesUnder('native')) {
      const from = file.path.split('/')[1] ?? '';
      const allowed = NATIVE_LAYERS[from];
      for (const [, included = ''] of file.text.matchAll(/^\s*#\s*include\s*"([^"]+)"/gm)) {
        if (allowed !== undefined && !isAllowed(included.replace(/\.(hpp|h)$/, ''), from, allowed))
          wrong.push(`${file.path} must not include ${included}`);
        if (allowed === undefined && included.startsWith('addon/'))
          wrong.push(`${file.path} must not include ${included}`);
      }
    }
    expect(wrong).toEqual([]);
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
