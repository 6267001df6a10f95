import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { Tokens } from '../../../src/access/tokens.js';

const DAY_MS = 86_400_000;
let state: string;
let damaged: string[];

beforeEach(async () => {
  state = await mkdtemp(join(tmpdir(), 'vmg-tokens-'));
  damaged = [];
});
afterEach(async () => {
  vi.useRealTimers();
  await rm(state, { recursive: true, force: true });
});

const open = (): Promise<Tokens> => Tokens.open(state, ({ code }) => damaged.push(code));
const ORDER = { name: 'ci', role: 'operator', expiresInMs: 30 * DAY_MS, createdBy: 'local/0' } as const;

describe('a token', () => {
  test('is known by its secret, also to the next daemon, and no file has the secret', async () => {
    const { token, id } = await (await open()).create(ORDER);
    const tokens = await open();
    expect(tokens.holderOf(token)).toMatchObject({ id, name: 'ci', role: 'operator' });
    expect(tokens.list()).toEqual([expect.not.objectContaining({ hash: expect.anything() })]);
    const secret = token.slice('vmg_0123456789ab_'.length);
    for (const file of await readdir(join(state, 'tokens')))
      expect(await readFile(join(state, 'tokens', file), 'utf8')).not.toContain(secret.slice(0, 12));
  });

  test('is nobody’s with another secret or id, when it is cut short, or as its hash', async () => {
    const tokens = await open();
    const { token, id } = await tokens.create(ORDER);
    const { token: other } = await tokens.create({ ...ORDER, name: 'other', role: 'admin' });
    const secret = token.slice(17);
    const hash = /"hash": ?"([0-9a-f]{64})"/.exec(await readFile(join(state, 'tokens', `${id}.json`), 'utf8'))?.[1];
    expect(hash).toBeDefined();
    const forged = [
      ...['', 'vmg_', token.slice(0, -1), `${token}A`, token.toUpperCase()],
      `${other.slice(0, 17)}${secret}`,
      `vmg_${id}_${hash}`,
      `vmg_${id}_${Buffer.from(hash ?? '', 'hex').toString('base64url')}`,
      `vmg_000000000000_${secret}`,
    ];
    for (const each of forged) expect(tokens.holderOf(each), each).toBeNull();
  });

  test('is worthless once it has expired or is revoked, and its name is free again', async () => {
    vi.useFakeTimers({ toFake: ['Date'] });
    const tokens = await open();
    const { token } = await tokens.create(ORDER);
    await expect(tokens.create(ORDER)).rejects.toMatchObject({ code: 'CONFLICT' });
    vi.setSystemTime(Date.now() + 30 * DAY_MS);
    expect(tokens.holderOf(token)).toBeNull();
    expect(tokens.isAnyValid).toBe(false);
    const { token: second } = await tokens.create(ORDER);
    expect(tokens.holderOf(second)).not.toBeNull();
    expect(await tokens.revoke('ci')).toHaveLength(2);
    expect(tokens.holderOf(second)).toBeNull();
    expect(tokens.isAnyValid).toBe(false);
    expect((await open()).list()).toEqual([]);
    await expect(tokens.revoke('ci')).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  test('tells when its time is over, and once it is revoked', async () => {
    const tokens = await open();
    let told = 0;
    tokens.onRevoked(() => told++);
    await tokens.create({ ...ORDER, name: 'short', expiresInMs: 50 });
    await expect.poll(() => told).toBeGreaterThan(0);
    expect(tokens.isAnyValid).toBe(false);
    await tokens.create(ORDER);
    told = 0;
    await tokens.revoke('ci');
    expect(told).toBe(1);
  });

  test('that cannot be removed from the disk is worthless at once, and its revocation can be repeated', async () => {
    const tokens = await open();
    const { token, id } = await tokens.create(ORDER);
    const path = join(state, 'tokens', `${id}.json`);
    await rm(path);
    await mkdir(path);
    await expect(tokens.revoke('ci')).rejects.toThrow();
    expect(tokens.holderOf(token)).toBeNull();
    await rm(path, { recursive: true });
    expect(await tokens.revoke('ci')).toHaveLength(1);
    expect(tokens.list()).toEqual([]);
  });

  test('of one name is made once, however often it is asked for at the same time', async () => {
    const tokens = await open();
    const made = await Promise.allSettled([tokens.create(ORDER), tokens.create(ORDER), tokens.create(ORDER)]);
    expect(made.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
    await expect(tokens.create({ ...ORDER, name: '0123456789ab' })).rejects.toMatchObject({ code: 'USAGE' });
  });

  test('whose record is damaged is worthless, and the others are not', async () => {
    const tokens = await open();
    const { token, id } = await tokens.create(ORDER);
    const { token: whole } = await tokens.create({ ...ORDER, name: 'whole' });
    const path = join(state, 'tokens', `${id}.json`);
    // A viewer who could write to the file would make himself an administrator.
    await writeFile(path, (await readFile(path, 'utf8')).replace('operator', 'admin'));
    const next = await open();
    expect(damaged).toEqual(['CORRUPT']);
    expect(next.holderOf(token)).toBeNull();
    expect(next.holderOf(whole)).not.toBeNull();
  });
});
