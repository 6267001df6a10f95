/**
 * After its start the daemon compares its owner records with what the peers know. A state directory that has come back
 * from a backup gives VMs to this host that have moved on since: a peer that has the VM then knows a later epoch, or
 * the same epoch with another incarnation.
 *
 * A VM that a peer has, by a later record of the same start, and whose guest does not run here, belongs to that peer.
 * This is recorded, so that nobody resumes or moves what is left of it here. All else is only shown, because either
 * side may be right.
 */
import { toMigrationError } from '../domain/errors.js';
import type { VmClaims } from '../domain/host.js';
import type { OwnerRecord, Registry } from '../engine/ports/registry.js';
import { askPeers, type Peers } from './peer-claims.js';
import type { AgentLog } from './vm/context.js';
import type { ManagedVm, VmManager } from './vm/vms.js';

const AGAIN_MS_FIRST = 5_000;
const AGAIN_MS_MAX = 300_000;

export interface OutdatedOptions extends Peers {
  readonly host: string;
  readonly registry: Registry;
  readonly vms: Pick<VmManager, 'all' | 'has' | 'get' | 'setState'>;
  readonly log: AgentLog;
}

interface Notice {
  readonly vm: ManagedVm;
  readonly peer: string;
  readonly text: string;
  /** The owner record has been put right. */
  readonly isSettled: boolean;
}

/** Ours is the record of this host: it is older than theirs, or the same start has two. */
function isNewer(theirs: VmClaims, ours: OwnerRecord): boolean {
  if (theirs.lastEpoch !== ours.epoch) return theirs.lastEpoch > ours.epoch;
  return theirs.incarnation !== null && ours.incarnation !== undefined && theirs.incarnation !== ours.incarnation;
}

export class OutdatedRecords {
  readonly #options: OutdatedOptions;
  readonly #notices = new Map<string, Notice>();
  /** The peers that have not answered, or whose answer a person has to act on. */
  readonly #unasked: Set<string>;
  #timer: NodeJS.Timeout | null = null;
  #isClosed = false;

  constructor(options: OutdatedOptions) {
    this.#options = options;
    this.#unasked = new Set(options.peerNames());
  }

  /** Asks in the background, and again those that do not answer, with growing waits. */
  start(waitMs = AGAIN_MS_FIRST): void {
    this.check()
      .catch((error: unknown) =>
        this.#options.log.warn({ err: toMigrationError(error) }, 'the owner records cannot be compared with the peers'),
      )
      .finally(() => {
        if (this.#isClosed || this.#unasked.size === 0) return;
        this.#timer = setTimeout(() => this.start(Math.min(2 * waitMs, AGAIN_MS_MAX)), waitMs).unref();
      });
  }

  close(): void {
    this.#isClosed = true;
    if (this.#timer !== null) clearTimeout(this.#timer);
  }

  /** What is wrong with the records of the VM, for people; null if nothing is known to be. */
  noticeOf(name: string): string | null {
    const { vms } = this.#options;
    const notice = this.#notices.get(name);
    if (notice === undefined) return null;
    // Another VM may have the name by now.
    if (vms.has(name) && vms.get(name) === notice.vm) return notice.text;
    this.#notices.delete(name);
    return null;
  }

  /** Asks the peers that have not answered yet. Resolves when what they say has been recorded. */
  async check(): Promise<void> {
    const { host, registry, vms, peer } = this.#options;
    const mine: { readonly name: string; readonly uuid: string; readonly owner: OwnerRecord }[] = [];
    for (const { spec, state } of vms.all()) {
      const owner = await registry.owner(spec.name);
      if (state !== 'incoming' && owner?.owner === host) mine.push({ name: spec.name, uuid: spec.uuid, owner });
    }
    const answers = await askPeers({ peerNames: () => [...this.#unasked], peer }, mine);
    for (const { peer: name, claims } of answers) {
      if (claims === null || this.#isClosed) continue;
      this.#unasked.delete(name);
      for (const [vm, notice] of this.#notices) if (notice.peer === name && !notice.isSettled) this.#notices.delete(vm);
      for (const [index, { owner }] of mine.entries()) {
        const theirs = claims[index];
        if (theirs === undefined) continue;
        await this.#compare(owner, name, theirs).catch((error: unknown) => {
          this.#unasked.add(name);
          const fields = { vm: owner.vm, peer: name, err: toMigrationError(error) };
          this.#options.log.warn(fields, 'the owner record cannot be compared with that of the peer');
        });
      }
    }
  }

  async #compare(ours: OwnerRecord, peer: string, theirs: VmClaims): Promise<void> {
    const { vms, log, registry } = this.#options;
    const { vm: name, epoch } = ours;
    const there = theirs.vms.find((vm) => vm.name === name && (vm.state === 'running' || vm.state === 'paused'));
    if (there === undefined || !vms.has(name) || !isNewer(theirs, ours)) return;
    const vm = vms.get(name);
    const { state } = vm;
    // A move under way finds out by itself what has become of the VM.
    const isBusy = vm.job !== null || vm.isMerging || state === 'incoming' || state === 'departed';
    if (isBusy || (await registry.owner(name))?.epoch !== epoch) return;
    const isLater = theirs.lastEpoch > epoch;
    // The id of a start moves with the VM, so an equal one in a later epoch proves that the VM has moved there. Without
    // that proof it may be another VM, which was started under the name while this host could not be reached.
    const isSameStart = theirs.incarnation !== null && theirs.incarnation === ours.incarnation;
    const isSettled = isLater && isSameStart && theirs.owner === peer && state !== 'running';
    const known = `this host has a record of ${isLater ? `epoch ${epoch}` : 'another start'}`;
    const since = `in epoch ${theirs.lastEpoch}, and ${known}`;
    const text =
      state === 'running'
        ? `it runs here and is ${there.state} on ${peer}, too (${since}): ` +
          `end one of the two with "vmctl stop --force ${name}"`
        : isSettled
          ? `it is ${there.state} on ${peer} ${since}: "vmctl stop --force ${name}" removes what is left of it here`
          : `a VM of this name is ${there.state} on ${peer}, too (${since}): end one of the two`;
    this.#notices.set(name, { vm, peer, text, isSettled });
    log.error(
      { vm: name, peer, ours, theirs },
      `the owner record of ${name} is older than that of ${peer}, or another`,
    );
    if (!isSettled) {
      this.#unasked.add(peer);
      return;
    }
    const { incarnation } = theirs;
    const next = { vm: name, owner: peer, epoch: theirs.lastEpoch, session: null };
    await registry.swapOwner(name, epoch, incarnation === null ? next : { ...next, incarnation });
    if (vm.state === 'paused') await vms.setState(name, 'departed');
  }
}
