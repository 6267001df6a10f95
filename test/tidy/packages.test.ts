import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { root } from './tree.js';

interface Manifest {
  dependencies?: Record<string, string>;
  devDependencies?: Record<string, string>;
  overrides?: Record<string, string>;
  bin?: Record<string, string>;
}

interface Lock {
  packages: Record<string, { version?: string; integrity?: string; link?: boolean }>;
}

const readJson = (path: string): unknown => JSON.parse(readFileSync(join(root, path), 'utf8'));

test('every dependency is pinned to one version', () => {
  const { dependencies, devDependencies, overrides } = readJson('package.json') as Manifest;
  const all = Object.entries({ ...dependencies, ...devDependencies, ...overrides });
  expect(all.length).toBeGreaterThan(10);
  expect(all.filter(([, version]) => !/^\d+\.\d+\.\d+$/.test(version))).toEqual([]);
});

test('the lock file holds the pinned versions, with the hash of each', () => {
  const { dependencies, devDependencies } = readJson('package.json') as Manifest;
  const { packages } = readJson('package-lock.json') as Lock;
  for (const [name, version] of Object.entries({ ...dependencies, ...devDependencies }))
    expect(packages[`node_modules/${name}`]?.version, name).toBe(version);
  const unhashed = Object.entries(packages).filter(([path, entry]) => path !== '' && entry.integrity === undefined);
  expect(unhashed.map(([path]) => path)).toEqual([]);
});

test('every command has its source', () => {
  const { bin = {} } = readJson('package.json') as Manifest;
  const sources = Object.values(bin).map((path) => path.replace(/^dist\//, 'src/').replace(/\.js$/, '.ts'));
  expect(sources.filter((path) => !existsSync(join(root, path)))).toEqual([]);
});

test('the generated headers are what the protocol says', () => {
  const { status, stdout, stderr } = spawnSync(
    join(root, 'node_modules/.bin/tsx'),
    ['src/protocol/generate.ts', '--check'],
    { cwd: root, encoding: 'utf8' },
  );
  expect(`${stdout}${stderr}`.trim()).not.toMatch(/differ|stale|error/i);
  expect(status).toBe(0);
});
