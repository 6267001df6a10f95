/** Which VMs this host has, by name, and who is told when one of them changes. */
import { EventEmitter } from 'node:events';
import { join } from 'node:path';
import { MigrationError } from '../../domain/errors.js';
import type { VmExit } from '../../domain/vm.js';
import { KeyedLocks } from '../../kit/locks.js';
import type { Vm } from './vm.js';

export class VmTable {
  /** Of a name: whoever starts, ends or removes the VM holds it. */
  readonly locks = new KeyedLocks();
  /** Each VM has a directory in it, by its name. */
  readonly directory: string;
  readonly #host: string;
  readonly #vms = new Map<string, Vm>();
  /** Names whose directory holds a record that cannot be read: taken until someone looks. */
  readonly #unreadable = new Set<string>();
  readonly #emitter = new EventEmitter();

  constructor(host: string, directory: string) {
    this.#host = host;
    this.directory = directory;
    this.#emitter.setMaxListeners(0);
  }

  /** NOT_FOUND if there is none. */
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

  /** It is gone; whoever follows changes is told. */
  forget(vm: Vm): void {
    this.#vms.delete(vm.spec.name);
    this.changed(vm);
  }

  addUnreadable(name: string): void {
    this.#unreadable.add(name);
  }

  /** CORRUPT if the directory of this name is not known to be a VM's. */
  mustBeReadable(name: string): void {
    if (!this.#unreadable.has(name)) return;
    throw new MigrationError('CORRUPT', `${join(this.directory, name)} holds a record that cannot be read`, {
      remedy: 'look at it, then remove the directory and restart the daemon',
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
