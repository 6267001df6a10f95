/** Serial logs of VMs of other hosts: over mutual TLS between two servers, with fakes behind them. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PassThrough, Readable } from 'node:stream';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { ApiClient } from '../../../src/api/client.js';
import { RemoteAgents } from '../../../src/api/peers/client.js';
import { type ApiServer, buildServer } from '../../../src/api/server.js';
import { Authority } from '../../../src/tls/authority.js';
import { TlsStore } from '../../../src/tls/store.js';
import { type FakeServices, fakeServices, vmView } from '../../support/api-fakes.js';

let directory: string;
/** Of host A, which has the VMs. */
let services: FakeServices;
let server: ApiServer;
let port: number;
const closers: (() => unknown)[] = [];
const at = (name: string): string => join(directory, name);
const url = (): string => `https://127.0.0.1:${port}`;

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-logs-'));
  const authority = await Authority.create(at('ca'), 'test');
  for (const name of ['A', 'B']) await authority.issue({ role: 'host', name }, ['127.0.0.1'], at(name));
  await authority.issue({ role: 'user', name: 'alice', userRole: 'operator' }, [], at('alice'));
});
afterAll(() => rm(directory, { recursive: true, force: true }));

beforeEach(async () => {
  const store = new TlsStore(at('A'), () => undefined);
  services = fakeServices({ tls: store });
  server = buildServer(services);
  port = await server.listenTls('127.0.0.1', 0, store);
  closers.push(
    () => server.close(),
    () => store.close(),
  );
});
afterEach(async () => {
  for (const close of closers.splice(0).reverse()) await close();
});

/** Host B's view of host A. */
function peersOfB(): RemoteAgents {
  const store = new TlsStore(at('B'), () => undefined);
  const agents = new RemoteAgents({
    self: 'B',
    store,
    peers: { A: url() },
    local: () => {
      throw new Error('no test calls this host');
    },
  });
  closers.push(
    () => store.close(),
    () => agents.close(),
  );
  return agents;
}

describe('a serial log', () => {
  const read = async (log: Readable): Promise<string> => {
    const chunks: Buffer[] = [];
    for await (const chunk of log as AsyncIterable<Buffer>) chunks.push(chunk);
    return Buffer.concat(chunks).toString();
  };

  test('of a VM of another host arrives whole', async () => {
    const said = 'x'.repeat(3_000_000);
    await services.vms.run(vmView('web') as never);
    services.ends('web', said);
    const agents = peersOfB();
    expect(await read(await agents.serialLog('A', 'web'))).toBe(said);
    await expect(agents.serialLog('A', 'db')).rejects.toMatchObject({ code: 'NOT_FOUND' });
    await expect(agents.serialLog('D', 'web')).rejects.toMatchObject({ code: 'NOT_FOUND' });
  });

  test('that is cut off is never taken for a whole one', async () => {
    const line = new PassThrough();
    services.vms.openConsole = async () => line;
    line.write('the first part');
    const log = await peersOfB().serialLog('A', 'web');
    const reading = read(log);
    line.destroy(new Error('the disk is gone'));
    await expect(reading).rejects.toMatchObject({ code: 'DISCONNECTED' });
  });

  test('whose reader goes away is closed on its host', async () => {
    const lines: PassThrough[] = [];
    services.vms.openConsole = async () => {
      const line = new PassThrough();
      lines.push(line);
      line.write('the first part');
      return line;
    };
    const agents = peersOfB();
    const logs = await Promise.all(Array.from({ length: 32 }, () => agents.serialLog('A', 'web')));
    await expect(agents.serialLog('A', 'web')).rejects.toMatchObject({ code: 'CONFLICT' });
    for (const log of logs) log.destroy();
    await expect.poll(() => lines.every(({ destroyed }) => destroyed), { timeout: 20_000 }).toBe(true);
    (await agents.serialLog('A', 'web')).destroy();
  });

  test('is read no faster than its reader takes it', async () => {
    let sentBytes = 0;
    const endless = new Readable({
      read() {
        sentBytes += 65_536;
        this.push(Buffer.alloc(65_536));
      },
    });
    services.vms.openConsole = async () => endless as never;
    const log = await peersOfB().serialLog('A', 'web');
    const settled = async (): Promise<number> => {
      for (let before = -1; before !== sentBytes; await new Promise((wake) => setTimeout(wake, 200)))
        before = sentBytes;
      return sentBytes;
    };
    expect(await settled()).toBeLessThan(32 * 2 ** 20);
    await expect(read(log)).rejects.toMatchObject({ code: 'PEER_PROTOCOL' });
    await expect.poll(() => endless.destroyed, { timeout: 20_000 }).toBe(true);
  }, 60_000);

  test('is fetched for a client, and passes on what the other host says', async () => {
    const { port: portOfB } = await asHostB();
    const client = new ApiClient({ host: `https://127.0.0.1:${portOfB}`, tls: at('alice') });
    await services.vms.run(vmView('web') as never);
    services.ends('web', 'bye\n');
    expect(await read(await client.serialLogOn('A', 'web'))).toBe('bye\n');
    await expect(client.serialLogOn('A', 'db')).rejects.toMatchObject({ code: 'NOT_FOUND' });
    const line = new PassThrough();
    services.vms.openConsole = async () => line;
    line.write('the first part');
    const reading = read(await client.serialLogOn('A', 'web'));
    line.destroy(new Error('the disk is gone'));
    await expect(reading).rejects.toMatchObject({ code: 'DISCONNECTED' });
  });

  /** A daemon of host B that knows A. */
  async function asHostB() {
    const store = new TlsStore(at('B'), () => undefined);
    const peers = peersOfB();
    const other = buildServer(fakeServices({ host: 'B', tls: store, peers }));
    closers.push(
      () => other.close(),
      () => store.close(),
    );
    return { port: await other.listenTls('127.0.0.1', 0, store) };
  }
});
