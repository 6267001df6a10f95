/**
 * One VM, one name, one place: before a VM starts here, every peer is asked whether it has the name or the UUID, and
 * which epoch of the name it knows. An owner record that has come back from a backup is older than what the peers know,
 * so the new VM begins above all epochs that anybody remembers.
 *
 * A peer that does not answer does not keep a VM from starting, and is named in the answer, with one exception: the
 * host to which the VM last belonged. It may run the VM, and only a person can know that it does not.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { VmClaims } from '../domain/host.js';
import type { VmSpec } from '../domain/vm.js';
import type { HostPort } from '../engine/ports/host.js';
import type { InventoryPort } from '../engine/ports/inventory.js';
import type { Registry } from '../engine/ports/registry.js';
import type { VmManager } from './vm/vms.js';

const ANSWER_MS_MAX = 2_000;

export interface UniqueNamesOptions {
  readonly host: string;
  readonly registry: Registry;
  readonly vms: VmManager;
  /** The names of all peers. */
  readonly peerNames: () => readonly string[];
  readonly peer: (host: string) => HostPort;
}

export interface Start {
  /** The VM must begin above this epoch. */
  readonly epochMin: number;
  /** What could not be found out. */
  readonly warnings: readonly string[];
}

interface Answer {
  readonly peer: string;
  readonly claims: VmClaims | null;
  readonly failure: MigrationError | null;
}

export class UniqueNames {
  readonly #options: UniqueNamesOptions;
  /** The VMs whose start asks the peers. Two hosts that start one name at the same time both see the other one. */
  readonly #asking = new Map<string, string>();

  constructor(options: UniqueNamesOptions) {
    this.#options = options;
  }

  /** The answer to another host that asks. */
  async claims(name: string, uuid: string): Promise<VmClaims> {
    const { registry, vms } = this.#options;
    const owner = await registry.owner(name);
    const known = vms.list().map((vm) => ({ name: vm.name, uuid: vm.uuid, state: vm.state }));
    const starting = [...this.#asking].map(([asked, askedUuid]) => ({
      name: asked,
      uuid: askedUuid,
      state: 'starting',
    }));
    return {
      vms: [...known, ...starting].filter((vm) => vm.state !== 'stopped' && (vm.name === name || vm.uuid === uuid)),
      lastEpoch: await registry.lastEpoch(name),
      owner: owner?.owner ?? null,
      incarnation: owner?.incarnation ?? null,
    };
  }

  /**
   * Runs `start` if nobody has the name or the UUID. Throws CONFLICT, naming the host, if a peer has it, or if the host
   * to which the VM last belonged does not answer. `isForced` lifts the second refusal only.
   */
  async guard<T>(spec: VmSpec, isForced: boolean, start: (found: Start) => Promise<T>): Promise<T> {
    const { name, uuid } = spec;
    if (this.#asking.has(name)) throw new MigrationError('CONFLICT', `VM ${name} is being started`);
    this.#asking.set(name, uuid);
    try {
      return await start(await this.#ask(spec, isForced));
    } finally {
      this.#asking.delete(name);
    }
  }

  /**
   * Throws CONFLICT if the VM runs on a peer: then this host's records come from a backup. Asked before a user lets a
   * paused VM run.
   */
  async refuseIfElsewhere(name: string, uuid: string): Promise<void> {
    const answers = await Promise.all(this.#options.peerNames().map((peer) => this.#askPeer(peer, name, uuid)));
    for (const { peer, claims } of answers) {
      const other = claims?.vms.find((vm) => vm.name === name && (vm.state === 'running' || vm.state === 'paused'));
      if (other === undefined) continue;
      throw new MigrationError('CONFLICT', `VM ${name} is ${other.state} on ${peer}, too`, {
        remedy: `the records of this host are older: end its VM with "vmctl stop ${name}", or that on ${peer}`,
      });
    }
  }

  async #ask({ name, uuid }: VmSpec, isForced: boolean): Promise<Start> {
    const { host, registry, peerNames } = this.#options;
    const answers = await Promise.all(peerNames().map((peer) => this.#askPeer(peer, name, uuid)));
    for (const { peer, claims } of answers) refuseIfTaken(name, uuid, peer, claims);
    const own = await registry.owner(name);
    const records = [
      ...(own === null ? [] : [{ owner: own.owner, epoch: own.epoch }]),
      ...answers.flatMap(({ claims }) =>
        claims === null || claims.owner === null ? [] : [{ owner: claims.owner, epoch: claims.lastEpoch }],
      ),
    ];
    const [newest] = records.sort((a, b) => b.epoch - a.epoch);
    const hasAnswered = answers.some(({ peer, claims }) => peer === newest?.owner && claims !== null);
    const failed = answers.filter(({ claims }) => claims === null);
    if (newest !== undefined && newest.owner !== host && !hasAnswered && !isForced) {
      throw new MigrationError('CONFLICT', `${name} last belonged to ${newest.owner}, which does not answer`, {
        remedy: `connect ${newest.owner}; or, if ${name} certainly does not run there: vmctl run --force-name`,
        cause: failed.find(({ peer }) => peer === newest.owner)?.failure ?? undefined,
      });
    }
    return {
      epochMin: Math.max(0, ...answers.map(({ claims }) => claims?.lastEpoch ?? 0)),
      warnings: failed.map(({ peer }) => `${peer} does not answer: whether it has a VM ${name} is not known`),
    };
  }

  async #askPeer(peer: string, name: string, uuid: string): Promise<Answer> {
    try {
      const asking = ask(this.#options.peer(peer).inventory, name, uuid);
      const tooLate = new AbortController();
      const timeout = sleep(ANSWER_MS_MAX, null, { signal: tooLate.signal }).then(() => {
        throw new MigrationError('TIMEOUT', `${peer} did not answer within ${ANSWER_MS_MAX} ms`);
      });
      timeout.catch(() => undefined);
      asking.catch(() => undefined);
      try {
        return { peer, claims: await Promise.race([asking, timeout]), failure: null };
      } finally {
        tooLate.abort();
      }
    } catch (error) {
      return { peer, claims: null, failure: toMigrationError(error) };
    }
  }
}

/** A host of build 0.1.0 does not know the call, but lists the names of its VMs. */
async function ask(inventory: InventoryPort, name: string, uuid: string): Promise<VmClaims> {
  try {
    return await inventory.vmClaims(name, uuid);
  } catch (error) {
    if (toMigrationError(error).code !== 'NOT_FOUND') throw error;
  }
  const { vmNames } = await inventory.inventory();
  const vms = vmNames.includes(name) ? [{ name, uuid: '', state: 'running' }] : [];
  return { vms, lastEpoch: 0, owner: null, incarnation: null };
}

function refuseIfTaken(name: string, uuid: string, peer: string, claims: VmClaims | null): void {
  const taken = claims?.vms.find((vm) => vm.name === name || vm.uuid === uuid);
  if (taken === undefined) return;
  const what = taken.name === name ? `VM ${name}` : `VM ${taken.name}, which has the same UUID,`;
  throw new MigrationError('CONFLICT', `${what} is ${taken.state} on ${peer}`, {
    remedy: taken.name === name ? `choose another name, or stop it on ${peer}` : 'leave the uuid out of the spec',
  });
}
