/** The failures that tests inject, by point. None is silently ignored, and none happens without a request. */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';
import { NOTHING_INJECTED, parseInjections } from '../../../src/agent/inject.js';

test('only what was ordered happens', async () => {
  const inject = parseInjections('before:commit=fail; after:drain=delay:30 ;');
  await inject.hit('after:commit');
  await NOTHING_INJECTED.hit('before:commit');
  await expect(inject.hit('before:commit')).rejects.toMatchObject({ code: 'STEP_FAILED' });
  const startedMs = performance.now();
  await inject.hit('after:drain');
  expect(performance.now() - startedMs).toBeGreaterThanOrEqual(25);
});

test('park waits while the file exists, and says so', async () => {
  const directory = await mkdtemp(join(tmpdir(), 'vmg-inject-'));
  const file = join(directory, 'park');
  const inject = parseInjections(`before:drain=park:${file}`);
  await inject.hit('before:drain'); // no file: it continues
  await writeFile(file, '');
  let isOver = false;
  const hit = inject.hit('before:drain').then(() => {
    isOver = true;
  });
  await expect.poll(() => existsSync(`${file}.parked`)).toBe(true);
  expect(isOver).toBe(false);
  await rm(file);
  await hit;
  await rm(directory, { recursive: true });
});

test('crash is kill -9', () => {
  const module = fileURLToPath(new URL('../../../src/agent/inject.ts', import.meta.url));
  const script = `const { parseInjections } = await import(${JSON.stringify(module)});
    await parseInjections('x=crash').hit('x'); process.stdout.write('survived');`;
  const { signal, stdout } = spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script]);
  expect(stdout.toString()).toBe('');
  expect(signal).toBe('SIGKILL');
});

test.each(['before:commit', 'x=', 'x=explode', 'x=park:relative', 'x=delay:soon', 'x=delay:-1', '=fail'])(
  '"%s" is refused',
  (text) => expect(() => parseInjections(text)).toThrow(expect.objectContaining({ code: 'USAGE' })),
);
