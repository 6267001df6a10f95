/** What must hold after each round of a chaos run, whatever the fault was. */
import { existsSync } from 'node:fs';
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { VmView } from '../../src/domain/vm.js';
import { eventually } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';
import type { Field } from './field.js';

const SETTLED_MS = 120_000;
const RUNNING = new Set(['running', 'paused']);

export const vmsOn = (field: Field, host: string): Promise<VmView[]> => field.cluster.api(host).get('/v1/vms');

/** Returns the hosts on which the VM runs. */
export async function homesOf(field: Field, vm: string): Promise<string[]> {
  const homes: string[] = [];
  for (const host of field.hosts)
    if ((await vmsOn(field, host)).some(({ name, state }) => name === vm && RUNNING.has(state))) homes.push(host);
  return homes;
}

/**
 * Notices a guest that runs twice. The guest prints its own clock, which moves with it. So all that it has printed on
 * the host it came from is earlier than what it prints on the host it went to.
 */
export class Watch {
  readonly #guest: Guest;
  readonly #field: Field;
  /** The guest's latest time seen on each host. */
  readonly #latestS = new Map<string, number>();
  #timer: NodeJS.Timeout | null = null;
  #look: Promise<void> = Promise.resolve();

  constructor(field: Field, vm: string) {
    this.#field = field;
    this.#guest = new Guest(field.cluster, vm);
  }

  start(): void {
    const next = () => {
      this.#look = this.#lookAtAll();
      void this.#look.finally(() => {
        if (this.#timer !== null) this.#timer = setTimeout(next, 200);
      });
    };
    this.#timer = setTimeout(next, 0);
  }

  async stop(): Promise<void> {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = null;
    await this.#look;
  }

  /** Throws if the guest worked on `other` at or after its first time on `home`. */
  async expectOnce(source: string, home: string): Promise<void> {
    if (source === home) return;
    const [first] = await this.#guest.work(home);
    const latestS = this.#latestS.get(source);
    if (first !== undefined && latestS !== undefined && latestS >= first.timeS)
      throw new Error(`runs twice: worked on ${source} until ${latestS} s, on ${home} since ${first.timeS} s`);
  }

  async #lookAtAll(): Promise<void> {
    for (const host of this.#field.hosts) {
      // A daemon that is killed or stopped answers nothing; the next look sees what it holds.
      const windows = await this.#guest.work(host).catch(() => []);
      const last = windows.at(-1);
      if (last !== undefined) this.#latestS.set(host, Math.max(last.timeS, this.#latestS.get(host) ?? 0));
    }
  }
}

/** Waits until nothing of the VM is left on the host: no record, no QEMU, no memory file, no session. */
export async function expectNothingLeft(field: Field, host: string, vm: string): Promise<void> {
  let left: string[] = [];
  await eventually(`nothing of ${vm} is left on ${host}`, SETTLED_MS, async () => {
    left = await leftovers(field, host, vm);
    return left.length === 0 ? true : undefined;
  }).catch((error: Error) => {
    throw new Error(`${error.message}; left: ${left.join(', ')}`);
  });
}

async function leftovers(field: Field, host: string, vm: string): Promise<string[]> {
  const state = field.path(host, 'state');
  const found = [
    ...(await vmsOn(field, host)).filter(({ name }) => name === vm).map((view) => `VM in state ${view.state}`),
    ...(await names(join(state, 'vms'))).filter((name) => name === vm).map(() => 'record'),
    ...(await names(join(state, 'sessions'))).map((name) => `session ${name}`),
    ...(await names(field.path(host, 'memory'))).filter((name) => name === vm).map(() => 'memory files'),
  ];
  for (const pid of await field.cluster.qemuPids(host)) found.push(`QEMU ${pid}`);
  return found;
}

/** Waits until no image, fork, session or memory file is left. VMs other than `vm` must be gone, too. */
export async function expectOnly(field: Field, host: string, vm: string | null): Promise<void> {
  let left: string[] = [];
  await eventually(`only ${vm ?? 'nothing'} is left on ${host}`, SETTLED_MS, async () => {
    const state = field.path(host, 'state');
    left = [
      ...(await vmsOn(field, host)).filter(({ name }) => name !== vm).map(({ name }) => `VM ${name}`),
      ...(await Promise.all(['images', 'forks', 'sessions'].map((folder) => names(join(state, folder))))).flat(),
      ...(await names(join(field.path(host, 'memory'), '.images'))).map((name) => `memory of image ${name}`),
    ];
    const qemuCount = (await field.cluster.qemuPids(host)).length;
    if (qemuCount !== (vm === null ? 0 : 1)) left.push(`${qemuCount} QEMUs`);
    return left.length === 0 ? true : undefined;
  }).catch((error: Error) => {
    throw new Error(`${error.message}; left: ${left.join(', ')}`);
  });
}

function names(path: string): Promise<string[]> {
  return existsSync(path) ? readdir(path) : Promise.resolve([]);
}
