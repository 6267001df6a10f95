/** A VM that a real QEMU runs, with a disk that can be forked, and the daemons that manage it one after the other. */
import { execFileSync } from 'node:child_process';
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { DiskServer } from '../../src/agent/fork/bases/disk-server.js';
import type { ForkContext } from '../../src/agent/fork/context.js';
import { Images } from '../../src/agent/fork/image-calls.js';
import { ImageServers } from '../../src/agent/fork/pages/image-servers.js';
import { ParentDisks } from '../../src/agent/fork/parent-disks.js';
import { type ForkStore, openForkStore } from '../../src/agent/fork/record.js';
import { ImageStore } from '../../src/agent/image/store.js';
import type { RecordAmendment, VmRecord } from '../../src/agent/vm/record.js';
import { type ManagedVm, VmManager } from '../../src/agent/vm/vms.js';
import { QemuBackend } from '../../src/backends/qemu/backend.js';
import type { QemuProcess } from '../../src/backends/qemu/process.js';
import type { QmpClient } from '../../src/backends/qemu/qmp/client.js';
import { FileRegistry } from '../../src/cluster/file.js';
import { MigrationError } from '../../src/domain/errors.js';
import type { VmSpec } from '../../src/domain/vm.js';
import { parseSpec } from '../../src/schemas/vm-spec.js';
import { MemoryStore } from '../unit/durable/memory-store.js';

export const NAME = 'web';
const DISK_BYTES = 64 << 20;

export class RunningVm {
  readonly directory = mkdtempSync(join(tmpdir(), 'vmg-running-'));
  readonly disk = join(this.directory, 'disk');
  readonly warnings: string[] = [];
  #daemon: { vms: VmManager; context: ForkContext; images: Images; closing: AbortController } | null = null;
  #registry: FileRegistry | null = null;

  constructor() {
    execFileSync('qemu-img', ['create', '-q', '-f', 'raw', this.disk, String(DISK_BYTES)]);
  }

