/**
 * The baselines of `vfork`: N QEMUs load a state that was saved before, controlled over QMP as by a script. `full`: the
 * state file holds the whole memory. `template`: all QEMUs map a memory file copy-on-write, and the state file holds
 * the device state only (x-ignore-shared). All load first, then all resume, as in vmigrate. `waiting` is `template`
 * with QEMUs started beforehand, which shows the least that loading and resuming cost.
 */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { type Cluster, eventually } from '../../test/hosts/cluster.js';
import { inTurns } from '../../test/hosts/turns.js';
import { cpuSeconds } from './process-cost.js';
import { readWork } from './rate.js';
import { type RestoredGuest, RestoredQemu } from './restored-qemu.js';

export type RestoreMode = 'full' | 'template' | 'waiting';

const STARTS_AT_ONCE = 8;

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
  readonly #running = new Set<RestoredQemu>();
  #serial = 0;

  constructor(
    cluster: Cluster,
    private readonly guest: RestoredGuest,
  ) {
    this.#directory = join(cluster.hostDirectory('A'), 'restores');
    this.#ram = join(cluster.ramDirectory('A'), 'template.ram');
    mkdirSync(this.#directory, { recursive: true });
  }

  /** Boots the guest, saves it in both ways, and ends it. */
  async save(): Promise<void> {
    const parent = await this.#start('parent', { path: this.#ram, isShared: true }, null);
    await eventually('the baseline guest works', 120_000, () =>
      readWork(parent.serialLog).length >= 5 ? true : undefined,
    );
    await parent.save(this.#statePath('full'), true);
    await parent.continue();
    await parent.save(this.#statePath('template'), false);
    await this.#end(parent);
  }

  async run(mode: RestoreMode, count: number): Promise<RestoreRun> {
    const names = Array.from({ length: count }, () => `restore-${this.#serial++}`);
    const waiting = mode === 'waiting' ? await inTurns(names, STARTS_AT_ONCE, (name) => this.#wait(name, mode)) : null;
    const cpuBeforeS = waiting === null ? 0 : cpuSeconds(waiting.map(({ pid }) => pid));
    const load = async (qemu: RestoredQemu) => qemu.load().then(() => qemu);
    const startedAtMs = performance.now();
    const started =
      waiting === null
        ? await inTurns(names, STARTS_AT_ONCE, async (name) => load(await this.#wait(name, mode)))
        : await inTurns(waiting, STARTS_AT_ONCE, load);
    const resumed = await Promise.all(started.map(async (qemu) => (await qemu.resume()) - startedAtMs));
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
    await Promise.all([...this.#running].map((qemu) => this.#end(qemu)));
  }

  #statePath(mode: RestoreMode): string {
    return join(this.#directory, `${mode === 'full' ? 'full' : 'template'}.state`);
  }

  #wait(name: string, mode: RestoreMode): Promise<RestoredQemu> {
    const memoryFile = mode === 'full' ? null : { path: this.#ram, isShared: false };
    return this.#start(name, memoryFile, this.#statePath(mode));
  }

  async #start(
    name: string,
    memoryFile: { path: string; isShared: boolean } | null,
    statePath: string | null,
  ): Promise<RestoredQemu> {
    const directory = join(this.#directory, name);
    const qemu = await RestoredQemu.start({ directory, name, guest: this.guest, memoryFile, statePath });
    this.#running.add(qemu);
    return qemu;
  }

  async #end(qemu: RestoredQemu): Promise<void> {
    this.#running.delete(qemu);
    await qemu.end();
  }
}
