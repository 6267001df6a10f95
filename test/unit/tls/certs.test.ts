/** Access: real TLS handshakes over loopback, with certificates that the project itself has issued. */
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { type AddressInfo, connect as tcpConnect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { connect, createServer, type Server, type TLSSocket } from 'node:tls';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { Authority } from '../../../src/tls/authority.js';
import { revokedSerials } from '../../../src/tls/crl.js';
import { checkHostIdentity, commonName, parseCommonName } from '../../../src/tls/identity.js';
import { TlsStore } from '../../../src/tls/store.js';

let directory: string;
let authority: Authority;
const at = (name: string): string => join(directory, name);
const stores: TlsStore[] = [];

function open(name: string): TlsStore {
  const store = new TlsStore(at(name), () => undefined);
  stores.push(store);
  return store;
}

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-certs-'));
  authority = await Authority.create(at('ca'), 'test');
  await authority.issue({ role: 'host', name: 'A' }, ['127.0.0.1'], at('A'));
  await authority.issue({ role: 'host', name: 'B' }, ['127.0.0.2'], at('B'));
  await authority.issue({ role: 'user', name: 'alice' }, [], at('alice'));
  await authority.issue({ role: 'host', name: 'old' }, ['127.0.0.1'], at('old'), -1);
  const stranger = await Authority.create(at('ca2'), 'stranger');
  await stranger.issue({ role: 'host', name: 'B' }, ['127.0.0.2'], at('B2'));
});

test('the folder of one name is not overwritten with another', async () => {
  const before = await readFile(join(at('A'), 'key.pem'), 'utf8');
  const issued = authority.issued.length;
  await expect(authority.issue({ role: 'host', name: 'B' }, ['127.0.0.2'], at('A'))).rejects.toMatchObject({
    code: 'CONFLICT',
    message: expect.stringContaining('the certificate of host/A') as string,
  });
  expect(await readFile(join(at('A'), 'key.pem'), 'utf8')).toBe(before);
  expect(authority.issued).toHaveLength(issued);
});

afterAll(async () => {
  for (const store of stores) store.close();
  await rm(directory, { recursive: true, force: true });
});

/**
 * A server with A's certificate that answers with the peer's identity, and a client. Resolves to what the client reads,
 * or to "refused: " and the reason of the refusing side.
 */
async function greet(client: object, options: { expected?: string; server?: TlsStore } = {}): Promise<string> {
  const store = options.server ?? open('A');
  const server: Server = createServer(store.options(), (socket: TLSSocket) => {
    const peer = store.peerOf(socket);
    socket.on('error', () => undefined);
    socket.end(peer === null ? 'nobody' : commonName(peer));
  });
  const reasons: string[] = [];
  server.on('tlsClientError', (error: NodeJS.ErrnoException, socket) =>
    // If node:tls rejects a certificate, only the socket has the reason.
    reasons.push(String(socket.authorizationError ?? error.code)),
  );
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  let seen = '';
  await new Promise<void>((resolve) => {
    const checkServerIdentity = checkHostIdentity(options.expected ?? 'A');
    const socket = connect({ host: '127.0.0.1', port, checkServerIdentity, ...client });
    socket.on('data', (data: Buffer) => (seen += data.toString()));
    socket.on('error', (error: NodeJS.ErrnoException) => reasons.push(error.code ?? error.message));
    socket.on('close', () => resolve());
  });
  await new Promise<void>((resolve) => server.close(() => resolve()));
  return seen === '' ? `refused: ${reasons.join(' ')}` : seen;
}

describe('a peer', () => {
  test('with a certificate of the cluster is known by its name', async () => {
    expect(await greet(open('B').options())).toBe('host/B');
    expect(await greet(open('alice').options())).toBe('user/alice');
  });

  test('without a certificate gets nothing', async () => {
    const { ca } = open('B').options();
    expect(await greet({ ca })).toMatch(/^refused: .*DID_NOT_RETURN_A_CERTIFICATE/);
  });

  test('with the certificate of another CA gets nothing', async () => {
    const { cert, key } = open('B2').options();
    const { ca } = open('B').options();
    expect(await greet({ ca, cert, key })).toMatch(/^refused: .*(UNABLE_TO|SELF_SIGNED|UNKNOWN_CA|CERT_SIGNATURE)/);
  });

  test('with an expired certificate gets nothing', async () => {
    expect(await greet({ ...open('old').options(), crl: undefined })).toMatch(/^refused: .*CERT_HAS_EXPIRED/);
  });

  test('below TLS 1.3 gets nothing', async () => {
    const options = { ...open('B').options(), minVersion: 'TLSv1.2', maxVersion: 'TLSv1.2' };
    expect(await greet(options)).toMatch(/^refused: .*(UNSUPPORTED_PROTOCOL|PROTOCOL_VERSION)/);
  });

  test('that does not speak TLS gets nothing', async () => {
    const store = open('A');
    const server = createServer(store.options(), (socket) => socket.end('secret'));
    server.on('tlsClientError', () => undefined);
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const { port } = server.address() as AddressInfo;
    const text = await new Promise<string>((resolve) => {
      let text = '';
      const socket = tcpConnect(port, '127.0.0.1', () => socket.write('GET / HTTP/1.1\r\nHost: x\r\n\r\n'));
      socket.on('data', (data: Buffer) => (text += data.toString('latin1')));
      socket.on('error', () => resolve(text));
      socket.on('close', () => resolve(text));
    });
    server.close();
    expect(text).not.toContain('secret');
    expect(text).not.toContain('HTTP');
  });
});

