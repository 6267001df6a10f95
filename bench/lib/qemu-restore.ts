/**
 * The baselines of `vfork`: N QEMUs load a state that was saved before, controlled over QMP as by a script. `full`: the
 * state file holds the whole memory. `template`: all QEMUs map a memory file copy-on-write, and the state file holds
 * the device state only (x-ignore-shared). All load first, then all resume, as in vmigrate. `waiting` is `template`
 * with QEMUs started beforehand, which shows the least that loading and resuming cost.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, openSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { QmpClient } from '../../src/backends/qemu/qmp/client.js';
import { type Cluster, eventually } from '../../test/hosts/cluster.js';
import { guestImage } from '../../test/hosts/guest.js';
import { inTurns } from '../../test/hosts/turns.js';
import { cpuSeconds } from './process-cost.js';
import { readWork } from './rate.js';

export type RestoreMode = 'full' | 'template' | 'waiting';

const STARTS_AT_ONCE = 8;
const LOAD_MS = 300_000;

interface Restored {
  readonly child: ChildProcess;
  readonly qmp: QmpClient;
  readonly pid: number;
  readonly serialLog: string;
}

export interface RestoreRun {
  readonly firstMs: number;
  readonly lastMs: number;
  readonly startedAtMs: number;
  /** CPU seconds that waiting processes had used before. */
  readonly cpuBeforeS: number;
  readonly pids: readonly number[];
  readonly serialLogs: readonly string[];
}

export class QemuRestores {
  readonly #directory: string;
  readonly #ram: string;
  readonly #running = new Set<Restored>();
  #serial = 0;

