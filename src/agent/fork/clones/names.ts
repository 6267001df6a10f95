/**
 * The identity of each clone of a fork: its name, its addresses, and the spec that its QEMU is started with. All of it
 * is computed from the fork, except the guids, which are random.
 *
 * A virtio NIC takes its address from the device state it loads, whatever the command line says. So a clone starts with
 * its parent's NICs, on taps that join no bridge. On a `fresh` network these NICs are then replaced (nic-replace.ts),
 * and only a NIC with an address of its own joins the bridge.
 */
import { createHash, randomUUID } from 'node:crypto';
import { MigrationError } from '../../../domain/errors.js';
import type { CloneIdentity, CloneNetwork } from '../../../domain/fork.js';
import type { NicSpec, VmSpec } from '../../../domain/vm.js';

const NAME_LENGTH_MAX = 63;
const FORK_DIGITS_IN_NAME = 6;
/** Locally administered and unicast. It differs from QEMU's 52:54:00, so that it does not collide with users' specs. */
const MAC_PREFIX = '56';

export interface CloneOrder {
  readonly fork: string;
  readonly cloneCount: number;
  /** If null, the prefix is the parent's name and the first digits of the fork's id. */
  readonly namePrefix: string | null;
  readonly parent: VmSpec;
  readonly network: CloneNetwork;
  /** The MAC addresses of all VMs on this host. Empty for a fork over several hosts, which must agree on all clones. */
  readonly macsTaken: ReadonlySet<string>;
}

export function cloneNames(
  order: Pick<CloneOrder, 'fork' | 'cloneCount' | 'namePrefix'>,
  parentName: string,
): string[] {
  const longest = `-${order.cloneCount - 1}`.length;
  const suffix = order.namePrefix === null ? `-${order.fork.slice(0, FORK_DIGITS_IN_NAME)}` : '';
  const stem = (order.namePrefix ?? parentName).slice(0, NAME_LENGTH_MAX - longest - suffix.length);
  return Array.from({ length: order.cloneCount }, (_, index) => `${stem}${suffix}-${index}`);
}

/** A fork always gets the same names, uuids and addresses. The guids are new at each call. */
export function cloneIdentities(order: CloneOrder): CloneIdentity[] {
  const { fork, cloneCount, parent, network } = order;
  const taken = new Set(order.macsTaken);
  return cloneNames(order, parent.name).map((name, index) => ({
    index,
    cloneCount,
    name,
    uuid: uuidFor(`${fork}/${index}`),
    vmGenerationId: randomUUID(),
    macs: Object.fromEntries(
      parent.nics.map((nic) => [
        nic.id,
        isReplaced(nic, network) ? takeMac(`${fork}/${index}/${nic.id}`, taken) : nic.mac,
      ]),
    ),
  }));
}

/**
 * Throws CONFLICT if a clone gets an address that one of the VMs has. In a fork over several hosts no host can give it
 * another one.
 */
export function refuseMacsTaken(
  clones: readonly CloneIdentity[],
  parent: VmSpec,
  vms: readonly Pick<VmSpec, 'name' | 'nics'>[],
): void {
  const owners = new Map(vms.flatMap(({ name, nics }) => nics.map(({ mac }) => [mac, name] as const)));
  for (const clone of clones) {
    for (const { id, mac: kept } of parent.nics) {
      const mac = clone.macs[id] ?? kept;
      const owner = mac === kept ? undefined : owners.get(mac);
      if (owner === undefined) continue;
      throw new MigrationError('CONFLICT', `clone ${clone.name} would get the address ${mac}, which ${owner} has`, {
        remedy: 'fork again: another fork has other addresses',
      });
    }
  }
}

/** Returns the spec that the clone's QEMU is started with, before it loads the parent's state. */
export function cloneSpec(parent: VmSpec, fork: string, identity: CloneIdentity, network: CloneNetwork): VmSpec {
  const { index, cloneCount, name, uuid, vmGenerationId } = identity;
  return {
    ...parent,
    name,
    uuid,
    vmGenerationId,
    clone: { fork, index, cloneCount },
    nics: parent.nics.map((nic) => startingNic(nic, network)),
  };
}

/** Returns the NICs of the running clone, after those of a fresh network have been replaced. */
export function runningNics(parent: VmSpec, identity: CloneIdentity, network: CloneNetwork): NicSpec[] {
  return parent.nics.map((nic) =>
    isReplaced(nic, network) ? { ...nic, mac: identity.macs[nic.id] ?? nic.mac } : startingNic(nic, network),
  );
}

function startingNic(nic: NicSpec, network: CloneNetwork): NicSpec {
  if (nic.type !== 'tap') return nic;
  if (network === 'isolated') return { ...nic, type: 'isolated' };
  const { bridge: _, ...unbridged } = nic;
  return { ...unbridged, type: 'unplugged' };
}

/** True if the clone's NIC gets an address of its own. A NIC that shares no link with the parent keeps its address. */
function isReplaced(nic: NicSpec, network: CloneNetwork): boolean {
  return network === 'fresh' && nic.type === 'tap';
}

function uuidFor(seed: string): string {
  const digits = digest(`uuid/${seed}`);
  // UUID version 8 (custom), RFC variant.
  const part = (begin: number, end: number): string => digits.slice(begin, end);
  return `${part(0, 8)}-${part(8, 12)}-8${part(13, 16)}-a${part(17, 20)}-${part(20, 32)}`;
}

function takeMac(seed: string, taken: Set<string>): string {
  for (let attempt = 0; ; attempt++) {
    const digits = digest(`mac/${seed}/${attempt}`);
    const bytes = [MAC_PREFIX, ...[0, 2, 4, 6, 8].map((at) => digits.slice(at, at + 2))];
    const mac = bytes.join(':');
    if (taken.has(mac)) continue;
    taken.add(mac);
    return mac;
  }
}

function digest(text: string): string {
  return createHash('sha256').update(text).digest('hex');
}
