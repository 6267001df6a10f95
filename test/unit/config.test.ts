import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { loadConfig, parseConfig } from '../../src/config.js';

const GOOD = { name: 'A', api: ['unix:/run/a.sock'], data: '10.0.0.1', state: '/var/lib/vmigrate' };

test('the least that a daemon needs', () => {
  expect(parseConfig(GOOD)).toMatchObject({
    name: 'A',
    api: [{ kind: 'unix', path: '/run/a.sock' }],
    data: { address: '10.0.0.1', port: 7401 },
    accel: 'auto',
    peers: {},
    testFaults: false,
  });
});

test('addresses of both kinds, with ports', () => {
  const tls = '/etc/vmigrate/tls';
  const config = parseConfig({ ...GOOD, tls, api: ['https://[fe80::1]:7400', 'https://10.0.0.1:0'], data: '[::1]:9' });
  expect(config.api).toEqual([
    { kind: 'https', address: 'fe80::1', port: 7400 },
    { kind: 'https', address: '10.0.0.1', port: 0 },
  ]);
  expect(config.data).toEqual({ address: '::1', port: 9 });
  expect(parseConfig({ ...GOOD, data: '::1' }).data).toEqual({ address: '::1', port: 7401 });
});

test('RDMA has an address and timeouts of its own', () => {
  expect(parseConfig(GOOD).rdma).toEqual({ address: null, ackTimeoutExponent: 18, retryCount: 7 });
  const rdma = { address: 'rdma://10.1.0.1', retryCount: 3 };
  expect(parseConfig({ ...GOOD, rdma }).rdma).toEqual({
    address: { address: '10.1.0.1', port: null },
    ackTimeoutExponent: 18,
    retryCount: 3,
  });
  expect(parseConfig({ ...GOOD, rdma: { address: 'rdma://[fd00::1]:7' } }).rdma.address).toEqual({
    address: 'fd00::1',
    port: 7,
  });
});

test('data connections have integrity, and no older hello, unless somebody says so', () => {
  expect(parseConfig(GOOD).security).toMatchObject({ dataSecurity: 'integrity', acceptOldHello: false });
  const security = { dataSecurity: 'none', acceptOldHello: true };
  expect(parseConfig({ ...GOOD, security }).security).toMatchObject(security);
});

describe('what is wrong is named', () => {
  const cases: [string, object, RegExp][] = [
    [
      'encryption with old hellos',
      { security: { dataSecurity: 'encrypt', acceptOldHello: true } },
      /excludes dataSecurity/,
    ],
    ['an unknown key', { stat: '/x' }, /stat: unknown key/],
    ['an unknown key further in', { limits: { recoveryMs: 1 } }, /limits\.recoveryMs: unknown key/],
    ['a protection that does not exist', { security: { dataSecurity: 'secret' } }, /security\.dataSecurity: /],
    ['a name that is a path', { name: '../A' }, /name: must be/],
    ['no API', { api: [] }, /api: /],
    ['an API of another kind', { api: ['http://10.0.0.1:80'] }, /api\.0: "http:\/\/10\.0\.0\.1:80" is not/],
    ['an API by name', { api: ['https://localhost:1'], tls: '/t' }, /api\.0: /],
    ['an API without a port', { api: ['https://10.0.0.1'], tls: '/t' }, /api\.0: /],
    ['a port that is none', { data: '10.0.0.1:70000' }, /data: /],
    ['data by name', { data: 'localhost' }, /data: /],
    [
      'an RDMA address without its scheme',
      { rdma: { address: '10.0.0.1' } },
      /rdma\.address: "10\.0\.0\.1" is not rdma:/,
    ],
    ['RDMA by name', { rdma: { address: 'rdma://mlx5_0' } }, /rdma\.address: /],
    ['an RDMA port that is none', { rdma: { address: 'rdma://10.0.0.1:70000' } }, /rdma\.address: /],
    ['an RDMA timeout without end', { rdma: { ackTimeoutExponent: 0 } }, /rdma\.ackTimeoutExponent: /],
    ['more retries than there can be', { rdma: { retryCount: 8 } }, /rdma\.retryCount: /],
    ['a socket path that is too long', { api: [`unix:/${'x'.repeat(120)}`] }, /api\.0: /],
    [
      'a state directory that is too long for its socket',
      { state: `/${'x'.repeat(120)}` },
      /state: the path is too long/,
    ],
    ['https without certificates', { api: ['https://10.0.0.1:1'] }, /tls: /],
    ['peers without certificates', { peers: { B: 'https://10.0.0.2:7400' } }, /tls: /],
    ['itself as a peer', { tls: '/t', peers: { A: 'https://10.0.0.2:7400' } }, /peers: A is the name of this host/],
    ['a peer with a path', { tls: '/t', peers: { B: 'https://10.0.0.2:7400/x' } }, /peers\.B: /],
    ['a peer with a user', { tls: '/t', peers: { B: 'https://me@10.0.0.2:7400' } }, /peers\.B: /],
    ['an accelerator', { accel: 'hvf' }, /accel: /],
    ['an absurd limit', { limits: { recoveryMsMax: 1e12 } }, /limits\.recoveryMsMax: /],
  ];
  test.each(cases)('%s', (_, change, message) => {
    expect(() => parseConfig({ ...GOOD, ...change })).toThrow(
      expect.objectContaining({ code: 'SPEC_INVALID', message: expect.stringMatching(message) }),
    );
  });

  test('nothing at all', () => {
    for (const input of [null, 7, [], 'name: A', {}])
      expect(() => parseConfig(input)).toThrow(expect.objectContaining({ code: 'SPEC_INVALID' }));
  });
});

describe('a file', () => {
  let directory: string;
  beforeAll(async () => {
    directory = await mkdtemp(join(tmpdir(), 'vmg-config-'));
  });
  afterAll(() => rm(directory, { recursive: true, force: true }));

  async function file(text: string): Promise<string> {
    const path = join(directory, 'config.yaml');
    await writeFile(path, text);
    return path;
  }

  test('may be YAML; a flag wins over it, peers are joined', async () => {
    const path = await file(
      'name: A\napi: ["unix:/run/a.sock"]\ndata: 10.0.0.1\nstate: /s\ntls: /t\npeers: {B: "https://10.0.0.2:1"}\n',
    );
    const config = await loadConfig(path, { state: '/other', peers: { C: 'https://10.0.0.3:1' } });
    expect(config.state).toBe('/other');
    expect(Object.keys(config.peers)).toEqual(['B', 'C']);
  });

  test.each([
    ['torn YAML', 'name: [A'],
    ['a list', '- A'],
    ['nothing', ''],
    ['a bomb of aliases', `a: &a [1]\nb: &b [${'*a,'.repeat(20)}]\nc: [${'*b,'.repeat(20)}]\n`],
  ])('%s is refused', async (_, text) => {
    await expect(loadConfig(await file(text), {})).rejects.toMatchObject({ code: 'SPEC_INVALID' });
  });

  test('that is not there is refused', async () => {
    await expect(loadConfig(join(directory, 'none'), {})).rejects.toMatchObject({ code: 'SPEC_INVALID' });
  });
});