  constructor(
    cluster: Cluster,
    private readonly guest: { memoryMiB: number; touchMiB: number; writePercent: number },
  ) {
    this.#directory = join(cluster.hostDirectory('A'), 'restores');
    this.#ram = join(cluster.ramDirectory('A'), 'template.ram');
    mkdirSync(this.#directory, { recursive: true });
  }

  /** Boots the guest, saves it in both ways, and ends it. */
  async save(): Promise<void> {
    const parent = await this.#start('parent', 'on', null);
    await eventually('the baseline guest works', 120_000, () =>
      readWork(parent.serialLog).length >= 5 ? true : undefined,
    );
    for (const mode of ['full', 'template'] as const) {
      await parent.qmp.execute('stop');
      await capabilities(parent.qmp, mode);
      await parent.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 2 ** 40 });
      await parent.qmp.execute('migrate', { uri: `exec:cat > ${this.#statePath(mode)}` });
      await status(parent.qmp, 'completed');
      // After reporting `completed` QEMU is still finishing, and refuses the command until it is done.
      const isRunning = () =>
        parent.qmp.execute('cont').then(
          () => true,
          () => undefined,
        );
      if (mode === 'full') await eventually('the baseline guest runs on', 10_000, isRunning);
    }
    await this.#end(parent);
  }

  async run(mode: RestoreMode, count: number): Promise<RestoreRun> {
    const names = Array.from({ length: count }, () => `restore-${this.#serial++}`);
    const waiting = mode === 'waiting' ? await inTurns(names, STARTS_AT_ONCE, (name) => this.#wait(name, mode)) : null;
    const cpuBeforeS = waiting === null ? 0 : cpuSeconds(waiting.map(({ pid }) => pid));
    const startedAtMs = performance.now();
    const started =
      waiting === null
        ? await inTurns(names, STARTS_AT_ONCE, async (name) => this.#load(await this.#wait(name, mode)))
        : await inTurns(waiting, STARTS_AT_ONCE, (one) => this.#load(one));
    const resumed: number[] = [];
    await Promise.all(
      started.map(async ({ qmp }) => {
        const event = qmp.waitForEvent('RESUME', { timeoutMs: 60_000 });
        await qmp.execute('cont');
        await event;
        resumed.push(performance.now() - startedAtMs);
      }),
    );
    return {
      startedAtMs,
      cpuBeforeS,
      firstMs: Math.min(...resumed),
      lastMs: Math.max(...resumed),
      pids: started.map(({ pid }) => pid),
      serialLogs: started.map(({ serialLog }) => serialLog),
    };
  }

  async endAll(): Promise<void> {
    await Promise.all([...this.#running].map((process) => this.#end(process)));
  }

  #statePath(mode: RestoreMode): string {
    return join(this.#directory, `${mode === 'full' ? 'full' : 'template'}.state`);
  }

  async #wait(name: string, mode: RestoreMode): Promise<Restored> {
    const restored = await this.#start(name, mode === 'full' ? null : 'off', this.#statePath(mode));
    await capabilities(restored.qmp, mode);
    return restored;
  }

  async #load(restored: Restored): Promise<Restored> {
    await restored.qmp.execute('migrate-incoming', { uri: 'fd:3' });
    await status(restored.qmp, 'completed');
    return restored;
  }

  /**
   * Starts a QEMU. `share` null means anonymous memory. Only the parent gets the kernel's files; the others get its
   * boot ROM, and the state as descriptor 3.
   */
  async #start(name: string, share: 'on' | 'off' | null, statePath: string | null): Promise<Restored> {
    const isIncoming = statePath !== null;
    const directory = join(this.#directory, name);
    rmSync(directory, { recursive: true, force: true });
    mkdirSync(directory);
    const [socket, serialLog] = [join(directory, 'qmp.sock'), join(directory, 'serial.log')];
    const { memoryMiB, touchMiB, writePercent } = this.guest;
    const { kernel, initrd } = guestImage();
    const memory =
      share === null
        ? `memory-backend-ram,id=m0,size=${memoryMiB}M`
        : `memory-backend-file,id=m0,size=${memoryMiB}M,share=${share},mem-path=${this.#ram}`;
    const append = `console=ttyS0 quiet vmg.workload=memtouch vmg.mb=${touchMiB} vmg.writepct=${writePercent}`;
    const boot = isIncoming
      ? ['-option-rom', 'linuxboot_dma.bin,bootindex=0', '-incoming', 'defer']
      : ['-kernel', kernel, '-initrd', initrd, '-append', append];
    const state = statePath === null ? null : openSync(statePath, 'r');
    const child = spawn(
      'qemu-system-x86_64',
      [
        ...['-name', `${name},debug-threads=on`, '-machine', 'q35,memory-backend=m0', '-accel', 'tcg,thread=multi'],
        ...['-cpu', 'qemu64', '-m', `${memoryMiB}`, '-object', memory, '-nodefaults', '-no-user-config'],
        ...['-vga', 'none', '-display', 'none', '-serial', `file:${serialLog}`],
        ...['-qmp', `unix:${socket},server=on,wait=off`, ...(isIncoming ? ['-S'] : []), ...boot],
      ],
      { stdio: ['ignore', 'ignore', 'inherit', ...(state === null ? [] : [state])] },
    );
    if (state !== null) closeSync(state);
    await eventually('QEMU listens', 60_000, () => (existsSync(socket) ? true : undefined));
    const qmp = await QmpClient.connect(socket, { timeoutMs: 60_000, isRetrying: true });
    const restored = { child, qmp, pid: child.pid as number, serialLog };
    this.#running.add(restored);
    return restored;
  }

  async #end(process: Restored): Promise<void> {
    this.#running.delete(process);
    process.qmp.close();
    const ended = new Promise((resolve) => process.child.once('exit', resolve));
    process.child.kill('SIGKILL');
    await ended;
  }
}

async function capabilities(qmp: QmpClient, mode: RestoreMode): Promise<void> {
  const states = [
    { capability: 'events', state: true },
    { capability: 'x-ignore-shared', state: mode !== 'full' },
  ] as const;
  await qmp.execute('migrate-set-capabilities', { capabilities: states });
}

async function status(qmp: QmpClient, wanted: string): Promise<void> {
  const filter = (event: { data: Readonly<Record<string, unknown>> }) => event.data['status'] === wanted;
  const seen = qmp.waitForEvent('MIGRATION', { timeoutMs: LOAD_MS, filter });
  // The event may have come before this call, so the status is queried as well.
  const asked = qmp.execute('query-migrate').then((answer) => (answer.status === wanted ? undefined : seen));
  await Promise.race([seen, asked]);
}
