/**
 * One VM, one name, one place: before a VM starts here, every peer is asked whether it has the name or the UUID, and
 * which epoch of the name it knows. An owner record that has come back from a backup is older than what the peers know,
 * so the new VM begins above all epochs that anybody remembers.
 *
 * A peer that does not answer does not keep a VM from starting, and is named in the answer, with one exception: the
 * host to which the VM last belonged. It may run the VM, and only a person can know that it does not.
 */
import { MigrationError } from '../domain/errors.js';
import type { VmClaims, VmIdentity } from '../domain/host.js';
import type { VmSpec } from '../domain/vm.js';
import type { Registry } from '../engine/ports/registry.js';
import { askPeers, type PeerAnswer, type Peers } from './peer-claims.js';
import type { VmManager } from './vm/vms.js';

export interface UniqueNamesOptions extends Peers {
  readonly host: string;
  readonly registry: Registry;
  readonly vms: VmManager;
}

export interface Start {
  /** The VM must begin above this epoch. */
  readonly epochMin: number;
  /** What could not be found out. */
  readonly warnings: readonly string[];
}

export class UniqueNames {
  readonly #options: UniqueNamesOptions;
  /** The VMs whose start asks the peers. Two hosts that start one name at the same time both see the other one. */
  readonly #asking = new Map<string, string>();

  constructor(options: UniqueNamesOptions) {
    this.#options = options;
  }

  /** The answer to another host that asks, in the order of its VMs. */
  async claims(asked: readonly VmIdentity[]): Promise<{ readonly claims: readonly VmClaims[] }> {
    const { registry, vms } = this.#options;
    const known = [
      ...vms.list().map(({ name, uuid, state }) => ({ name, uuid, state })),
      ...[...this.#asking].map(([name, uuid]) => ({ name, uuid, state: 'starting' })),
    ].filter(({ state }) => state !== 'stopped');
    const claims = asked.map(async ({ name, uuid }): Promise<VmClaims> => {
      const owner = await registry.owner(name);
      return {
        vms: known.filter((vm) => isSame(vm, { name, uuid })),
        lastEpoch: await registry.lastEpoch(name),
        owner: owner?.owner ?? null,
        incarnation: owner?.incarnation ?? null,
      };
    });
    return { claims: await Promise.all(claims) };
  }

  /**
   * Runs `start` if nobody has the name or the UUID. Throws CONFLICT, naming the host, if a peer has it, or if the host
   * to which the VM last belonged does not answer. `isForced` lifts the second refusal only.
   */
  guard<T>(spec: VmSpec, isForced: boolean, start: (found: Start) => Promise<T>): Promise<T> {
    return this.#hold([spec], async () => {
      const answers = await askPeers(this.#options, [spec]);
      refuseTaken(answers, [spec]);
      const epochMin = epochsOf(answers, [spec]).get(spec.name) ?? 0;
      const newest = await this.#newestOwner(spec.name, answers);
      const failed = answers.filter(({ claims }) => claims === null);
      const hasAnswered = answers.some(({ peer, claims }) => peer === newest && claims !== null);
      if (newest !== null && newest !== this.#options.host && !hasAnswered && !isForced) {
        throw new MigrationError('CONFLICT', `${spec.name} last belonged to ${newest}, which does not answer`, {
          remedy: `connect ${newest}; or, if ${spec.name} certainly does not run there: vmctl run --force-name`,
          cause: failed.find(({ peer }) => peer === newest)?.failure ?? undefined,
        });
      }
      const doubts = failed.map(({ peer }) => `${peer} does not answer: whether it has a VM ${spec.name} is not known`);
      return start({ epochMin, warnings: doubts });
    });
  }

