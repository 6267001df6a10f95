/** A back end whose VMs are processes that sleep. A test decides when their guests react and end. */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type {
  LaunchOrder,
  RunState,
  StartedVm,
  VmBackend,
  VmListener,
  VmPlace,
  VmProcess,
} from '../../src/backends/backend.js';
import { MigrationError } from '../../src/domain/errors.js';
import { type ChildExit, findByArgument, identityOf } from '../../src/kit/process.js';

/** A VM is a process that sleeps. A word in a file says whether its guest runs. */
export class Sleeper implements Partial<VmProcess> {
  /** A test sets it to do something once the process is there. */
  static onLaunched: () => Promise<unknown> = async () => undefined;
  readonly #place: VmPlace;
  #child: ChildProcess | null = null;
  #isConnected = false;
  readonly #listeners: VmListener[] = [];
  /** False: the guest ignores its power button. */
  isObedient = true;
  #isDumb = false;
  connectCount = 0;
  buttonCount = 0;
  resetCount = 0;

  constructor(place: VmPlace) {
    this.#place = place;
  }

  async launch(order: LaunchOrder): Promise<StartedVm> {
    const { program, args } = order.enclose({ program: 'sleep', args: ['600'], environment: order.environment });
    const child = spawn(program, args, { detached: true, stdio: 'ignore', argv0: `sleeper ${this.#place.directory}` });
    this.#child = child;
    const exited = new Promise<ChildExit>((resolve) => {
      child.once('exit', (code, signal) => {
        this.#lose();
        resolve({ code, signal });
      });
    });
    const pid = child.pid ?? 0;
    order.onSpawned(pid);
    await writeFile(this.#statePath, 'paused');
    const ready: StartedVm['ready'] = async (mapped, signal) => {
      await mapped(signal);
      this.#isConnected = true;
    };
    await Sleeper.onLaunched();
    return { identity: await identityOf(pid), exited, ready };
  }

  async connect(): Promise<RunState> {
    this.connectCount++;
    if (this.#isDumb) throw new MigrationError('TIMEOUT', 'it does not answer');
    this.#isConnected = true;
    return this.runState();
  }

  /** Also while it is silent. */
  async runState(): Promise<RunState> {
    return (await readFile(this.#statePath, 'utf8')) as RunState;
  }

  async connected(): Promise<void> {
    if (!this.#isConnected) throw new MigrationError('QEMU_GONE', 'it has ended');
  }

  follow(listener: VmListener): void {
    this.#listeners.push(listener);
  }

  close(): void {
    this.#isConnected = false;
  }

  run(): Promise<void> {
    return this.#become('running');
  }

  pause(): Promise<void> {
    return this.#become('paused');
  }

  async powerdown(): Promise<void> {
    await this.connected();
    this.buttonCount++;
    if (this.isObedient) this.powerOff();
  }

  async takeExitText() {
    return { text: '', isOpen: false };
  }

  async outputKept(): Promise<void> {}

  async reset(): Promise<void> {
    await this.connected();
    this.resetCount++;
  }

  async quit(): Promise<void> {
    await this.connected();
    for (const listener of this.#listeners) listener.onShutdown('asked to', false);
    this.#child?.kill();
  }

  /** The process lives on and does not answer, until it is told to. */
  fallSilent(): void {
    this.#isDumb = true;
    this.#lose();
  }

  speakAgain(): void {
    this.#isDumb = false;
  }

  /** What its guest may do. */
  powerOff(): void {
    for (const listener of this.#listeners) listener.onShutdown('lay down', true);
    this.#child?.kill();
  }

  get #statePath(): string {
    return join(this.#place.directory, 'sleeper');
  }

  async #become(state: RunState): Promise<void> {
    await this.connected();
    await writeFile(this.#statePath, state);
    for (const listener of this.#listeners) listener.onRunState(state);
  }

  #lose(): void {
    this.#isConnected = false;
    for (const listener of this.#listeners) listener.onLost();
  }
}

export class SleeperBackend implements Partial<VmBackend> {
  readonly sleepers = new Map<string, Sleeper>();

  async installed() {
    return { version: '1.0', machines: ['bed'] };
  }
  async resolveMachine() {
    return 'bed';
  }
  async resolveAccel(): Promise<'tcg'> {
    return 'tcg';
  }
  checkPlace(): void {}
  processAt(place: VmPlace): VmProcess {
    const sleeper = new Sleeper(place);
    this.sleepers.set(place.name, sleeper);
    return sleeper as never;
  }
  findStray(place: VmPlace) {
    return findByArgument(`sleeper ${place.directory}`);
  }
}
