/** The users that the processes of VMs run as: one for all, or one for each VM. */
import { createHash } from 'node:crypto';
import { MigrationError } from '../../domain/errors.js';
import { type QemuUsers, usersWithProcesses } from './processes.js';

export class UserPool {
  readonly #users: QemuUsers | null;
  /** Taken by starts whose VM is in no table yet. */
  readonly #taken = new Set<number>();

  readonly #first: number;

  /**
   * `users` null: processes have the daemon's user. `stateDir` says where in the range this daemon begins, so that two
   * daemons of one machine with the same range hardly ever take the same uid.
   */
  constructor(users: QemuUsers | null, stateDir: string) {
    this.#users = users;
    this.#first = createHash('sha256').update(stateDir).digest().readUInt32BE();
  }

  /**
   * Runs `create` with a uid that no VM has. `inUse` has those of all VMs of this host, and of the created one when
   * `create` has resolved. Throws OUT_OF_MEMORY if none is left.
   */
  async with<T>(inUse: () => ReadonlySet<number>, create: (uid: number | null) => Promise<T>): Promise<T> {
    if (this.#users === null) return create(null);
    const { from, count } = this.#users;
    if (count === 1) return create(from);
    // Also those of another daemon, or of a VM whose record cannot be read.
    const used = new Set([...inUse(), ...usersWithProcesses(this.#users), ...this.#taken]);
    const numbers = Array.from(
      { length: Math.min(count, used.size + 1) },
      (_, n) => from + ((this.#first + n) % count),
    );
    const uid = numbers.find((each) => !used.has(each));
    if (uid === undefined) {
      throw new MigrationError('OUT_OF_MEMORY', `each of the ${count} users for VMs has one`, {
        remedy: 'remove VMs that have ended, or raise security.qemuUser.count',
      });
    }
    this.#taken.add(uid);
    try {
      return await create(uid);
    } finally {
      this.#taken.delete(uid);
    }
  }
}