  /**
   * Runs `start` if no peer that answers has one of the names, with the epochs above which the VMs must begin. For
   * clones, whose UUIDs are new: a peer that does not answer hinders none of them. Throws CONFLICT otherwise.
   */
  guardClones<T>(vms: readonly VmIdentity[], start: (epochs: ReadonlyMap<string, number>) => Promise<T>): Promise<T> {
    return this.#hold(vms, async () => {
      const answers = await askPeers(this.#options, vms);
      refuseTaken(answers, vms);
      return start(epochsOf(answers, vms));
    });
  }

  /** Returns those of the names that peers have, as far as they answer. */
  async namesElsewhere(vms: readonly VmIdentity[]): Promise<readonly string[]> {
    const taken = takenBy(await askPeers(this.#options, vms), vms);
    return [...new Set(taken.map(({ peer, vm, asked }) => `${asked.name} (${vm.state} on ${peer})`))];
  }

  /**
   * Throws CONFLICT if the VM runs on a peer: then this host's records come from a backup. Asked before a user lets a
   * paused VM run.
   */
  async refuseIfElsewhere(name: string, uuid: string): Promise<void> {
    const answers = await askPeers(this.#options, [{ name, uuid }]);
    for (const { peer, claims } of answers) {
      const vms = claims?.flatMap((claim) => claim.vms) ?? [];
      const other = vms.find((vm) => vm.name === name && (vm.state === 'running' || vm.state === 'paused'));
      if (other === undefined) continue;
      throw new MigrationError('CONFLICT', `VM ${name} is ${other.state} on ${peer}, too`, {
        remedy: `the records of this host are older: end its VM with "vmctl stop ${name}", or that on ${peer}`,
      });
    }
  }

  async #hold<T>(vms: readonly VmIdentity[], work: () => Promise<T>): Promise<T> {
    const taken = vms.find(({ name }) => this.#asking.has(name));
    if (taken !== undefined) throw new MigrationError('CONFLICT', `VM ${taken.name} is being started`);
    for (const { name, uuid } of vms) this.#asking.set(name, uuid);
    try {
      return await work();
    } finally {
      for (const { name } of vms) this.#asking.delete(name);
    }
  }

  /** Returns the owner in the newest record of the name that this host or a peer has. */
  async #newestOwner(name: string, answers: readonly PeerAnswer[]): Promise<string | null> {
    const own = await this.#options.registry.owner(name);
    const records = [
      ...(own === null ? [] : [{ owner: own.owner, epoch: own.epoch }]),
      ...answers.flatMap(({ claims }) =>
        (claims ?? []).flatMap(({ owner, lastEpoch }) => (owner === null ? [] : [{ owner, epoch: lastEpoch }])),
      ),
    ];
    return records.sort((a, b) => b.epoch - a.epoch)[0]?.owner ?? null;
  }
}

/** Returns the newest epoch of each name that a peer knows. */
function epochsOf(answers: readonly PeerAnswer[], vms: readonly VmIdentity[]): Map<string, number> {
  return new Map(
    vms.map(({ name }, index) => [name, Math.max(0, ...answers.map(({ claims }) => claims?.[index]?.lastEpoch ?? 0))]),
  );
}

function takenBy(answers: readonly PeerAnswer[], asked: readonly VmIdentity[]) {
  return answers.flatMap(({ peer, claims }) =>
    (claims ?? []).flatMap((claim, index) => {
      const of = asked[index];
      if (of === undefined) return [];
      return claim.vms.filter((vm) => isSame(vm, of)).map((vm) => ({ peer, vm, asked: of }));
    }),
  );
}

/** A VM whose record cannot be read has no UUID, nor has a question for a name alone. */
function isSame(vm: VmIdentity, { name, uuid }: VmIdentity): boolean {
  return vm.name === name || (uuid !== '' && vm.uuid === uuid);
}

function refuseTaken(answers: readonly PeerAnswer[], asked: readonly VmIdentity[]): void {
  const [taken] = takenBy(answers, asked);
  if (taken === undefined) return;
  const { peer, vm } = taken;
  const isName = vm.name === taken.asked.name;
  const what = isName ? `VM ${vm.name}` : `VM ${vm.name}, which has the same UUID,`;
  throw new MigrationError('CONFLICT', `${what} is ${vm.state} on ${peer}`, {
    remedy: isName ? `choose another name, or stop it on ${peer}` : 'leave the uuid out of the spec',
  });
}
