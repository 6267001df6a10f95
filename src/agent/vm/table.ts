/** The VMs of this host by name, and the listeners for their changes. */
import { EventEmitter } from 'node:events';
import { join } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import type { VmExit } from '../../domain/vm.js';
import { KeyedLocks } from '../../kit/locks.js';
import type { Vm } from './vm.js';

export class VmTable {
  /** One lock per name. Every start, end or removal of the VM holds it. */
  readonly locks = new KeyedLocks();
  /** The directory that has one subdirectory per VM, named after it. */
  readonly directory: string;
  readonly #host: string;
  readonly #vms = new Map<string, Vm>();
  /** Names whose directory has a record that cannot be read. They stay taken until a user removes the directory. */
  readonly #unreadable = new Set<string>();
  readonly #emitter = new EventEmitter();

  constructor(host: string, directory: string) {
    this.#host = host;
    this.directory = directory;
    this.#emitter.setMaxListeners(0);
  }

  /** Throws NOT_FOUND if this host has no such VM. */
  get(name: string): Vm {
    const vm = this.#vms.get(name);
    if (vm !== undefined) return vm;
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

  addUnreadable(name: string): void {
    this.#unreadable.add(name);
  }

  /** Throws CORRUPT if the directory of this name has a record that cannot be read. */
  refuseUnreadable(name: string): void {
    if (!this.#unreadable.has(name)) return;
    throw new MigrationError('CORRUPT', `${join(this.directory, name)} holds a record that cannot be read`, {
      remedy: 'inspect the record, then remove the directory and restart the daemon',
    });
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
}
