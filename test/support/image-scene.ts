/** Images with disks: real files, the real qemu-img, and hosts whose VMs a test names. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { closeSync, mkdtempSync, openSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { mkdir, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { DiskServer } from '../../src/agent/fork/bases/disk-server.js';
import type { ForkContext } from '../../src/agent/fork/context.js';
import { Images } from '../../src/agent/fork/image-calls.js';
import { ImageServers } from '../../src/agent/fork/pages/image-servers.js';
import { sealLayers } from '../../src/agent/fork/settle.js';
import type { OtherHosts } from '../../src/agent/image/layer-holders.js';
import { ImageStore } from '../../src/agent/image/store.js';
import { MemoryRoom } from '../../src/agent/vm/memory-room.js';
import { RamPlace } from '../../src/agent/vm/ram-place.js';
import { QemuBackend } from '../../src/backends/qemu/backend.js';
import { EVERYTHING_ALLOWED } from '../../src/domain/policy.js';
import type { VmSpec } from '../../src/domain/vm.js';
import { parseSpec } from '../../src/schemas/vm-spec.js';

export const ID = 'a'.repeat(16);
const SILENT = { info: () => undefined, warn: () => undefined, error: () => undefined, debug: () => undefined };

export interface ImageHost {
  readonly context: ForkContext;
  readonly images: Images;
  readonly vms: { spec: object; state: string; image: string | null; process: object }[];
}

/** What a host allows, and how it signs. */
export type OwnOfHost = Pick<ForkContext, 'policy' | 'signer'>;

/** A directory with a qcow2 on a raw backing file, a read-only disk, and the hosts that use them. */
export class ImageScene {
  readonly directory = mkdtempSync(join(tmpdir(), 'vmg-layers-'));
  readonly golden = join(this.directory, 'golden.raw');
  readonly disk = join(this.directory, 'disk.qcow2');
  readonly iso = join(this.directory, 'cd.iso');
  /** The kernel of the spec, a CD and the code of a firmware that only its own arguments name. */
  readonly kernel = join(this.directory, 'vmlinuz');
  readonly cd = join(this.directory, 'drivers.iso');
  readonly firmware = join(this.directory, 'CODE.fd');
  /** The file that the parent continues in. */
  readonly overlay = `${this.disk}.${ID}`;
  readonly #children: ChildProcess[] = [];
  readonly #places: RamPlace[] = [];

  constructor() {
    writeFileSync(this.golden, Buffer.alloc(1 << 20, 'golden'));
    writeFileSync(this.iso, 'iso');
    for (const path of [this.kernel, this.cd, this.firmware]) writeFileSync(path, 'first');
    img('create', '-q', '-f', 'qcow2', '-b', this.golden, '-F', 'raw', this.disk);
    write(this.disk, 'first');
  }

  /** Starts a program that has the disk open for writing. */
  async writer(path: string): Promise<void> {
    const writer = spawn('qemu-io', ['-f', 'qcow2', path], { stdio: ['pipe', 'pipe', 'inherit'] });
    this.#children.push(writer);
    await new Promise((ready) => writer.stdout.once('data', ready));
  }

  async end(): Promise<void> {
    for (const place of this.#places) await place.close();
    for (const child of this.#children) child.kill('SIGKILL');
    rmSync(this.directory, { recursive: true, force: true });
  }

  /** `own`: by default the host allows everything, and has no certificate. */
  async contextOn(name: string, others?: OtherHosts, own: Partial<OwnOfHost> = {}): Promise<ImageHost> {
    const stateDir = join(this.directory, name);
    const place = new RamPlace({ host: name, ramDir: join(stateDir, 'ram') });
    this.#places.push(place);
    await mkdir(place.ramDir, { recursive: true });
    const backend = new QemuBackend();
    const { diskFiles, diskExports } = backend;
    const vms: ImageHost['vms'] = [];
    const named = (vm: string) => vms.find(({ spec }) => (spec as { name: string }).name === vm);
    const manager = {
      ...{ place, all: () => vms, has: (vm: string) => named(vm) !== undefined, get: named },
      ...{ room: new MemoryRoom(place), unreadable: () => [] },
      backend: {
        installed: async () => ({ machines: ['pc-q35-7.2'], version: '7.2.22' }),
        ...{ diskFiles, diskExports },
        filesIn: (spec: VmSpec) => backend.filesIn(spec),
      },
    };
    const native = {
      createRegionFile: ({ path, lengthBytes }: { path: string; lengthBytes: bigint }) => {
        closeSync(openSync(path, 'wx'));
        truncateSync(path, Number(lengthBytes));
      },
    };
    const images = await ImageStore.open({
      ...{ host: name, stateDir, budgetBytes: null, log: SILENT },
      ...{ vms: manager as never, native: native as never },
    });
    const registry = { owner: async () => null };
    const closing = new AbortController().signal;
    const access = { policy: EVERYTHING_ALLOWED, signer: null, ...own };
    const shared = { host: name, images, vms: manager, registry, closing, log: SILENT, ...access };
    const servers = new ImageServers(shared as never);
    const diskServer = new DiskServer(shared as never, stateDir);
    const context = { ...shared, servers, diskServer } as unknown as ForkContext;
    return { context, images: new Images(context, () => false, others), vms };
  }

  /** Makes an image of a VM that continues in an this.overlay, as a fork leaves it. */
  async forked({ context }: ImageHost): Promise<void> {
    const { images } = context;
    const disks = [{ id: 'd0', path: this.disk, format: 'qcow2' as const }];
    const spec = {
      ...parseSpec({
        name: 'web',
        memory: { size: '16M' },
        kernel: this.kernel,
        qemuArgs: ['-cdrom', this.cd, '-drive', `if=pflash,format=raw,readonly=on,file=${this.firmware}`],
        disks: [
          { id: 'd0', path: this.disk },
          { id: 'cd', path: this.iso, format: 'raw', readOnly: true },
        ],
      }),
      machine: 'pc-q35-7.2',
    };
    await images.create(
      {
        ...{ version: 1, id: ID, state: 'complete', parentMode: 'continue', accel: 'tcg', qemuVersion: '7.2.22' },
        ...{ spec, deviceStateBytes: 5, createdAt: '2026-01-01T00:00:00.000Z' },
        disks: spec.disks.map(({ id, path, format }) => ({ id, path, format })),
        overlays: [{ id: 'd0', path: this.overlay, format: 'qcow2', vm: 'web', base: disks[0]! }],
      },
      null,
    );
    await writeFile(images.statePath(ID), 'state');
    img('create', '-q', '-f', 'qcow2', '-u', '-b', this.disk, '-F', 'qcow2', this.overlay, '1M');
    write(this.overlay, 'later');
    await sealLayers(context, ID);
  }

  async savedOn(
    name: string,
    options: { withDisks?: boolean } = {},
    own: Partial<OwnOfHost> = {},
  ): Promise<ImageHost & { file: string }> {
    const host = await this.contextOn(name, undefined, own);
    await this.forked(host);
    const file = join(this.directory, 'saved.img');
    await host.images.save(ID, file, options);
    return { ...host, file };
  }
}

export function img(...args: string[]): void {
  execFileSync('qemu-img', args);
}

/** Writes to the disk as a guest would. */
export function write(path: string, text: string): void {
  const pattern = String(text.charCodeAt(0));
  execFileSync('qemu-io', ['-f', 'qcow2', '-c', `write -P ${pattern} 64k 64k`, path], { stdio: 'ignore' });
}
