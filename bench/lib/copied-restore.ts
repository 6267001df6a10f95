/**
 * What a user does today to run copies of a VM on several hosts: QEMU saves the VM with its whole memory to a file,
 * rsync copies the file to each host, and QEMUs there load it. The file is on tmpfs and rsync's own daemon serves it,
 * without ssh's encryption, so neither a disk nor a cipher slows this down. A host's QEMUs start when its copy is
 * there; all load, then all resume.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Cluster, eventually } from '../../test/hosts/cluster.js';
import { inTurns } from '../../test/hosts/turns.js';
import { readWork } from './rate.js';
import { type RestoredGuest, RestoredQemu } from './restored-qemu.js';

const STARTS_AT_ONCE = 8;
const RSYNC_PORT = 873;
const STATE = 'full.state';

export interface CopiedRun {
  /** The guest stands still while it is saved. */
  readonly savedMs: number;
  /** Until the last host has its copy. */
  readonly copiedMs: number;
  readonly firstMs: number;
  readonly lastMs: number;
  readonly stateBytes: number;
}

export class CopiedRestores {
  readonly #running = new Set<RestoredQemu>();
  #parent: RestoredQemu | null = null;
  #server: ChildProcess | null = null;

  constructor(
    private readonly cluster: Cluster,
    private readonly hosts: readonly string[],
    private readonly guest: RestoredGuest,
  ) {}

  get #root(): string {
    return this.hosts[0] ?? '';
  }

  /** Boots the guest, pauses it, and starts the server of the file. */
  async start(): Promise<void> {
    for (const host of this.hosts) mkdirSync(this.#folder(host), { recursive: true });
    await this.#startServer();
    this.#parent = await this.#startQemu(this.#root, 'parent', null);
    const { serialLog } = this.#parent;
    await eventually('the baseline guest works', 120_000, () => (readWork(serialLog).length >= 5 ? true : undefined));
    await this.#parent.qmp.execute('stop');
  }

  /** Restores `perHost` copies on each host. The guest runs only meanwhile. */
  async run(perHost: number): Promise<CopiedRun> {
    const parent = this.#parent;
    if (parent === null) throw new Error('the baseline guest has not been started');
    await parent.continue();
    const state = join(this.#folder(this.#root), STATE);
    const beganAtMs = performance.now();
    const sinceMs = () => performance.now() - beganAtMs;
    await parent.save(state, true);
    const savedMs = sinceMs();
    await parent.continue();
    const copiedAtMs: number[] = [];
    const copies = new Map(this.hosts.map((host) => [host, this.#copy(host).then(() => copiedAtMs.push(sinceMs()))]));
    const wanted = Array.from({ length: perHost }, (_, n) => this.hosts.map((host) => ({ host, n }))).flat();
    const loaded = await inTurns(wanted, STARTS_AT_ONCE, async ({ host, n }) => {
      await copies.get(host);
      const qemu = await this.#startQemu(host, `copy-${host}-${n}`, join(this.#folder(host), STATE));
      await qemu.load();
      return qemu;
    });
    const resumed = await Promise.all(loaded.map(async (qemu) => (await qemu.resume()) - beganAtMs));
    const run = {
      savedMs,
      copiedMs: Math.max(...copiedAtMs),
      firstMs: Math.min(...resumed),
      lastMs: Math.max(...resumed),
      stateBytes: statSync(state).size,
    };
    await parent.qmp.execute('stop');
    await Promise.all(loaded.map((qemu) => this.#end(qemu)));
    for (const host of this.hosts) rmSync(join(this.#folder(host), STATE), { force: true });
    return run;
  }

  async stop(): Promise<void> {
    await Promise.all([...this.#running].map((qemu) => this.#end(qemu)));
    this.#server?.kill('SIGKILL');
    for (const host of this.hosts) rmSync(this.#folder(host), { recursive: true, force: true });
  }

  #folder(host: string): string {
    return join(this.cluster.ramDirectory(host), 'baseline');
  }

  async #startServer(): Promise<void> {
    const config = join(this.cluster.hostDirectory(this.#root), 'rsyncd.conf');
    const path = this.#folder(this.#root);
    writeFileSync(config, `use chroot = no\nuid = root\ngid = root\n[state]\npath = ${path}\nread only = yes\n`);
    const serve = ['rsync', '--daemon', '--no-detach', `--port=${RSYNC_PORT}`, `--config=${config}`];
    const [command = '', ...args] = this.cluster.network.commandOn(this.#root, serve);
    const server = spawn(command, args, { stdio: ['ignore', 'ignore', 'inherit'] });
    this.#server = server;
    await eventually('rsync serves the file', 10_000, async () => {
      if (server.exitCode !== null) throw new Error('rsync ended: run scripts/setup');
      return (await this.#rsync(this.#root, this.#url(''))) === 0 ? true : undefined;
    });
  }

  #url(file: string): string {
    return `rsync://${this.cluster.host(this.#root).address}:${RSYNC_PORT}/state/${file}`;
  }

  async #copy(host: string): Promise<void> {
    if (host === this.#root) return;
    const code = await this.#rsync(host, '--whole-file', '--inplace', this.#url(STATE), this.#folder(host));
    if (code !== 0) throw new Error(`rsync to ${host} ended with ${code}`);
  }

  #rsync(host: string, ...args: string[]): Promise<number> {
    const [command = '', ...rest] = this.cluster.network.commandOn(host, ['rsync', ...args]);
    const child = spawn(command, rest, { stdio: 'ignore' });
    return new Promise((resolve, reject) => {
      child.once('error', reject);
      child.once('exit', (code) => resolve(code ?? 128));
    });
  }

  async #startQemu(host: string, name: string, statePath: string | null): Promise<RestoredQemu> {
    const directory = join(this.cluster.hostDirectory(host), 'restores', name);
    const qemu = await RestoredQemu.start({ directory, name, guest: this.guest, memoryFile: null, statePath });
    this.#running.add(qemu);
    return qemu;
  }

  async #end(qemu: RestoredQemu): Promise<void> {
    this.#running.delete(qemu);
    await qemu.end();
  }
}