  /** Starts a daemon, and with the first one the VM. */
  async start(): Promise<void> {
    this.#registry ??= await FileRegistry.on(new MemoryStore());
    const warn = (fields: object, message: string) => void this.warnings.push(message + JSON.stringify(fields));
    const log = { info: () => undefined, warn, error: warn, debug: () => undefined };
    const shared = { host: 'A', stateDir: this.directory, registry: this.#registry, log };
    const vms = new VmManager({
      ...{ ...shared, ramDir: join(this.directory, 'ram'), accel: 'tcg', preloadPath: null, native: null },
      backend: new QemuBackend(),
    });
    await vms.start();
    const native = {
      createRegionFile: ({ path, lengthBytes }: { path: string; lengthBytes: bigint }) => {
        closeSync(openSync(path, 'wx'));
        truncateSync(path, Number(lengthBytes));
      },
    } as never;
    const images = await ImageStore.open({ ...shared, budgetBytes: null, vms, native });
    const closing = new AbortController();
    const forkStore: ForkStore = await openForkStore(this.directory);
    const diskServer = new DiskServer({ ...shared, vms, images }, this.directory);
    const parts = { ...shared, vms, images, forkStore, diskServer, closing: closing.signal, native };
    const context = { ...parts, servers: new ImageServers(parts as never) } as never as ForkContext;
    this.#daemon = { vms, context, images: new Images(context, () => false), closing };
  }

  async boot(change: object = {}): Promise<void> {
    const spec = { name: NAME, memory: { size: '16M', backing: 'private' }, preload: false, serial: false };
    await this.vms.run(parseSpec({ ...spec, disks: [{ id: 'd0', path: this.disk, format: 'raw' }], ...change }));
  }

  /** The daemon ends without a word to anybody, and the next one starts. */
  async restart(): Promise<void> {
    this.#now.closing.abort();
    await this.vms.close();
    await this.start();
  }

  async end(): Promise<void> {
    this.#daemon?.closing.abort();
    for (const vm of this.#daemon?.vms.all() ?? []) await this.vms.destroy(vm.spec.name);
    await this.#daemon?.vms.close();
    rmSync(this.directory, { recursive: true });
  }

  get vms(): VmManager {
    return this.#now.vms;
  }

  get context(): ForkContext {
    return this.#now.context;
  }

  get images(): Images {
    return this.#now.images;
  }

  get vm(): ManagedVm {
    return this.vms.get(NAME);
  }

  /** Forks the disks of the VM up to the fork point. Returns the overlay. */
  async fork(image: string, options: { isRecorded: boolean } = { isRecorded: true }): Promise<string> {
    const { images } = this.context;
    await this.makeImage(image);
    const disks = new ParentDisks(this.context, this.vm, image);
    await disks.prepare('continue');
    await this.vm.process.pause();
    await disks.snapshot();
    if (options.isRecorded) await disks.settle();
    await this.vm.process.run();
    return images.get(image).overlays.at(-1)!.path;
  }

  async makeImage(id: string): Promise<void> {
    const spec: VmSpec = this.vm.spec;
    const record = {
      ...{
        version: 1 as const,
        id,
        state: 'complete' as const,
        parentMode: 'continue' as const,
        accel: 'tcg' as const,
      },
      ...{ spec, qemuVersion: '7.2.22', deviceStateBytes: 0, createdAt: new Date().toISOString(), overlays: [] },
      disks: spec.disks.map(({ id: disk, path, format }) => ({ id: disk, path, format })),
    };
    await this.context.images.create(record, null);
  }

  /** The guest writes this letter to its disk, from the second MiB on. */
  async write(letter: string, mebibytes = 2): Promise<void> {
    // What is not flushed may be lost with QEMU.
    for (const line of [`write -P ${letter.charCodeAt(0)} 1M ${mebibytes}M`, 'flush']) {
      const command = `qemu-io -d /machine/peripheral/d0/virtio-backend "${line}"`;
      await this.qmp.executeUntyped('human-monitor-command', { 'command-line': command });
    }
  }

  get qmp(): QmpClient {
    return (this.vm.process as QemuProcess).qmp;
  }

  /** Changes what this daemon sends to QEMU. `send` sends it. */
  intercept(
    change: (command: string, args: object, send: (args: object) => Promise<unknown>) => Promise<unknown>,
  ): void {
    const { qmp } = this;
    const execute = qmp.executeUntyped.bind(qmp);
    const executeUntyped: QmpClient['executeUntyped'] = (command, args = {}, options) =>
      change(command, args, (changed) => execute(command, changed, options));
    Object.assign(qmp, { executeUntyped });
  }

  /** From now on the VM's record cannot be written if `isRefused` says so. Returns a function that mends that. */
  refuseRecords(isRefused: (amendment: RecordAmendment) => boolean): () => void {
    const { vms } = this;
    Object.assign(vms, {
      amend: (name: string, change: (record: VmRecord) => RecordAmendment | null) =>
        VmManager.prototype.amend.call(vms, name, (record) => {
          const amendment = change(record);
          if (amendment !== null && isRefused(amendment))
            throw new MigrationError('NO_SPACE', 'the state disk is full');
          return amendment;
        }),
    });
    return () => Reflect.deleteProperty(vms, 'amend');
  }

  /** The daemon dies when a disk has switched to its base: before the record says so, or before the file is removed. */
  dieAtSwitch(isRecorded: boolean): void {
    const { vms, vm } = this;
    const { closing } = this.#now;
    const dead = () => Promise.reject(new Error('the daemon has died'));
    Object.assign(vms, {
      amend: async (name: string, change: (record: VmRecord) => RecordAmendment | null) => {
        let isSwitch = false;
        await VmManager.prototype.amend.call(vms, name, (record) => {
          const amendment = change(record);
          isSwitch = amendment?.spec?.disks[0]?.path === this.disk;
          return isSwitch && !isRecorded ? null : amendment;
        });
        if (!isSwitch) return undefined;
        closing.abort();
        Object.assign(vms, { amend: dead });
        Object.assign(vm.process, { run: dead, cancelAndRun: dead });
        return dead();
      },
    });
  }

  /** Returns the letter that a VM on this file would read, or '' if nobody has written there. */
  read(path = this.disk): string {
    const raw = join(this.directory, 'read.raw');
    const format = path === this.disk ? 'raw' : 'qcow2';
    execFileSync('qemu-img', ['convert', '-U', '-f', format, '-O', 'raw', path, raw]);
    const letter = readFileSync(raw).toString('latin1', 2 << 20, (2 << 20) + 1);
    return letter === '\0' ? '' : letter;
  }

  /** The file that the guest's disk uses. */
  async active(): Promise<string | undefined> {
    return (await this.vm.process.disks.active()).get('d0')?.path;
  }

  get recorded(): string {
    return this.vm.spec.disks[0]!.path;
  }

  has(path: string): boolean {
    return existsSync(path);
  }

  get #now() {
    if (this.#daemon === null) throw new Error('no daemon runs');
    return this.#daemon;
  }
}
