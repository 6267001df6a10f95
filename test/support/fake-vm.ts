/**
 * A process with the preload library that replaces QEMU (native/tests/preload/preload_helper_main.cpp). It maps region
 * files and reads their bytes on command, so a test can fault pages in and check every byte without a guest.
 */
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import type {
  DataListenerHandle,
  NativeBinding,
  RegionFile,
  SourceAddress,
  SourceOptions,
  SourceSessionHandle,
} from '../../src/native/types.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const addonDirectory =
  process.env['VMIGRATE_ADDON'] === undefined
    ? join(root, 'build/native/Release')
    : dirname(process.env['VMIGRATE_ADDON']);
const preload = join(addonDirectory, 'libvmigrate-preload.so');
const helper = join(process.env['VMIGRATE_TEST_PROGRAMS'] ?? join(root, 'build/native'), 'preload_helper');

export class FakeVm {
  readonly #process: ChildProcessWithoutNullStreams;
  readonly #waiting: ((line: string) => void)[] = [];

  private constructor(environment: Record<string, string>) {
    this.#process = spawn(helper, { env: { ...process.env, ...environment }, stdio: 'pipe' });
    this.#process.stderr.pipe(process.stderr);
    this.#process.stdin.on('error', () => undefined);
    createInterface({ input: this.#process.stdout })
      .on('line', (line) => this.#waiting.shift()?.(line))
      .on('close', () => {
        for (const resolve of this.#waiting.splice(0)) resolve('(end)');
      });
  }

  /** Starts the process without the preload library; it only prepares files. */
  static plain(): FakeVm {
    return new FakeVm({});
  }

  static withPreload(socketPath: string, regions: readonly RegionFile[], syncFds = 1): FakeVm {
    return new FakeVm({
      LD_PRELOAD: preload,
      VMIGRATE_PRELOAD_SOCKET: socketPath,
      VMIGRATE_PRELOAD_FILES: regions.map(({ path }) => path).join('\n'),
      VMIGRATE_PRELOAD_SYNC_FDS: String(syncFds),
    });
  }

  get pid(): number {
    return this.#process.pid ?? -1;
  }

  /** Sends a command and returns its answer; `(end)` if the process has ended. */
  async ask(line: string): Promise<string> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return '(end)';
    return new Promise((resolve) => {
      this.#waiting.push(resolve);
      this.#process.stdin.write(`${line}\n`);
    });
  }

  async mapAll(regions: readonly RegionFile[]): Promise<string[]> {
    const answers: string[] = [];
    for (const { path, lengthBytes, isPrivate } of regions) {
      answers.push(await this.ask(`map ${path} ${lengthBytes} 0 ${isPrivate === true ? 'private' : 'shared'}`));
    }
    return answers;
  }

  /** Returns for each region how many pages do not hold the pattern of their seed (the region's number plus one). */
  async badPages(regions: readonly RegionFile[]): Promise<number[]> {
    const bad: number[] = [];
    for (const [index, { lengthBytes }] of regions.entries()) {
      const answer = await this.ask(`verify ${index} 0 ${lengthBytes} ${index + 1}`);
      const match = /^verified (\d+) (\d+)$/.exec(answer);
      bad.push(match !== null && BigInt(match[1]!) * 4096n === lengthBytes ? Number(match[2]) : Number.NaN);
    }
    return bad;
  }

  async kill(): Promise<void> {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    await new Promise((resolve) => {
      this.#process.once('exit', resolve);
      this.#process.kill('SIGKILL');
    });
  }
}

/** A directory on tmpfs and everything made in it, which is undone in reverse order. */
export class Scene {
  readonly directory = mkdtempSync('/dev/shm/vmg-addon-test-');
  readonly #undo: (() => unknown)[] = [];

  later(undo: () => unknown): void {
    this.#undo.push(undo);
  }

  path(name: string): string {
    return join(this.directory, name);
  }

  regions(side: string, lengthsMiB: readonly number[]): RegionFile[] {
    return lengthsMiB.map((lengthMiB, index) => ({
      path: this.path(`${side}${index}`),
      lengthBytes: BigInt(lengthMiB) << 20n,
      pageBytes: 4096,
    }));
  }

  /** Creates region files with the pattern that FakeVm.badPages checks; every fourth page is a hole. */
  async filledRegions(side: string, lengthsMiB: readonly number[]): Promise<RegionFile[]> {
    const regions = this.regions(side, lengthsMiB);
    const writer = FakeVm.plain();
    for (const [index, { path, lengthBytes }] of regions.entries()) {
      const answer = await writer.ask(`fill ${path} ${lengthBytes} ${index + 1}`);
      if (answer !== 'filled') throw new Error(`fill: ${answer}`);
    }
    await writer.kill();
    return regions;
  }

  /** Creates a fake VM whose empty regions are mapped and registered. */
  async incomingVm(binding: NativeBinding, lengthsMiB: readonly number[], syncFds = 1) {
    const regions = this.regions('target', lengthsMiB);
    for (const region of regions) binding.createRegionFile(region);
    const socketPath = this.path('preload.sock');
    const edges = { count: 0 };
    const memory = binding.listenForVm({ socketPath, regions, isIncoming: true, onEdge: () => edges.count++ });
    const vm = FakeVm.withPreload(socketPath, regions, syncFds);
    this.later(async () => vm.kill());
    const answers = await vm.mapAll(regions);
    if (answers.some((answer, index) => answer !== `mapped ${index}`)) throw new Error(answers.join(', '));
    return { regions, memory, vm, edges };
  }

  /** Adds the paths of the presence files to the regions. */
  withPresence(regions: readonly RegionFile[]) {
    return regions.map((region) => ({ ...region, presencePath: `${region.path}.presence` }));
  }

  async dispose(): Promise<void> {
    for (const undo of this.#undo.splice(0).reverse()) await undo();
    rmSync(this.directory, { recursive: true, force: true });
  }
}

/** Opens a source session on its own listener, and returns the address for a target. */
export async function openSource(
  binding: NativeBinding,
  scene: Scene,
  provider: 'tcp' | 'shm',
  regions: readonly RegionFile[],
  served: Pick<SourceOptions, 'image'> = {},
): Promise<{ listener: DataListenerHandle; session: SourceSessionHandle; address: SourceAddress }> {
  const host = provider === 'tcp' ? '127.0.0.1' : scene.path(`data-${randomBytes(4).toString('hex')}.sock`);
  const listener = binding.openDataListener({ listen: [{ provider, host, port: 0 }] });
  const credentials = { session: randomBytes(16).toString('hex'), token: randomBytes(32).toString('hex') };
  const session = await binding.openSourceSession({ listener, provider, regions, ...credentials, ...served });
  const place = listener.address(provider);
  if (place === null) throw new Error(`nothing listens for ${provider}`);
  const address = { provider, ...place, keys: session.keys, ...credentials };
  return { listener, session, address };
}

/** Waits until the condition is true, at most 20 s. */
export async function until(what: string, condition: () => boolean): Promise<void> {
  const deadline = Date.now() + 20_000;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`not within 20 s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

/** Expects that no answer comes, because the process waits in a page fault. */
export async function expectToWait(answer: Promise<unknown>): Promise<void> {
  const first = await Promise.race([answer, new Promise((resolve) => setTimeout(resolve, 150, 'waits'))]);
  if (first !== 'waits') throw new Error(`expected a process that waits, got ${String(first)}`);
}
