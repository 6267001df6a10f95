/** One QEMU of a baseline, controlled over QMP as by a script: it boots the guest, or loads a state that was saved. */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { QmpClient } from '../../src/backends/qemu/qmp/client.js';
import { eventually } from '../../test/hosts/cluster.js';
import { guestImage } from '../../test/hosts/guest.js';

const LOAD_MS = 300_000;

export interface RestoredGuest {
  readonly memoryMiB: number;
  readonly touchMiB: number;
  readonly writePercent: number;
}

export interface RestoreOptions {
  /** The folder of its files, which is made anew. */
  readonly directory: string;
  readonly name: string;
  readonly guest: RestoredGuest;
  /** File of the memory, shared or copy-on-write. Null means anonymous memory, all of which is in the state. */
  readonly memoryFile: { readonly path: string; readonly isShared: boolean } | null;
  /** State to load; null boots the guest. */
  readonly statePath: string | null;
}

export class RestoredQemu {
  private constructor(
    private readonly child: ChildProcess,
    readonly qmp: QmpClient,
    readonly serialLog: string,
    private readonly hasMemoryFile: boolean,
  ) {}

  get pid(): number {
    return this.child.pid as number;
  }

  /** Only a guest that boots gets the kernel's files; the others get its boot ROM, and the state as descriptor 3. */
  static async start({ directory, name, guest, memoryFile, statePath }: RestoreOptions): Promise<RestoredQemu> {
    rmSync(directory, { recursive: true, force: true });
    mkdirSync(directory, { recursive: true });
    const [socket, serialLog] = [join(directory, 'qmp.sock'), join(directory, 'serial.log')];
    const { memoryMiB, touchMiB, writePercent } = guest;
    const { kernel, initrd } = guestImage();
    const memory =
      memoryFile === null
        ? `memory-backend-ram,id=m0,size=${memoryMiB}M`
        : `memory-backend-file,id=m0,size=${memoryMiB}M,mem-path=${memoryFile.path},` +
          `share=${memoryFile.isShared ? 'on' : 'off'}`;
    const append = `console=ttyS0 quiet vmg.workload=memtouch vmg.mb=${touchMiB} vmg.writepct=${writePercent}`;
    const boot =
      statePath === null
        ? ['-kernel', kernel, '-initrd', initrd, '-append', append]
        : ['-option-rom', 'linuxboot_dma.bin,bootindex=0', '-incoming', 'defer', '-S'];
    const state = statePath === null ? null : openSync(statePath, 'r');
    const child = spawn(
      'qemu-system-x86_64',
      [
        ...['-name', `${name},debug-threads=on`, '-machine', 'q35,memory-backend=m0', '-accel', 'tcg,thread=multi'],
        ...['-cpu', 'qemu64', '-m', `${memoryMiB}`, '-object', memory, '-nodefaults', '-no-user-config'],
        ...['-vga', 'none', '-display', 'none', '-serial', `file:${serialLog}`],
        ...['-qmp', `unix:${socket},server=on,wait=off`, ...boot],
      ],
      { stdio: ['ignore', 'ignore', 'inherit', ...(state === null ? [] : [state])] },
    );
    if (state !== null) closeSync(state);
    await eventually('QEMU listens', 60_000, () => (existsSync(socket) ? true : undefined));
    const qmp = await QmpClient.connect(socket, { timeoutMs: 60_000, isRetrying: true });
    const qemu = new RestoredQemu(child, qmp, serialLog, memoryFile !== null);
    if (statePath !== null) await qemu.#setCapabilities(qemu.hasMemoryFile);
    return qemu;
  }

  /** Stops the guest and saves its state, with the whole memory or without any. */
  async save(path: string, isMemoryIncluded: boolean): Promise<void> {
    await this.qmp.execute('stop');
    await this.#setCapabilities(!isMemoryIncluded);
    await this.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 2 ** 40 });
    await this.qmp.execute('migrate', { uri: `exec:cat > ${path}` });
    await this.#reached('completed');
  }

  /** Lets the guest run on after it was saved. */
  async continue(): Promise<void> {
    // After reporting `completed` QEMU is still finishing, and refuses the command until it is done.
    await eventually('the baseline guest runs on', 10_000, () =>
      this.qmp.execute('cont').then(
        () => true,
        () => undefined,
      ),
    );
  }

  async load(): Promise<void> {
    await this.qmp.execute('migrate-incoming', { uri: 'fd:3' });
    await this.#reached('completed');
  }

  /** Lets a guest that was loaded run, and returns the time of its first instruction by this process's clock. */
  async resume(): Promise<number> {
    const event = this.qmp.waitForEvent('RESUME', { timeoutMs: 60_000 });
    await this.qmp.execute('cont');
    await event;
    return performance.now();
  }

  async end(): Promise<void> {
    this.qmp.close();
    const ended = new Promise((resolve) => this.child.once('exit', resolve));
    this.child.kill('SIGKILL');
    await ended;
  }

  async #setCapabilities(isSharedIgnored: boolean): Promise<void> {
    const states = [
      { capability: 'events', state: true },
      { capability: 'x-ignore-shared', state: isSharedIgnored },
    ] as const;
    await this.qmp.execute('migrate-set-capabilities', { capabilities: states });
  }

  async #reached(wanted: string): Promise<void> {
    const filter = (event: { data: Readonly<Record<string, unknown>> }) => event.data['status'] === wanted;
    const seen = this.qmp.waitForEvent('MIGRATION', { timeoutMs: LOAD_MS, filter });
    // The event may have come before this call, so the status is queried as well.
    const asked = this.qmp.execute('query-migrate').then((answer) => (answer.status === wanted ? undefined : seen));
    await Promise.race([seen, asked]);
  }
}
