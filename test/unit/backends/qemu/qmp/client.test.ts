import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { QMP_LINE_BYTES_MAX, QmpClient, type QmpEvent } from '../../../../../src/backends/qemu/qmp/client.js';
import { LineSplitter } from '../../../../../src/backends/qemu/qmp/line-splitter.js';

const GREETING = '{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":22}},"capabilities":["oob"]}}\r\n';

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-qmp-'));
});
afterEach(async () => {
  await rm(directory, { recursive: true, force: true });
});

interface Request {
  readonly execute?: string;
  readonly 'exec-oob'?: string;
  readonly arguments?: Record<string, unknown>;
  readonly id: number;
}

/** A QMP server that answers as a test wants, for answers that a real QEMU never gives. */
class ScriptedQemu {
  readonly path = join(directory, 'scripted.sock');
  readonly requests: Request[] = [];
  greeting = GREETING;
  socket: Socket | null = null;
  /** null: no answer */
  answer: (request: Request) => string | null = () => '{"return":{}}';
  readonly #server: Server;

  constructor() {
    this.#server = createServer((socket) => {
      this.socket = socket;
      socket.on('error', () => undefined);
      socket.write(this.greeting);
      const lines = new LineSplitter(1 << 20);
      socket.on('data', (chunk) => {
        for (const line of lines.push(chunk) ?? []) this.#request(JSON.parse(line) as Request);
      });
    });
  }

  async listen(): Promise<this> {
    this.#server.listen(this.path);
    await once(this.#server, 'listening');
    return this;
  }

  connect(timeoutMs = 2000): Promise<QmpClient> {
    return QmpClient.connect(this.path, { timeoutMs });
  }

  close(): void {
    this.socket?.destroy();
    this.#server.close();
  }

  #request(request: Request): void {
    this.requests.push(request);
    const answer = request.execute === 'qmp_capabilities' ? '{"return":{}}' : this.answer(request);
    if (answer !== null) this.socket?.write(answer.replace('{', `{"id":${request.id},`) + '\r\n');
  }
}

const failure = (promise: Promise<unknown>) =>
  promise.then(
    () => 'resolved',
    (error: { code?: string }) => error.code ?? 'an error without code',
  );

