/**
 * Who each clone of a fork is: names, addresses, and the spec that its QEMU is started with. Pure but for the guids,
 * which are drawn.
 *
 * A virtio NIC keeps the address of the VM whose state it has loaded, whatever the command line says. So a clone starts
 * with its parent's NICs on taps that join no bridge; on a `fresh` network they are then replaced (nic-replace.ts), and
 * only a NIC with an address of its own is plugged in.
 */
import { createHash, randomUUID } from 'node:crypto';
import type { CloneIdentity, CloneNetwork } from '../../domain/fork.js';
import type { NicSpec, VmSpec } from '../../domain/vm.js';

const NAME_LENGTH_MAX = 63;
const FORK_DIGITS_IN_NAME = 6;
/** Locally administered, unicast, and not QEMU's 52:54:00: what users write in specs is not met by accident. */
const MAC_PREFIX = '56';

export interface CloneOrder {
  readonly fork: string;
  readonly cloneCount: number;
  /** null: the parent's name with the beginning of the fork's id. */
  readonly namePrefix: string | null;
  readonly parent: VmSpec;
  readonly network: CloneNetwork;
  /** Of the VMs on this host. */
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

/** The same fork gives the same names, uuids and addresses again; the guids are new each time. */
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

/** What the clone's QEMU is started with, before it loads the parent's state. */
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

/** The NICs that the clone has once it runs and those of a fresh network have been replaced. */
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

/** One that shares no link with its parent keeps the parent's address. */
function isReplaced(nic: NicSpec, network: CloneNetwork): boolean {
  return network === 'fresh' && nic.type === 'tap';
}

function uuidFor(seed: string): string {
  const digits = digest(`uuid/${seed}`);
  // Version 8 (of one's own making), the usual variant.
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
