/** Asks all peers at once what they know of VMs, by name and UUID: one call to each peer, for a short time. */
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { VmClaims, VmIdentity } from '../domain/host.js';
import type { HostPort } from '../engine/ports/host.js';
import type { InventoryPort } from '../engine/ports/inventory.js';
import { inTime } from '../kit/in-time.js';

const ANSWER_MS_MAX = 2_000;

export interface Peers {
  /** The names of all peers. */
  readonly peerNames: () => readonly string[];
  readonly peer: (host: string) => HostPort;
}

export interface PeerAnswer {
  readonly peer: string;
  /** One for each VM of the question, in its order. Null: the peer did not answer. */
  readonly claims: readonly VmClaims[] | null;
  readonly failure: MigrationError | null;
}

/** Never rejects: the failure of a peer is in its answer. */
export function askPeers({ peerNames, peer }: Peers, vms: readonly VmIdentity[]): Promise<readonly PeerAnswer[]> {
  return Promise.all(
    peerNames().map(async (name): Promise<PeerAnswer> => {
      try {
        const claims = await inTime(name, ANSWER_MS_MAX, ask(peer(name).inventory, vms));
        if (claims.length === vms.length) return { peer: name, claims, failure: null };
        throw new MigrationError(
          'PEER_PROTOCOL',
          `${name} was asked for ${vms.length} VMs and answers ${claims.length}`,
        );
      } catch (error) {
        return { peer: name, claims: null, failure: toMigrationError(error) };
      }
    }),
  );
}

/** A host of build 0.1.0 does not know the call, but lists the names of its VMs. */
async function ask(inventory: InventoryPort, vms: readonly VmIdentity[]): Promise<readonly VmClaims[]> {
  try {
    return (await inventory.vmClaims(vms)).claims;
  } catch (error) {
    if (toMigrationError(error).code !== 'NOT_FOUND') throw error;
  }
  const names = new Set((await inventory.inventory()).vmNames);
  return vms.map(({ name }) => ({
    vms: names.has(name) ? [{ name, uuid: '', state: 'running' }] : [],
    ...{ lastEpoch: 0, owner: null, incarnation: null },
  }));
}