describe('a scripted QEMU', () => {
  let qemu: ScriptedQemu;
  beforeEach(async () => {
    qemu = await new ScriptedQemu().listen();
  });
  afterEach(() => qemu.close());

  test('answers are matched by id, in whatever order they come', async () => {
    const client = await qemu.connect();
    qemu.answer = () => null;
    const first = client.execute('query-status');
    const second = client.execute('query-version');
    await expect.poll(() => qemu.requests.length).toBe(3);
    const [, one, two] = qemu.requests;
    qemu.socket?.write(`{"id":${two?.id},"return":"second"}\n{"id":${one?.id},"return":"first"}\n`);
    expect(await Promise.all([first, second])).toEqual(['first', 'second']);
    client.close();
  });

  test('a command says no more than it must', async () => {
    const client = await qemu.connect();
    await client.execute('cont');
    await client.execute('migrate-incoming', { uri: 'fd:3' });
    const [, first, second] = qemu.requests;
    expect(first).toEqual({ execute: 'cont', id: first?.id });
    expect(second).toEqual({ execute: 'migrate-incoming', arguments: { uri: 'fd:3' }, id: second?.id });
    client.close();
  });

  test('an error answer carries class and description', async () => {
    const client = await qemu.connect();
    qemu.answer = () => '{"error":{"class":"GenericError","desc":"no such thing"}}';
    await expect(client.execute('stop')).rejects.toMatchObject({
      code: 'QEMU_FAILED',
      details: { class: 'GenericError', desc: 'no such thing' },
    });
    client.close();
  });

  test('a late answer is dropped, the connection goes on', async () => {
    const client = await qemu.connect();
    qemu.answer = () => null;
    expect(await failure(client.execute('stop', {}, { timeoutMs: 20 }))).toBe('TIMEOUT');
    const late = qemu.requests.at(-1)?.id;
    qemu.answer = () => '{"return":{"running":true}}';
    qemu.socket?.write(`{"id":${late},"return":{}}\n`);
    expect(await client.execute('query-status')).toEqual({ running: true });
    client.close();
  });

  test('abort gives a command up', async () => {
    const client = await qemu.connect();
    qemu.answer = () => null;
    const abort = new AbortController();
    const command = failure(client.execute('stop', {}, { signal: abort.signal }));
    abort.abort();
    expect(await command).toBe('CANCELLED');
    expect(await failure(client.execute('stop', {}, { signal: abort.signal }))).toBe('CANCELLED');
    client.close();
  });

  test('out-of-band commands are marked as such', async () => {
    const client = await qemu.connect();
    await client.execute('migrate-pause', {}, { isOutOfBand: true });
    expect(qemu.requests.at(-1)?.['exec-oob']).toBe('migrate-pause');
    client.close();
  });

  test('close rejects what is pending; onClosed is called once, also afterwards', async () => {
    const client = await qemu.connect();
    qemu.answer = () => null;
    const calls: string[] = [];
    client.onClosed((error) => calls.push(`before ${error.code}`));
    const command = failure(client.execute('stop'));
    const event = failure(client.waitForEvent('STOP', { timeoutMs: 5000 }));
    client.close();
    client.close();
    client.onClosed((error) => calls.push(`after ${error.code}`));
    expect([await command, await event]).toEqual(['QEMU_GONE', 'QEMU_GONE']);
    expect(await failure(client.execute('stop'))).toBe('QEMU_GONE');
    expect(client.isClosed).toBe(true);
    expect(calls).toEqual(['before QEMU_GONE', 'after QEMU_GONE']);
  });

  test('the peer ends: everything pending fails with QEMU_GONE', async () => {
    const client = await qemu.connect();
    qemu.answer = () => null;
    const command = failure(client.execute('stop'));
    await expect.poll(() => qemu.requests.length).toBe(2);
    qemu.socket?.destroy();
    expect(await command).toBe('QEMU_GONE');
  });

  test('waitForEvent: filter, and a deadline', async () => {
    const client = await qemu.connect();
    const wanted = client.waitForEvent('MIGRATION', {
      timeoutMs: 2000,
      filter: (event) => event.data['status'] === 'completed',
    });
    for (const status of ['active', 'completed']) {
      qemu.socket?.write(
        `{"event":"MIGRATION","data":{"status":"${status}"},"timestamp":{"seconds":2,"microseconds":5}}\n`,
      );
    }
    expect(await wanted).toEqual({ name: 'MIGRATION', data: { status: 'completed' }, timestampUs: 2_000_005 });
    expect(await failure(client.waitForEvent('NEVER', { timeoutMs: 10 }))).toBe('TIMEOUT');
    client.close();
  });

  test.each([
    ['not JSON', 'hello\n'],
    ['not an object', '[1]\n'],
    ['an answer to nothing', '{"id":99,"return":{}}\n'],
    ['an id of another type', '{"id":"1","return":{}}\n'],
    ['an answer without id', '{"error":{"class":"GenericError","desc":"JSON parse error"}}\n'],
    ['neither return nor error', '{"id":2}\n'],
  ])('hostile: %s ends the connection', async (_what, line) => {
    const client = await qemu.connect();
    qemu.answer = () => null;
    const command = failure(client.execute('stop'));
    await expect.poll(() => qemu.requests.length).toBe(2);
    qemu.socket?.write(line);
    expect(await command).toBe('PEER_PROTOCOL');
    expect(client.isClosed).toBe(true);
  });

  test('hostile: an endless line is cut off', async () => {
    const client = await qemu.connect();
    const ended = new Promise<string>((resolve) => client.onClosed((error) => resolve(error.code)));
    const megabyte = Buffer.alloc(1 << 20, 'x');
    for (let sent = 0; sent <= QMP_LINE_BYTES_MAX; sent += megabyte.length) qemu.socket?.write(megabyte);
    expect(await ended).toBe('PEER_PROTOCOL');
  });

  test.each(['{"QMP":{}}\n', '{"event":"STOP"}\n', 'SSH-2.0-OpenSSH\r\n'])('no QMP greeting: %j', async (greeting) => {
    qemu.greeting = greeting;
    expect(await failure(qemu.connect())).toBe('PEER_PROTOCOL');
  });

  test('silence instead of a greeting', async () => {
    qemu.greeting = '';
    expect(await failure(qemu.connect(50))).toBe('TIMEOUT');
  });
});

