/** The VMs of this host as its users see and end them, whether they ask here or on another host. */
import type { StopResult, VmView } from '../domain/vm.js';
import { stopForUser, type UserStop } from './vm/user-stop.js';
import type { VmManager } from './vm/vms.js';
import type { VmMoves } from './vm-moves.js';

export class UserVms {
  readonly #vms: VmManager;
  readonly #moves: VmMoves;
  readonly #isUnclaimed: (name: string) => boolean;

  /** `isUnclaimed`: no session and no fork needs the VM. */
  constructor(vms: VmManager, moves: VmMoves, isUnclaimed: (name: string) => boolean) {
    this.#vms = vms;
    this.#moves = moves;
    this.#isUnclaimed = isUnclaimed;
  }

  list(): VmView[] {
    return this.#vms.list().map((vm) => this.#moves.view(vm));
  }

  /** Throws NOT_FOUND if this host has no such VM. */
  find(name: string): VmView {
    return this.#moves.view(this.#vms.view(this.#vms.get(name)));
  }

  /** Runs `work` on a VM. If this host does not have the VM but knows where it went, the error says so. */
  located<T>(name: string, work: () => T | Promise<T>): Promise<T> {
    return this.#moves.located(name, work);
  }

  async stop(name: string, options: Omit<UserStop, 'isUnclaimed'>): Promise<StopResult> {
    const { isForced } = options;
    await this.located(name, () => this.#moves.beforeStop(this.#vms.view(this.#vms.get(name)), isForced));
    return stopForUser(this.#vms, name, { ...options, isUnclaimed: this.#isUnclaimed(name) });
  }
}
