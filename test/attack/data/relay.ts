/**
 * Somebody in the middle of the data connections that a host makes to another one: he records them, and may flip a bit.
 * The host's kernel leads its connections to him (nftables); he is another user, whose own connections are not led.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Cluster, eventually } from '../../hosts/cluster.js';

const DATA_PORT = 7401;
const RELAY_PORT = 17_401;
const RELAY_USER = 64_736;

const PROGRAM = `
  const net = require('node:net');
  const { appendFileSync, writeFileSync } = require('node:fs');
  const { folder, host, port, listen, user, flipAt, flips } = JSON.parse(process.argv[1]);
  process.setgid(user);
  process.setuid(user);
  let count = 0;
  let flipped = 0;
  net.createServer((target) => {
    const name = folder + '/' + count++;
    const source = net.connect({ host, port });
    let passed = 0;
    target.on('data', (data) => {
      appendFileSync(name + '.requests', data);
      source.write(data);
    });
    source.on('data', (data) => {
      appendFileSync(name + '.replies', data);
      const at = flipAt - passed;
      passed += data.length;
      if (flipped < flips && at >= 0 && at < data.length) {
        data[at] ^= 1;
        writeFileSync(folder + '/flipped', String(++flipped));
      }
      target.write(data);
    });
    for (const [one, other] of [[target, source], [source, target]]) {
      one.on('error', () => other.destroy());
      one.on('close', () => other.destroy());
    }
  }).listen(listen, '0.0.0.0', () => console.log('ready'));`;

/** Sends all of them to the source, the second after its first answer, and prints what came back in hex. */
const REPLAY = `
  const net = require('node:net');
  const { host, port, user, first, rest } = JSON.parse(process.argv[1]);
  process.setgid(user);
  process.setuid(user);
  const socket = net.connect({ host, port }, () => socket.write(Buffer.from(first, 'hex')));
  const answers = [];
  socket.once('data', () => socket.write(Buffer.from(rest, 'hex')));
  socket.on('data', (data) => answers.push(data));
  socket.on('error', () => undefined);
  socket.on('close', () => { console.log(Buffer.concat(answers).toString('hex')); process.exit(0); });
  setTimeout(() => socket.destroy(), 10000);`;

/** One connection, as its bytes went. */
export interface Recorded {
  readonly requests: Buffer;
  readonly replies: Buffer;
}

export class Relay {
  private constructor(
    private readonly cluster: Cluster,
    private readonly namespace: string,
    private readonly sourceAddress: string,
    private readonly folder: string,
    private readonly child: ChildProcess,
  ) {}

  /** Stands between `target` and the data port of `source`, and flips a bit of the first `flips` long connections. */
  static async start(cluster: Cluster, source: string, target: string, flip = { at: 0, flips: 0 }): Promise<Relay> {
    const { namespace } = cluster.host(target);
    const { address } = cluster.host(source);
    await cluster.inNamespace(namespace, 'nft', 'delete', 'table', 'ip', 'relay');
    const led = `ip daddr ${address} tcp dport ${DATA_PORT} meta skuid != ${RELAY_USER} redirect to :${RELAY_PORT}`;
    for (const rule of [
      'add table ip relay',
      'add chain ip relay out { type nat hook output priority -100; }',
      `add rule ip relay out ${led}`,
    ])
      await cluster.must(cluster.inNamespace(namespace, 'nft', rule));
    const folder = await mkdtemp(join(tmpdir(), 'vmg-relay-'));
    await cluster.must(cluster.inNamespace(namespace, 'chown', String(RELAY_USER), folder));
    const options = {
      ...{ folder, host: address, port: DATA_PORT, listen: RELAY_PORT, user: RELAY_USER },
      ...{ flipAt: flip.at, flips: flip.flips },
    };
    const given = ['netns', 'exec', namespace, process.execPath, '-e', PROGRAM, JSON.stringify(options)];
    const child = spawn('ip', given, { stdio: ['ignore', 'pipe', 'inherit'] });
    await new Promise((resolve) => child.stdout.once('data', resolve));
    return new Relay(cluster, namespace, address, folder, child);
  }

  async recorded(): Promise<Recorded[]> {
    const files = await readdir(this.folder);
    const names = files.filter((file) => file.endsWith('.replies')).map((file) => file.replace('.replies', ''));
    return Promise.all(
      names.map(async (name) => ({
        requests: await readFile(join(this.folder, `${name}.requests`)),
        replies: await readFile(join(this.folder, `${name}.replies`)),
      })),
    );
  }

  async flipCount(): Promise<number> {
    return Number(await readFile(join(this.folder, 'flipped'), 'utf8').catch(() => '0'));
  }

  /** Says to the source what was recorded, in a connection of its own, and returns all that it answers. */
  async replay(first: Buffer, rest: Buffer): Promise<Buffer> {
    const given = {
      ...{ host: this.sourceAddress, port: DATA_PORT, user: RELAY_USER },
      ...{ first: first.toString('hex'), rest: rest.toString('hex') },
    };
    const { stdout } = await this.cluster.must(
      this.cluster.inNamespace(this.namespace, process.execPath, '-e', REPLAY, JSON.stringify(given)),
    );
    return Buffer.from(stdout.trim(), 'hex');
  }

  async stop(): Promise<void> {
    this.child.kill('SIGKILL');
    await eventually('the relay ends', 10_000, () => (this.child.signalCode === null ? undefined : true));
    await this.cluster.inNamespace(this.namespace, 'nft', 'delete', 'table', 'ip', 'relay');
    await rm(this.folder, { recursive: true, force: true });
  }
}