describe('a server', () => {
  test('that is another host than the one meant is refused by the client', async () => {
    expect(await greet(open('B').options(), { expected: 'C' })).toMatch(/^refused: .*UNAUTHENTICATED/);
  });

  test('cannot be played with a user certificate', async () => {
    expect(await greet(open('B').options(), { server: open('alice'), expected: 'alice' })).toMatch(
      /^refused: .*INVALID_PURPOSE/,
    );
  });
});

test('a revocation takes effect without a restart, for new connections and for open ones', async () => {
  await authority.issue({ role: 'host', name: 'C' }, [], at('C'));
  await authority.issue({ role: 'host', name: 'D' }, [], at('D'));
  const server = open('D');
  const client = open('C').options();
  const { ca, cert, key } = client;
  expect(await greet(client, { server, expected: 'D' })).toBe('host/C');

  const listener = createServer(server.options(), () => undefined);
  await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
  const accepted = new Promise<TLSSocket>((resolve) => listener.once('secureConnection', resolve));
  const { port } = listener.address() as AddressInfo;
  const socket = connect({ host: '127.0.0.1', port, ...client, checkServerIdentity: checkHostIdentity('D') });
  const openConnection = await accepted;
  expect(server.peerOf(openConnection)).toEqual({ role: 'host', name: 'C' });

  const changed = new Promise<void>((resolve) => server.onChange(resolve));
  const revoked = await authority.revoke('C');
  expect(revoked).toHaveLength(1);
  await authority.copyRevocations(at('D'));
  await changed;
  expect(server.peerOf(openConnection)).toBeNull();
  socket.destroy();
  listener.close();
  expect(await greet({ ca, cert, key }, { server, expected: 'D' })).toMatch(/^refused: .*CERT_REVOKED/);
  // Another name is not affected, and the same name can be issued again.
  expect(await greet({ ...open('B').options(), crl: undefined }, { server, expected: 'D' })).toBe('host/B');
  await authority.issue({ role: 'host', name: 'C' }, [], at('C-new'));
  expect(await greet(open('C-new').options(), { server, expected: 'D' })).toBe('host/C');
});

test('a revocation list that is not the CA’s shuts everybody out rather than letting anybody in', async () => {
  await authority.issue({ role: 'host', name: 'E' }, [], at('E'));
  await writeFile(join(at('E'), 'crl.pem'), await readFile(join(at('ca2'), 'crl.pem')));
  const { ca, cert, key } = open('B').options();
  expect(await greet({ ca, cert, key }, { server: open('E'), expected: 'E' })).toMatch(/^refused: .*CRL/);
});

test('a folder that becomes unusable keeps the old material in force', async () => {
  await authority.issue({ role: 'host', name: 'F' }, [], at('F'));
  const errors: string[] = [];
  const store = new TlsStore(at('F'), ({ code }) => errors.push(code));
  stores.push(store);
  await writeFile(join(at('F'), 'crl.pem'), 'garbage');
  store.reload();
  expect(errors[0]).toMatch(/SPEC_INVALID|CORRUPT/);
  expect(await greet(open('B').options(), { server: store, expected: 'F' })).toBe('host/B');
});

test('keys are readable by their owner alone', async () => {
  for (const path of [at('ca/ca-key.pem'), at('A/key.pem'), at('alice/key.pem')])
    expect((await stat(path)).mode & 0o777, path).toBe(0o600);
});

test('names that could be mistaken are refused', async () => {
  for (const name of ['', '..', 'a/b', 'host/B', 'a b', 'ä', 'x'.repeat(49), 'A\n', '-A'])
    await expect(authority.issue({ role: 'host', name }, [], at('bad')), name).rejects.toMatchObject({ code: 'USAGE' });
  for (const name of ['A', 'user', 'host/', 'root/A', 'host/A/B', 'host/A\nCN=host/B', ['host/A', 'host/B'], undefined])
    expect(parseCommonName(name)).toBeNull();
});

test('a second CA is not made over the first', async () => {
  await expect(Authority.create(at('ca'), 'test')).rejects.toMatchObject({ code: 'CONFLICT' });
  await expect(Authority.open(at('nowhere'))).rejects.toMatchObject({ code: 'NOT_FOUND' });
});

test('a torn revocation list is an error, never a shorter list', async () => {
  await authority.revoke('old');
  const pem = await readFile(join(at('ca'), 'crl.pem'), 'utf8');
  const whole = revokedSerials(pem);
  expect(whole.size).toBeGreaterThanOrEqual(1);
  const der = Buffer.from(pem.replace(/-----[^-]+-----|\s/g, ''), 'base64');
  for (let length = 0; length < der.length; length++) {
    const cut = `-----BEGIN X509 CRL-----\n${der.subarray(0, length).toString('base64')}\n-----END X509 CRL-----`;
    expect(() => revokedSerials(cut), `${length} bytes`).toThrow(/malformed/);
  }
});
