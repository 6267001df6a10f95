/**
 * VMs that stand still because another host does not serve their disk. They go on by themselves when it does. A VM that
 * its user has paused is left alone, and so is one that a full disk has stopped. Another error of a disk of this host
 * looks the same, so such a VM is tried too, less and less often.
 */
import { type MigrationError, toMigrationError } from '../../../domain/errors.js';
import type { ServedDisk } from '../../../domain/vm.js';
import type { ImageContext } from '../../image/context.js';
import type { ManagedVm } from '../../vm/vms.js';
import type { DiskReader } from './disk-reader.js';

const LOOK_MS = 2_000;
/** A VM that stops again at once is resumed after longer and longer waits: its own disk may be the cause. */
const WAIT_MS_MAX = 60_000;

type WaitsContext = Pick<ImageContext, 'vms' | 'log'>;

export class DiskWaits {
  readonly #context: WaitsContext;
  readonly #reader: Pick<DiskReader, 'probe'>;
  /** The VMs that wait, with what is wrong. */
  readonly #waiting = new Map<ManagedVm, string>();
  readonly #looking = new Set<ManagedVm>();
  readonly #resumed = new WeakMap<ManagedVm, { readonly atMs: number; readonly waitMs: number }>();
  #timer: NodeJS.Timeout | null = null;

  constructor(context: WaitsContext, reader: Pick<DiskReader, 'probe'>) {
    this.#context = context;
    this.#reader = reader;
  }

  start(): void {
    const { vms } = this.#context;
    vms.on('change', this.#onChange);
    for (const vm of vms.all()) this.#look(vm);
    this.#timer = setInterval(() => this.#lookAgain(), LOOK_MS);
    this.#timer.unref();
  }

  close(): void {
    this.#context.vms.off('change', this.#onChange);
    if (this.#timer !== null) clearInterval(this.#timer);
  }

  /** Returns what is wrong, for people, or null. */
  noticeOf(name: string): string | null {
    const { vms } = this.#context;
    const vm = vms.has(name) ? vms.get(name) : null;
    return vm?.state === 'paused' ? (this.#waiting.get(vm) ?? null) : null;
  }

  readonly #onChange = (name: string): void => {
    const { vms } = this.#context;
    if (vms.has(name)) this.#look(vms.get(name));
  };

  /** QEMU fails the first read after a long wait once more, while the call that let the VM run is under way. */
  #lookAgain(): void {
    const all = this.#context.vms.all();
    for (const vm of this.#waiting.keys()) if (!all.includes(vm)) this.#waiting.delete(vm);
    for (const vm of all) if (vm.state === 'paused') this.#look(vm);
  }

  #look(vm: ManagedVm): void {
    const served = vm.spec.disks.flatMap((disk) =>
      disk.served === undefined ? [] : [{ id: disk.id, ...disk.served }],
    );
    if (served.length === 0 || this.#looking.has(vm)) return;
    this.#looking.add(vm);
    const looking = this.#lookAt(vm, served).finally(() => this.#looking.delete(vm));
    looking.catch((error: unknown) => {
      const { log } = this.#context;
      const err = toMigrationError(error);
      // It is tried again.
      if (vm.state === 'paused') log.warn({ vm: vm.spec.name, err }, 'a VM that waits for its disk cannot be resumed');
    });
  }

  async #lookAt(vm: ManagedVm, served: readonly (ServedDisk & { readonly id: string })[]): Promise<void> {
    const { vms, log } = this.#context;
    const { name } = vm.spec;
    if (vm.state !== 'paused' || !(await vm.process.facts.isStoppedByDisk())) {
      this.#waiting.delete(vm);
      return;
    }
    for (const { id, host, image } of served) {
      const error = await this.#reader.probe(host, image, id).then(
        () => null,
        (thrown: unknown) => toMigrationError(thrown),
      );
      if (error === null) continue;
      if (!this.#waiting.has(vm)) log.warn({ vm: name, disk: id, err: error }, 'a VM waits for a disk of another host');
      this.#waiting.set(vm, describe(id, host, error));
      return;
    }
    if (!this.#waiting.has(vm)) this.#waiting.set(vm, 'stands still: a disk could not be read or written');
    const nowMs = performance.now();
    const { atMs = -Infinity, waitMs = LOOK_MS } = this.#resumed.get(vm) ?? {};
    if (nowMs - atMs < waitMs) return;
    const hasLasted = nowMs - atMs > WAIT_MS_MAX;
    this.#resumed.set(vm, { atMs: nowMs, waitMs: hasLasted ? LOOK_MS : Math.min(waitMs * 2, WAIT_MS_MAX) });
    // It stays as it is if its user has paused it meanwhile.
    await vms.restoreRunState(name, async () => vm.mergedOverlay === null);
    this.#waiting.delete(vm);
    if (runs(vm)) log.info({ vm: name }, 'a VM that has waited for a disk of another host goes on');
  }
}

function runs({ state }: ManagedVm): boolean {
  return state === 'running';
}

function describe(disk: string, host: string, { message }: MigrationError): string {
  return `stands still: it reads disk ${disk} from ${host}, which does not serve it (${message}); it goes on by itself`;
}
