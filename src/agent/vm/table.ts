/** The VMs of this host by name, and the listeners for their changes. */
import { EventEmitter } from 'node:events';
import { MigrationError } from '../../domain/errors.js';
import type { VmExit } from '../../domain/vm.js';
import type { OwnerRecord } from '../../engine/ports/registry.js';
import { deferred } from '../../kit/deferred.js';
import { KeyedLocks } from '../../kit/locks.js';
import { refusal, type UnreadableVm } from './unreadable.js';
import type { Vm } from './vm.js';

export class VmTable {
  /** One lock per name. Every start, end or removal of the VM holds it. */
  readonly locks = new KeyedLocks();
  /** The directory that has one subdirectory per VM, named after it. */
  readonly directory: string;
  readonly #host: string;
  readonly #vms = new Map<string, Vm>();
  /** VMs with a record that cannot be read. Their names stay taken. */
  readonly #unreadable = new Map<string, UnreadableVm>();
  readonly #emitter = new EventEmitter();

  constructor(host: string, directory: string) {
    this.#host = host;
    this.directory = directory;
    this.#emitter.setMaxListeners(0);
  }

  /** Throws NOT_FOUND if this host has no such VM, CORRUPT if its record cannot be read. */
  get(name: string): Vm {
    const vm = this.#vms.get(name);
    if (vm !== undefined) return vm;
    this.refuseUnreadable(name);
    throw new MigrationError('NOT_FOUND', `no VM ${name} on ${this.#host}`);
  }

  find(name: string): Vm | undefined {
    return this.#vms.get(name);
  }

  has(name: string): boolean {
    return this.#vms.has(name);
  }

  all(): readonly Vm[] {
    return [...this.#vms.values()];
  }

  add(vm: Vm): void {
    this.#vms.set(vm.spec.name, vm);
  }

  /** Removes the VM from the table and notifies the listeners. */
  forget(vm: Vm): void {
    this.#vms.delete(vm.spec.name);
    vm.isForgotten = true;
    this.changed(vm);
  }

  addUnreadable(vm: UnreadableVm): void {
    this.#unreadable.set(vm.view.name, vm);
  }

  unreadable(): readonly UnreadableVm[] {
    return [...this.#unreadable.values()];
  }

  /** Throws CORRUPT if the VM of this name has a record that cannot be read. */
  refuseUnreadable(name: string): void {
    const vm = this.#unreadable.get(name);
    if (vm !== undefined) throw refusal(vm);
  }

  changed({ spec }: Vm): void {
    this.#emitter.emit('change', spec.name);
  }

  ended({ spec }: Vm, exit: VmExit): void {
    this.#emitter.emit('exit', spec.name, exit);
  }

  on(event: 'exit' | 'change', listener: (...args: never[]) => void): void {
    this.#emitter.on(event, listener as (...args: unknown[]) => void);
  }

  off(event: 'exit' | 'change', listener: (...args: never[]) => void): void {
    this.#emitter.off(event, listener as (...args: unknown[]) => void);
  }

  /** Returns false if the VM's process has not ended and been recorded as ended within `timeoutMs`. */
  async untilEnded(vm: Vm, timeoutMs: number): Promise<boolean> {
    const ended = deferred<boolean>();
    const look = (name: string) => {
      if (name === vm.spec.name && (vm.record.exit !== null || vm.isForgotten)) ended.resolve(true);
    };
    const timer = setTimeout(() => ended.resolve(false), timeoutMs);
    this.on('change', look);
    look(vm.spec.name);
    try {
      return await ended.promise;
    } finally {
      clearTimeout(timer);
      this.off('change', look);
    }
  }
}

/** The answer to calls for a VM that by its owner record is not this host's, or not in this epoch. */
export function notOurs({ spec }: Vm, owner: OwnerRecord | null, host: string): MigrationError {
  const { name } = spec;
  const isElsewhere = owner !== null && owner.owner !== host;
  return new MigrationError('OWNER_CHANGED', `${name} belongs to ${owner?.owner ?? 'no host'}, not to this host`, {
    remedy: isElsewhere
      ? `ask ${owner.owner}; to end what is left here: "vmctl stop --force ${name}"`
      : `stop vmigrated, then: vmctl state repair DIR; to end what runs here: "vmctl stop --force ${name}"`,
  });
}
