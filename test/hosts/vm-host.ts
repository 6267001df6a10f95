/**
 * The VMs of one host without a daemon: VmManager with real QEMU and its own registry, with everything in temporary
 * directories.
 */
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type VmExit, VmManager } from '../../src/agent/vm/vms.js';
import { QemuBackend } from '../../src/backends/qemu/backend.js';
import { FileRegistry } from '../../src/cluster/file.js';
import type { VmSpec } from '../../src/domain/vm.js';
import type { NativeBinding } from '../../src/native/types.js';
import { parseSpec } from '../../src/schemas/vm-spec.js';
import { QEMU_USERS } from '../support/qemu-user.js';
import { Janitor } from './janitor.js';

const SILENT = { info: () => undefined, warn: () => undefined, error: () => undefined };

export interface VmHostOptions {
  readonly native?: NativeBinding;
  readonly preloadPath?: string;
}

export class VmHost {
  vms: VmManager;
  readonly #janitor: Janitor;

  private constructor(
    readonly name: string,
    readonly directory: string,
    readonly ramDir: string,
    readonly registry: FileRegistry,
    private readonly options: VmHostOptions,
  ) {
    this.vms = this.manager();
    this.#janitor = new Janitor({ paths: [directory, ramDir] });
  }

  static async start(name = 'A', options: VmHostOptions = {}): Promise<VmHost> {
    const directory = await mkdtemp(join(tmpdir(), 'vmg-vms-'));
    const ramDir = await mkdtemp('/dev/shm/vmg-vms-');
    const registry = await FileRegistry.open(join(directory, 'registry'));
    const host = new VmHost(name, directory, ramDir, registry, options);
    await host.vms.start();
    return host;
  }

  /** Returns a manager that is not started. */
  manager(stateDir = join(this.directory, 'state')): VmManager {
    return new VmManager({
      host: this.name,
      stateDir,
      ramDir: this.ramDir,
      accel: 'tcg',
      preloadPath: this.options.preloadPath ?? null,
      native: this.options.native ?? null,
      registry: this.registry,
      backend: new QemuBackend(),
      qemuUsers: QEMU_USERS,
      log: SILENT,
    });
  }

  /** Does to the VMs what a restart of the daemon does. `meanwhile` runs while there is no manager. */
  async restart(meanwhile: () => Promise<void> = () => Promise.resolve()): Promise<void> {
    await this.vms.close();
    await meanwhile();
    this.vms = this.manager();
    await this.vms.start();
  }

  exits(): [string, VmExit][] {
    const seen: [string, VmExit][] = [];
    this.vms.on('exit', (name, info) => seen.push([name, info]));
    return seen;
  }

  /** Returns the command lines of all QEMUs that contain this host's directory. */
  async qemus(): Promise<string[]> {
    const found: string[] = [];
    for (const pid of await readdir('/proc')) {
      if (!/^\d+$/.test(pid)) continue;
      const line = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
      if (line.includes(`${this.directory}/`)) found.push(line);
    }
    return found;
  }

  /** Removes all VMs and returns what they left behind, which should be nothing. */
  async close(): Promise<string[]> {
    for (const vm of this.vms.all()) await this.vms.destroy(vm.spec.name);
    await this.vms.close();
    await this.registry.close();
    const left = [
      ...(await readdir(this.ramDir)),
      ...(await readdir(join(this.directory, 'state/vms'))),
      ...(await this.qemus()),
    ];
    await rm(this.directory, { recursive: true, force: true });
    await rm(this.ramDir, { recursive: true, force: true });
    this.#janitor.dismiss();
    return left;
  }
}

/** Returns the spec of a small VM, without preload and under TCG unless `change` overrides it. */
export function vmSpec(change: Record<string, unknown> = {}): VmSpec {
  return parseSpec({ name: 'vm', memory: { size: '64M' }, preload: false, accel: 'tcg', ...change });
}

/** Returns the code with which a call fails, or `resolved`. */
export function codeOf(promise: Promise<unknown>): Promise<string> {
  return promise.then(
    () => 'resolved',
    (error: { code?: string }) => error.code ?? 'an error without code',
  );
}

/** Reads until the output matches `wanted`, and returns the part that matched. */
export async function expectOutput(stream: NodeJS.ReadableStream, wanted: RegExp, timeoutMs: number): Promise<string> {
  let text = '';
  let timer: NodeJS.Timeout | undefined;
  let listen: (chunk: Buffer) => void = () => undefined;
  try {
    return await new Promise((resolve, reject) => {
      listen = (chunk) => {
        text += chunk.toString();
        const found = wanted.exec(text);
        if (found !== null) resolve(found[0]);
      };
      stream.on('data', listen);
      timer = setTimeout(() => reject(new Error(`no ${String(wanted)}:\n${text.slice(-2000)}`)), timeoutMs);
    });
  } finally {
    clearTimeout(timer);
    stream.off('data', listen);
  }
}
