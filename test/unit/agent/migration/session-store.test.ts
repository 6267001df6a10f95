import { mkdtemp, readdir, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { EndedSessions } from '../../../../src/agent/migration/ended-sessions.js';
import { SessionStore, type SourceRecord, type TargetRecord } from '../../../../src/agent/migration/session-store.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

let stateDir: string;
let store: SessionStore;

const source: SourceRecord = {
  version: 1,
  role: 'source',
  session: 'a'.repeat(32),
  vm: 'web',
  token: 'b'.repeat(64),
  transport: 'tcp',
  target: 'B',
};
const target: TargetRecord = {
  version: 1,
  role: 'target',
  session: 'c'.repeat(32),
  job: 'job-1',
  spec: parseSpec({ name: 'web', memory: { size: '64M' } }),
  source: 'A',
  epoch: 3,
  mode: 'postcopy',
  accel: 'tcg',
  token: 'd'.repeat(64),
  bandwidthBytesPerS: 0,
  state: 'prepared',
  nativeUri: null,
  endpoint: { transport: 'tcp', host: '192.0.2.1', port: 7000, keys: [{ ram: 'aa', dataMap: 'bb' }] },
};
const code = (expected: string) => expect.objectContaining({ code: expected });

beforeEach(async () => {
  stateDir = await mkdtemp(join(tmpdir(), 'vmg-store-'));
  store = await SessionStore.open(stateDir);
});
afterEach(() => rm(stateDir, { recursive: true, force: true }));

describe('SessionStore', () => {
  test('what was saved is loaded by the next daemon, and only its user can read it', async () => {
    await store.save(source);
    await store.save(target);
    const { records, corrupt } = await (await SessionStore.open(stateDir)).load();
    expect(records).toHaveLength(2);
    expect(records).toContainEqual(source);
    expect(records).toContainEqual(target);
    expect(corrupt).toEqual([]);
    for (const name of await readdir(join(stateDir, 'sessions'))) {
      expect((await stat(join(stateDir, 'sessions', name))).mode & 0o777).toBe(0o600);
    }
  });

  test('the record saved last is the one that stays, however the writes overlap', async () => {
    const states = ['prepared', 'resumed', 'complete', 'prepared', 'complete'] as const;
    await Promise.all(states.map((state) => store.save({ ...target, state })));
    expect((await store.load()).records).toEqual([{ ...target, state: 'complete' }]);
    await Promise.all([store.save(target), store.remove(target)]);
    expect((await store.load()).records).toEqual([]);
    await store.remove(target);
  });

  test('a file that is not a session is reported by its path, and the others are loaded', async () => {
    await store.save(source);
    const path = join(stateDir, 'sessions', `${target.session}.target.json`);
    for (const text of [
      '',
      '{',
      '{}',
      JSON.stringify({ ...target, epoch: -1 }),
      JSON.stringify({ ...target, more: 1 }),
    ]) {
      await writeFile(path, text);
      const { records, corrupt } = await store.load();
      expect(records).toEqual([source]);
      expect(corrupt).toEqual([code('CORRUPT')]);
      expect(corrupt[0]?.message).toContain(path);
    }
    await writeFile(path, JSON.stringify({ ...target, session: 'e'.repeat(32) }));
    expect((await store.load()).corrupt).toEqual([code('CORRUPT')]);
  });

  test('a session id never leaves the directory', () => {
    expect(() => store.save({ ...source, session: '../../etc/passwd' })).toThrow(code('USAGE'));
    expect(() => store.remove({ role: 'source', session: '' })).toThrow(code('USAGE'));
  });
});

test('an ended session stays ended, and memory of them is bounded', () => {
  const ended = new EndedSessions();
  ended.add('first');
  expect(() => ended.refuse('first')).toThrow(code('CONFLICT'));
  for (let index = 0; index < 4096; index++) ended.add(String(index));
  expect(() => ended.refuse('4095')).toThrow(code('CONFLICT'));
  expect(() => ended.refuse('first')).not.toThrow();
});
