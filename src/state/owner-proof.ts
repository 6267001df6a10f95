/** Which host owns a VM, by what the peers say and what the memory directory has kept. Nothing is guessed. */
import type { PeerAnswer } from '../agent/peer-claims.js';
import type { VmClaims } from '../domain/host.js';
import type { OwnerRecord } from '../engine/ports/registry.js';

export interface OwnerQuestion {
  readonly vm: string;
  /** Empty if no record of this host has it. */
  readonly uuid: string;
  /** The name of this host; null: not known. */
  readonly self: string | null;
  /** The newest epoch of the VM that an intact record of this host has. */
  readonly epoch: number;
  /** By its own record the VM is running or paused on this host. */
  readonly isHere: boolean;
  /** An unfinished move may have committed, and its daemon asks the target. */
  readonly isMoving: boolean;
}

export type OwnerProof =
  | { readonly record: OwnerRecord; readonly why: string }
  | { readonly record: null; readonly why: string };

const unproven = (why: string): OwnerProof => ({ record: null, why });

/** `answers` has one claim of each peer, that for this VM. */
export function proveOwner(
  { vm, uuid, self, epoch, isHere, isMoving }: OwnerQuestion,
  answers: readonly { readonly peer: string; readonly claims: VmClaims | null }[],
): OwnerProof {
  if (isMoving) return unproven('an unfinished move of it asks its target by itself when vmigrated runs');
  const said = answers.flatMap(({ peer, claims }) => (claims === null ? [] : [{ peer, claims }]));
  const namesake = said.find(({ claims }) =>
    claims.vms.some((other) => other.name === vm && uuid !== '' && other.uuid !== '' && other.uuid !== uuid),
  );
  if (namesake !== undefined) return unproven(`${namesake.peer} has another VM of that name`);
  const statesAt = ({ claims }: { claims: VmClaims }) =>
    claims.vms.filter(({ name }) => name === vm).map(({ state }) => state);
  const has = (state: string) => said.filter((answer) => statesAt(answer).includes(state));
  if (has('incoming').length > 0) return unproven('it is arriving at a peer');
  const living = [...has('running'), ...has('paused')];
  if (living.length > 1) return unproven(`it is on ${living.map(({ peer }) => peer).join(' and on ')}`);
  const [only] = living;
  if (only !== undefined) {
    const { peer, claims } = only;
    if (claims.owner !== peer || claims.lastEpoch < epoch) return unproven(`it is on ${peer}, in an older epoch`);
    if (isHere && claims.lastEpoch === epoch) return unproven(`it is here and on ${peer}, in one epoch`);
    return { record: recordOf(vm, peer, claims), why: `${peer} has it` };
  }
  const silent = answers.filter(({ claims }) => claims === null).map(({ peer }) => peer);
  if (silent.length > 0) return unproven(`${silent.join(', ')} did not answer`);
  if (answers.length === 0) return unproven('no peer was asked');
  const latest = Math.max(epoch, ...said.map(({ claims }) => claims.lastEpoch));
  const later = said.filter(({ claims }) => claims.lastEpoch === latest && latest > epoch);
  const newest = later.find(({ claims }) => claims.owner !== null);
  const went = newest?.claims.owner ?? null;
  if (newest !== undefined && went !== null)
    return { record: recordOf(vm, went, newest.claims), why: `${newest.peer} knows that it went there` };
  const [witness] = later;
  if (witness !== undefined) return unproven(`${witness.peer} knows of epoch ${latest}, but not to whom it belongs`);
  if (self === null || !isHere) return unproven('no peer has it, and neither has this host, by its own records');
  const why = 'it is here, and no peer has it or knows of a later epoch';
  return { record: { vm, owner: self, epoch, session: null }, why };
}

function recordOf(vm: string, owner: string, { lastEpoch, incarnation }: VmClaims): OwnerRecord {
  const record = { vm, owner, epoch: lastEpoch, session: null };
  return incarnation === null ? record : { ...record, incarnation };
}

/** One line for each peer: what it says of the VM. */
export function answerLines(vm: string, answers: readonly PeerAnswer[], index: number): string[] {
  return answers.map(({ peer, claims, failure }) => {
    if (claims === null) return `${vm}: ${peer} does not answer: ${failure?.message ?? 'no reason is known'}`;
    const of = claims[index];
    const states = of?.vms.filter(({ name }) => name === vm).map(({ state }) => state) ?? [];
    const epoch = of === undefined || of.lastEpoch === 0 ? 'knows no epoch of it' : `knows epoch ${of.lastEpoch}`;
    const owner = of === undefined || of.owner === null ? '' : ` with owner ${of.owner}`;
    const has = states.length === 0 ? 'does not have it' : `has it ${states.join(' and ')}`;
    return `${vm}: ${peer} ${has}, ${epoch}${owner}`;
  });
}
