/**
 * Access to real daemons: nobody gets in without a valid certificate of this cluster, on the API port and on the data
 * port.
 */
import { randomBytes } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Refusal } from '../../src/domain/refusal.js';
import type { VmView } from '../../src/domain/vm.js';
import { CONSTANTS } from '../../src/protocol/wire.js';
import type { HostView } from '../../src/schemas/host.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

const API_PORT = 7400;
const DATA_PORT = 7401;

let cluster: Cluster;
let guest: Guest;
const at = (...parts: string[]): string => join(cluster.directory, ...parts);

beforeAll(async () => {
  cluster = await Cluster.create();
  guest = await Guest.start(cluster, 'A', { name: 'guarded', touchMiB: 16, memoryMiB: 128, restPercent: 75 });
  await cluster.must(cluster.local('vmctl', 'certs', 'init', at('other-ca')));
  await cluster.must(
    cluster.local('vmctl', 'certs', 'user', 'mallory', '--dir', at('other-ca'), '--out', at('mallory')),
  );
  await cluster.must(cluster.local('vmctl', 'certs', 'user', 'alice', '--dir', at('ca'), '--out', at('alice')));
});
afterAll(() => cluster?.destroy());

interface Attempt {
  readonly method?: 'GET' | 'POST';
  readonly body?: string;
  readonly maxVersion?: 'TLSv1.2' | 'TLSv1.3';
}

/** Runs a client in host B's namespace, with the certificate in `folder` or none. Returns the body that it has read. */
const CLIENT = `
  const { readFileSync } = require('node:fs');
  const { url, folder, ca, method, body, maxVersion } = JSON.parse(process.argv[1]);
  const read = (name) => readFileSync(folder + '/' + name);
  const own = folder === null ? {} : { cert: read('cert.pem'), key: read('key.pem') };
  const options = { ca: readFileSync(ca), ...own, method, maxVersion, headers: { 'content-type': 'application/json' } };
  const request = require('node:https').request(url, options, (response) => response.pipe(process.stdout));
  request.on('error', (error) => console.error(error.code));
  request.end(body);`;

async function read(
  folder: string | null,
  path: string,
  { method = 'GET', body, maxVersion }: Attempt = {},
): Promise<string> {
  const url = `https://${cluster.host('A').address}:${API_PORT}${path}`;
  const options = JSON.stringify({ url, folder, ca: at('A/tls/ca.pem'), method, body, maxVersion });
  const { stdout } = await cluster.inNamespace(cluster.host('B').namespace, process.execPath, '-e', CLIENT, options);
  return stdout;
}

describe('the API port', () => {
  it('answers hosts and users of the cluster', async () => {
    expect(JSON.parse(await read(at('alice'), '/v1/vms'))).toMatchObject([{ name: guest.name }]);
    expect(JSON.parse(await read(at('B/tls'), '/agent/v1/ping', { method: 'POST', body: '[]' }))).toEqual({
      result: null,
    });
  });

  it('says nothing to anybody else', async () => {
    expect(await read(null, '/v1/vms')).toBe('');
    expect(await read(at('mallory'), '/v1/vms')).toBe('');
    expect(await read(at('alice'), '/v1/vms', { maxVersion: 'TLSv1.2' })).toBe('');
  });

  it('takes no host’s call from a user', async () => {
    const body = JSON.stringify([guest.name, '0'.repeat(32)]);
    const answer = await read(at('alice'), '/agent/v1/call/stop', { method: 'POST', body });
    expect(JSON.parse(answer)).toMatchObject({ code: 'NOT_PERMITTED' });
    await guest.expectProgress('A');
  });
});

describe('the data port', () => {
  it('says nothing to garbage, or to a hello without a session of this host', async () => {
    const { address } = cluster.host('A');
    const script = `
      const socket = require('node:net').connect(${DATA_PORT}, '${address}');
      let bytes = 0;
      socket.on('data', (data) => (bytes += data.length));
      socket.on('error', () => undefined);
      socket.on('close', () => (console.log('closed after', bytes), process.exit()));
      socket.write(Buffer.from(process.argv[1], 'hex'));
      setTimeout(() => process.exit(), 60_000);`;
    const hello = Buffer.alloc(56);
    hello.writeUInt32LE(0x31474d56, 0);
    randomBytes(48).copy(hello, 8);
    for (const bytes of [randomBytes(256), Buffer.from('GET / HTTP/1.1\r\nHost: x\r\n\r\n'.padEnd(64)), hello]) {
      const { stdout } = await cluster.inNamespace(
        cluster.host('B').namespace,
        process.execPath,
        '-e',
        script,
        bytes.toString('hex'),
      );
      const received = Number(/closed after (\d+)/.exec(stdout)?.[1]);
      // The client reads at most one reply, which says nothing of any session.
      expect(received).toBeLessThanOrEqual(CONSTANTS.HELLO_REPLY_BYTES);
    }
    await guest.expectProgress('A');
  });
});

describe('a host whose certificate is revoked', () => {
  it('is out at once, for new connections and for those that are open; the VM stays where it is', async () => {
    expect(await cluster.json<HostView[]>('A', 'vmctl', 'hosts')).toMatchObject([{}, { host: 'B', isReachable: true }]);
    const revoke = ['certs', 'revoke', 'B', '--dir', at('ca'), '--out', at('A/tls')];
    await cluster.must(cluster.local('vmctl', ...revoke));
    await eventually('A sees B as a stranger', 60_000, async () => {
      const [, peer] = await cluster.json<HostView[]>('A', 'vmctl', 'hosts');
      return peer?.isReachable === false && peer.error?.code === 'UNAUTHENTICATED' ? true : undefined;
    });
    expect(await read(at('B/tls'), '/agent/v1/ping', { method: 'POST', body: '[]' })).toBe('');
    const moved = await cluster.vmigrate('A', guest.name, 'B', '--json');
    expect(moved.code).toBe(3);
    const { error } = JSON.parse(moved.stdout) as { error: { details: Refusal[] } };
    expect(error.details.map(({ code }) => code)).toContain('TARGET_UNREACHABLE');
    await guest.expectProgress('A');
  });

  it('is in again with a new certificate, without a restart of the others', async () => {
    const { address } = cluster.host('B');
    const issue = ['certs', 'host', 'B', '--address', address, '--dir', at('ca'), '--out', at('B/tls')];
    await cluster.must(cluster.local('vmctl', ...issue));
    const pid = cluster.daemonPid('A');
    await eventually('A and B know each other again', 60_000, async () => {
      const [, peer] = await cluster.json<HostView[]>('A', 'vmctl', 'hosts');
      return peer?.isReachable === true ? true : undefined;
    });
    expect(cluster.daemonPid('A')).toBe(pid);
    await cluster.must(cluster.vmigrate('A', guest.name, 'B'));
    await guest.expectProgress('B');
    await guest.expectClean('B');
  });
});

it('a daemon does not start with another host’s certificate', async () => {
  const args = cluster.daemonArguments('A').map((arg) => (arg === at('A/tls') ? at('B/tls') : arg));
  const fresh = args.map((arg) => (arg === at('A/state') ? at('fresh-state') : arg));
  const { code, stderr } = await cluster.inNamespace(
    cluster.host('A').namespace,
    process.execPath,
    'dist/cli/vmigrated.js',
    ...fresh,
  );
  expect(code).toBe(2);
  expect(stderr).toContain('holds the certificate of host B, not of host A');
  expect(await cluster.json<VmView[]>('A', 'vmctl', 'ps')).toEqual([]);
  expect(await readFile(at('A/tls/cert.pem'), 'utf8')).toContain('BEGIN CERTIFICATE');
});
