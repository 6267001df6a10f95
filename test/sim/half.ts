/** The common part of both halves of a simulated host: its disk, its life, and the points at which it may crash. */

import { type ErrorCode, MigrationError } from '../../src/domain/errors.js';
import type { Registry } from '../../src/engine/ports/registry.js';
import { type Life, NEVER } from './time.js';
import type { HostState, Qemu, VmRecord, World } from './world.js';

/** Time that QEMU or the disk needs. */
const WORK_MS = 2;

export interface HalfParts {
  readonly world: World;
  readonly state: HostState;
  readonly life: Life;
  readonly registry: Registry;
}

export class SimHalf {
  protected readonly world: World;
  protected readonly state: HostState;
  protected readonly life: Life;
  protected readonly registry: Registry;
  /** Sessions, and VM/job pairs, that have ended. A late call does not bring them back. */
  protected readonly closed = new Set<string>();

  constructor({ world, state, life, registry }: HalfParts) {
    this.world = world;
    this.state = state;
    this.life = life;
    this.registry = registry;
  }

  /** Lets time pass, and may crash. Earlier effects are on the disk then; later ones are not. */
  protected async work(label: string): Promise<void> {
    this.world.event(`${this.state.name} ${label}`);
    await this.life.sleep(WORK_MS);
    if (!this.life.isAlive) await NEVER;
  }

  protected vm(name: string): VmRecord {
    const record = this.state.vms.get(name);
    if (record === undefined) throw failure('NOT_FOUND', `${name} is not on ${this.state.name}`);
    return record;
  }

  protected living(name: string): Qemu {
    const { qemu } = this.vm(name);
    if (qemu?.isAlive !== true) throw failure('QEMU_GONE', 'QEMU has ended');
    return qemu;
  }

  protected refuseClosed(key: string): void {
    if (this.closed.has(key)) throw failure('CONFLICT', `${key} is over`);
  }
}

export function failure(code: ErrorCode, message: string): MigrationError {
  return new MigrationError(code, message);
}
