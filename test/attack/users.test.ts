/**
 * Users who try what they may not, against a real daemon: from other uids of its machine, and over the network with
 * certificates and tokens. What they may do works; what they may not leaves nothing behind but a line of the audit log.
 */
import { execFile } from 'node:child_process';
import { chmod, mkdir, readFile, symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { USER_ROLES, type UserRole } from '../../src/domain/caller.js';
import type { VmView } from '../../src/domain/vm.js';
import { Cluster } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

const API_PORT = 7400;
/** A group and users that nobody else on this machine has. */
const GROUP = 64_733;
const MEMBER = 64_734;
const STRANGER = 64_735;

let cluster: Cluster;
let guest: Guest;
const at = (...parts: string[]): string => join(cluster.directory, ...parts);

beforeAll(async () => {
  const id = `/tmp/vmg-attack-${process.pid}`;
  await mkdir(id, { recursive: true });
  cluster = await Cluster.create({
    hosts: ['A', 'B'],
    daemonConfig: { security: { socketGroup: String(GROUP), allow: { paths: [id] }, auditLog: `${id}/audit.log` } },
    hostConfigs: { B: { security: { auditLog: `${id}/audit-B.log` } } },
  });
  allowed = id;
  guest = await Guest.start(cluster, 'A', { name: 'victim', touchMiB: 16, memoryMiB: 128, restPercent: 75 });
  for (const role of USER_ROLES)
    await cluster.must(
      cluster.local('vmctl', 'certs', 'user', role, '--role', role, '--dir', at('ca'), '--out', at(role)),
    );
  // Others may reach the socket, as in /run.
  await chmod(at(), 0o711);
  await chmod(at('A'), 0o711);
});
afterAll(async () => {
  await cluster?.destroy();
  await promisify(execFile)('rm', ['-rf', allowed]);
});

let allowed = '';

interface Answer {
  /** 0: no answer. */
  readonly status: number;
  readonly body: { readonly code?: string; readonly message?: string; readonly name?: string };
  /** Why there is none. */
  readonly error?: string;
}

/** Makes one request in a process of its own: as another user on the unix socket, or from B's namespace on https. */
const CLIENT = `
  const { readFileSync } = require('node:fs');
  const given = JSON.parse(process.argv[1]);
  const { uid, groups, socketPath, url, folder, ca, token, method, path, body, headers } = given;
  if (uid !== undefined) { process.setgroups(groups); process.setgid(uid); process.setuid(uid); }
  const read = (name) => readFileSync(folder + '/' + name);
  const own = folder === undefined ? {} : { cert: read('cert.pem'), key: read('key.pem') };
  const bearer = token === undefined ? {} : { authorization: 'Bearer ' + token };
  const all = { 'content-type': 'application/json', ...headers, ...bearer };
  const options = { method, path, headers: all, ...(socketPath ? { socketPath } : { ca: readFileSync(ca), ...own }) };
  const done = (answer) => { console.log(JSON.stringify(answer)); process.exit(0); };
  const onAnswer = (response) => {
    let text = '';
    response.on('data', (data) => (text += data));
    response.on('end', () => done({ status: response.statusCode, body: JSON.parse(text) }));
  };
  const { request } = require(socketPath ? 'node:http' : 'node:https');
  const sent = socketPath ? request(options, onAnswer) : request(url + path, options, onAnswer);
  sent.on('error', (error) => done({ status: 0, body: {}, error: error.code }));
  sent.end(body);`;

interface Request {
  readonly method?: string;
  readonly path?: string;
  readonly body?: object;
  readonly headers?: Readonly<Record<string, string>>;
}

async function run(options: object): Promise<Answer> {
  const { namespace } = cluster.host('B');
  const { stdout } = await cluster.inNamespace(namespace, process.execPath, '-e', CLIENT, JSON.stringify(options));
  return JSON.parse(stdout) as Answer;
}

function asUser(uid: number, groups: readonly number[], request: Request): Promise<Answer> {
  return run({ uid, groups, socketPath: cluster.apiSocket('A'), ...plain(request) });
}

function overNetwork(who: { folder?: string; token?: string }, request: Request): Promise<Answer> {
  const url = `https://${cluster.host('A').address}:${API_PORT}`;
  return run({ url, ca: at('A/tls/ca.pem'), ...who, ...plain(request) });
}

const plain = ({ method = 'GET', path = '/v1/whoami', body, headers }: Request) => ({
  ...{ method, path, headers },
  ...(body === undefined ? {} : { body: JSON.stringify(body) }),
});

const STOP: Request = { method: 'POST', path: '/v1/vms/victim/stop', body: { force: true } };
const start = (spec: object): Request => ({
  ...{ method: 'POST', path: '/v1/vms' },
  body: { name: 'own', memory: { size: '32M' }, ...spec },
});

async function auditLines(who: string): Promise<Record<string, unknown>[]> {
  const lines = (await readFile(join(allowed, 'audit.log'), 'utf8')).trim().split('\n');
  return lines.map((line) => JSON.parse(line) as Record<string, unknown>).filter((line) => line['who'] === who);
}

describe('a user of this machine', () => {
  it('cannot reach the daemon without the group of the socket', async () => {
    expect(await asUser(STRANGER, [], {})).toMatchObject({ status: 0, error: 'EACCES' });
    expect(await asUser(STRANGER, [], STOP)).toMatchObject({ status: 0, error: 'EACCES' });
  });

  it('of that group is known by the uid that the kernel says, and is an operator, not an administrator', async () => {
    expect(await asUser(MEMBER, [GROUP], {})).toMatchObject({
      status: 200,
      body: { name: `local/${MEMBER}`, role: 'operator' },
    });
    const token = { method: 'POST', path: '/v1/tokens', body: { name: 'mine', role: 'admin', expiresInMs: 60_000 } };
    expect(await asUser(MEMBER, [GROUP], token)).toMatchObject({ status: 403, body: { code: 'NOT_PERMITTED' } });
    expect(await auditLines(`local/${MEMBER}`)).toMatchObject([
      { what: 'POST /v1/tokens', result: 'NOT_PERMITTED', from: 'unix socket' },
    ]);
  });
});

describe('an operator', () => {
  const refused = async (spec: object): Promise<void> => {
    const answer = await overNetwork({ folder: at('operator') }, start(spec));
    expect(answer, JSON.stringify(spec)).toMatchObject({ status: 403, body: { code: 'NOT_PERMITTED' } });
  };

  // Each of these read or wrote a file of root when every user could name them.
  it('cannot make QEMU open files of the host', async () => {
    await symlink('/etc/shadow', join(allowed, 'link.raw'));
    const img = (...args: string[]) => promisify(execFile)('qemu-img', ['create', '-q', ...args]);
    await writeFile(at('secret'), 'x'.repeat(1 << 20), { mode: 0o600 });
    await img('-f', 'qcow2', '-b', at('secret'), '-F', 'raw', join(allowed, 'front.qcow2'));
    await refused({ qemuArgs: ['-fw_cfg', 'name=opt/shadow,file=/etc/shadow'] });
    await refused({ qemuArgs: ['-chardev', `file,id=x,path=${at('written')}`, '-D', at('log')] });
    await refused({ devices: ['virtio-rng-pci,romfile=/etc/shadow'] });
    await refused({ disks: [{ path: '/etc/shadow' }] });
    await refused({ disks: [{ path: join(allowed, 'link.raw') }] });
    await refused({ disks: [{ path: join(allowed, 'front.qcow2') }] });
    await refused({ disks: [{ path: `${allowed}/../shadow` }] });
    await refused({ kernel: '/etc/shadow' });
    await refused({ nics: [{ bridge: 'br0' }] });
    expect(await cluster.json<VmView[]>('A', 'vmctl', 'ps')).toHaveLength(1);
    await expect(readFile(at('written'))).rejects.toMatchObject({ code: 'ENOENT' });
  });

  it('cannot make the daemon read or write files elsewhere', async () => {
    const operator = { folder: at('operator') };
    // A file of an image can say anything, and an operator's guest can write one to its disk.
    const load = { method: 'POST', path: '/v1/images/load', body: { path: join(allowed, 'link.raw') } };
    expect(await overNetwork(operator, load)).toMatchObject({ status: 403 });
    const save = { method: 'POST', path: `/v1/images/${'0'.repeat(16)}/save`, body: { path: '/etc/cron.d/x' } };
    expect(await overNetwork(operator, save)).toMatchObject({ status: 403 });
  });

  it('can start and stop a VM that names what the policy allows', async () => {
    const operator = { folder: at('operator') };
    await promisify(execFile)('qemu-img', ['create', '-q', '-f', 'raw', join(allowed, 'disk.raw'), '1M']);
    expect(await overNetwork(operator, start({ disks: [{ path: join(allowed, 'disk.raw') }] }))).toMatchObject({
      status: 201,
    });
    const stop = { method: 'POST', path: '/v1/vms/own/stop', body: { force: true } };
    expect(await overNetwork(operator, stop)).toMatchObject({ status: 200 });
    const lines = await auditLines('user/operator');
    expect(lines.at(-1)).toMatchObject({ what: 'POST /v1/vms/:name/stop', object: 'own', result: 'ok' });
    expect(lines.at(-2)).toMatchObject({ what: 'POST /v1/vms', object: 'own', result: 'ok' });
  });
});

describe('a viewer', () => {
  it('sees the VMs, and stops none', async () => {
    const viewer = { folder: at('viewer') };
    expect(await overNetwork(viewer, { path: '/v1/vms/victim' })).toMatchObject({ status: 200 });
    expect(await overNetwork(viewer, STOP)).toMatchObject({ status: 403, body: { code: 'NOT_PERMITTED' } });
    await guest.expectProgress('A');
  });
});

describe('the certificate of a host', () => {
  it('starts and stops nothing as a client', async () => {
    const host = { folder: at('B/tls') };
    expect(await overNetwork(host, STOP)).toMatchObject({ status: 403 });
    expect(await overNetwork(host, start({}))).toMatchObject({ status: 403 });
    await guest.expectProgress('A');
  });
});

describe('a token', () => {
  const create = async (name: string, role: UserRole, expires = '1h'): Promise<string> => {
    const args = ['token', 'create', '--name', name, '--role', role, '--expires', expires];
    return (await cluster.must(cluster.vmctl('A', ...args))).stdout.trim();
  };

  it('lets a client without a certificate in, on its host alone, and no longer once it is revoked', async () => {
    expect(await overNetwork({}, {})).toMatchObject({ status: 0 });
    const token = await create('ci', 'viewer');
    expect(await overNetwork({ token }, {})).toMatchObject({ status: 200, body: { name: 'token/ci', role: 'viewer' } });
    expect(await overNetwork({ token }, STOP)).toMatchObject({ status: 403 });
    const file = at('ci.token');
    await writeFile(file, `${token}\n`, { mode: 0o600 });
    const remote = (host: string, ...args: string[]) => {
      const url = `https://${cluster.host(host).address}:${API_PORT}`;
      const words = ['--host', url, '--tls', at('A/tls'), '--token-file', file, ...args];
      const program = join(import.meta.dirname, '../../dist/cli/vmctl.js');
      return cluster.inNamespace(cluster.host('B').namespace, process.execPath, program, ...words);
    };
    expect((await remote('A', 'whoami')).stdout).toBe('token/ci on A: viewer\n');
    expect((await remote('B', 'whoami')).code).toBe(5);
    await create('other', 'viewer');
    await cluster.must(cluster.vmctl('A', 'token', 'revoke', 'ci'));
    expect(await overNetwork({ token }, {})).toMatchObject({ status: 401, body: { code: 'UNAUTHENTICATED' } });
    await guest.expectProgress('A');
  });

  it('is not in any file of the daemon', async () => {
    const token = await create('hidden', 'admin');
    const secret = token.slice('vmg_0123456789ab_'.length);
    const { stdout } = await promisify(execFile)('grep', ['-rlF', secret, at('A')]).catch(() => ({ stdout: '' }));
    expect(stdout).toBe('');
  });
});

describe('a web page', () => {
  it('cannot use the certificate of the browser that shows it', async () => {
    const headers = { origin: 'https://evil.example', 'sec-fetch-site': 'cross-site' };
    const request = { method: 'POST', path: '/v1/vms/victim/pause', headers };
    expect(await overNetwork({ folder: at('admin') }, request)).toMatchObject({ status: 403 });
    await guest.expectProgress('A');
  });
});