test('nobody listens', async () => {
  const path = join(directory, 'nothing.sock');
  expect(await failure(QmpClient.connect(path, { timeoutMs: 1000 }))).toBe('QEMU_GONE');
  expect(await failure(QmpClient.connect(path, { timeoutMs: 50, isRetrying: true }))).toBe('TIMEOUT');
  const signal = AbortSignal.abort();
  expect(await failure(QmpClient.connect(path, { timeoutMs: 1000, isRetrying: true, signal }))).toBe('CANCELLED');
});

test('lines survive being cut anywhere', () => {
  fc.assert(
    fc.property(
      fc.array(fc.string({ unit: 'grapheme' }).map((text) => text.replaceAll(/\s/g, '_'))),
      fc.array(fc.nat(64)),
      (lines, cuts) => {
        const bytes = Buffer.from(lines.map((line) => `${line}\n`).join(''));
        const splitter = new LineSplitter(1 << 20);
        const seen: string[] = [];
        let at = 0;
        for (const cut of [...cuts, bytes.length]) {
          seen.push(...(splitter.push(bytes.subarray(at, at + cut)) ?? []));
          at += cut;
        }
        expect(seen).toEqual(lines);
      },
    ),
  );
});

test('a line may be as long as allowed, not one byte longer', () => {
  expect(new LineSplitter(4).push(Buffer.from('1234\n'))).toEqual(['1234']);
  const splitter = new LineSplitter(4);
  expect(splitter.push(Buffer.from('123'))).toEqual([]);
  expect(splitter.push(Buffer.from('45\n'))).toBeNull();
});

describe('a real QEMU', () => {
  let qemu: ChildProcess;
  let path: string;
  beforeEach(() => {
    path = join(directory, 'qmp.sock');
    const qmp = `unix:${path},server=on,wait=off`;
    qemu = spawn('qemu-system-x86_64', ['-M', 'none', '-nodefaults', '-display', 'none', '-qmp', qmp], {
      stdio: 'ignore',
    });
  });
  afterEach(() => {
    qemu.kill('SIGKILL');
  });

  test('commands, events, refusal, reconnection, end', async () => {
    let client = await QmpClient.connect(path, { timeoutMs: 10_000, isRetrying: true });
    expect(client.version).toMatch(/^\d+\.\d+\.\d+$/);
    client.close();
    client = await QmpClient.connect(path, { timeoutMs: 10_000 });
    const events: QmpEvent[] = [];
    client.on('event', (event) => events.push(event));
    expect(await client.execute('query-status')).toMatchObject({ running: true });
    const stopped = client.waitForEvent('STOP', { timeoutMs: 5000 });
    await client.execute('stop');
    expect((await stopped).timestampUs).toBeGreaterThan(1e15);
    expect(await failure(client.execute('device_del', { id: 'nothing' }))).toBe('QEMU_FAILED');
    expect(await failure(client.executeUntyped('no-such-command'))).toBe('QEMU_FAILED');
    const ended = new Promise((resolve) => client.onClosed(resolve));
    await client.execute('quit').catch(() => undefined);
    await ended;
    expect(events.map((event) => event.name)).toContain('SHUTDOWN');
  });
});
