/**
 * The history of this host's VMs, as events: what a scheduler or a person would otherwise have to poll for. It is
 * derived from the states that VMs and jobs have anyway, so no part of the agent reports anything for it. The last
 * events are kept in memory; a restarted daemon begins anew, with the VMs that it has found.
 */
import type { JobView, MigrationJobView } from '../domain/job.js';
import { isFinal } from '../domain/job.js';
import type { VmExit, VmState } from '../domain/vm.js';
import type { VmEvent, VmEventKind } from '../domain/vm-event.js';
import type { Clock } from '../engine/ports/clock.js';
import { Subscribers } from '../kit/subscribers.js';
import type { ArrivalView } from './migration/arrival.js';
import type { VmManager } from './vm/vms.js';

const EVENTS_MAX = 1024;

export interface VmEventsOptions {
  readonly host: string;
  readonly clock: Pick<Clock, 'isoNow'>;
  readonly vms: Pick<VmManager, 'has' | 'get' | 'all' | 'on'>;
  /** Tells this life of the daemon from others, in the ids of events. */
  readonly life: string;
  readonly onFailure: (error: unknown) => void;
}

/** What is known once the agent and the jobs have started. */
export interface VmEventSources {
  readonly jobs: {
    list(): readonly JobView[];
    subscribe(id: '*', onChange: (view: JobView) => void): () => void;
  };
  /** Returns what is known of a VM whose pages have not all arrived on this host, or null. */
  readonly arrivalOf: (vm: string) => Pick<ArrivalView, 'request'> | null;
}

interface Seen {
  readonly uuid: string;
  readonly state: VmState;
  /** A job or a merge of its disks pauses and continues it. */
  readonly isInWork: boolean;
  /** An event has told of the VM, so another one tells that it is gone. */
  readonly isKnown: boolean;
}

type Phase = 'begun' | 'committed' | 'complete';

export class VmEvents {
  readonly #options: VmEventsOptions;
  #sources: VmEventSources | null = null;
  readonly #seen = new Map<string, Seen>();
  /** How far the moves of unfinished jobs were when an event last told of them, by job. */
  readonly #phases = new Map<string, Phase>();
  readonly #events: VmEvent[] = [];
  #count = 0;
  readonly #subscribers: Subscribers<{ id: string }>;

  /** To be created before the VMs are looked for, so that the end of one that has vanished is an event too. */
  constructor(options: VmEventsOptions) {
    this.#options = options;
    this.#subscribers = new Subscribers(options.onFailure);
    options.vms.on('change', (name) => this.#look(name));
    options.vms.on('exit', (name, exit) => this.#ended(name, exit));
  }

  /** To be called when VMs and sessions have been taken up and jobs are known. What was before that is no news. */
  begin(sources: VmEventSources): void {
    for (const job of sources.jobs.list()) {
      if (job.kind === 'migrate' && !isFinal(job.state)) this.#phases.set(job.id, phaseOf(job));
    }
    // Until then a VM that has not been looked at yet is no new one: its QEMU may have been slow to answer.
    for (const { spec, state } of this.#options.vms.all()) {
      const { name } = spec;
      if (!this.#seen.has(name)) this.#look(name);
      const isThere = state === 'running' || state === 'paused' || state === 'departed';
      if (isThere) this.#tell('found', name);
    }
    this.#sources = sources;
    sources.jobs.subscribe('*', (view) => {
      if (view.kind === 'migrate') this.#follow(view);
    });
  }

  /**
   * Returns the events that are kept, oldest first: those after the event `id`, or all if it is not one of this
   * daemon's. A gap in the numbers tells that events between them are not kept any more.
   */
  list(after?: string): readonly VmEvent[] {
    const [life, number] = after === undefined ? [] : splitId(after);
    const isOwn = life === this.#options.life && number !== undefined && number <= this.#count;
    const missing = isOwn ? this.#count - number : this.#events.length;
    return missing === 0 ? [] : this.#events.slice(-missing);
  }

  /** Calls `onEvent` after each event. Returns a function that ends the subscription. */
  subscribe(onEvent: () => void): () => void {
    return this.#subscribers.add('*', onEvent);
  }

  #look(name: string): void {
    const { vms } = this.#options;
    const before = this.#seen.get(name);
    if (!vms.has(name)) {
      if (before?.isKnown === true) this.#tell('gone', name);
      this.#seen.delete(name);
      return;
    }
    const vm = vms.get(name);
    const { state } = vm;
    const isInWork = vm.job !== null || vm.isMerging;
    this.#seen.set(name, { uuid: vm.spec.uuid, state, isInWork, isKnown: before?.isKnown ?? false });
    if (this.#sources === null || before?.state === state) return;
    const isNew = before === undefined || before.state === 'starting' || before.state === 'incoming';
    if (state !== 'running' && state !== 'paused') return;
    if (isNew) this.#tell(vm.session === null ? 'started' : 'arrived', name, this.#arrivalOf(name));
    // A guest that has ended, and a VM that a job stops and continues, have events of their own. A merge has none.
    else if (before.state !== 'departed' && !isInWork && !before.isInWork && vm.guestEnd === null)
      this.#tell(state === 'running' ? 'resumed' : 'paused', name);
  }

  /** A VM that has never run here, or that runs elsewhere, does not end here. */
  #ended(name: string, exit: VmExit): void {
    if (!this.#seen.has(name)) this.#look(name);
    const state = this.#seen.get(name)?.state;
    if (state === 'departed' || state === 'incoming' || state === 'starting') return;
    this.#tell('stopped', name, { exit });
  }

  #follow(view: MigrationJobView): void {
    const before = this.#phases.get(view.id);
    if (view.state === 'queued') return;
    const now = phaseOf(view);
    if (isFinal(view.state)) this.#phases.delete(view.id);
    else this.#phases.set(view.id, now);
    const isHere = view.source === this.#options.host;
    const move = { job: view.id, peer: isHere ? view.target : view.source };
    if (before === undefined && !isFinal(view.state)) this.#tell(isHere ? 'leaving' : 'arriving', view.vm, move);
    if (isHere && now !== 'begun' && before === 'begun') this.#tell('left', view.vm, move);
    if (isHere && (view.state === 'failed' || view.state === 'cancelled') && before !== undefined)
      this.#tell('stayed', view.vm, move);
    const isNews = now === 'complete' && before !== undefined && before !== 'complete';
    if (!isHere && isNews && this.#seen.get(view.vm)?.state !== 'stopped') this.#tell('complete', view.vm, move);
  }

  #arrivalOf(name: string): Pick<VmEvent, 'job' | 'peer'> | undefined {
    const request = this.#sources?.arrivalOf(name)?.request;
    return request === undefined ? undefined : { job: request.job, peer: request.source };
  }

  #tell(kind: VmEventKind, vm: string, more: Partial<Pick<VmEvent, 'job' | 'peer' | 'exit'>> = {}): void {
    const { host, clock, life, vms } = this.#options;
    const seen = this.#seen.get(vm);
    const uuid = seen?.uuid ?? (vms.has(vm) ? vms.get(vm).spec.uuid : null);
    // The VM of a job may be gone by the time its job says so.
    if (uuid === null) return;
    if (seen !== undefined) this.#seen.set(vm, { ...seen, isKnown: true });
    const id = `${life}-${++this.#count}`;
    this.#events.push({ id, at: clock.isoNow(), kind, vm, uuid, host, job: null, peer: null, exit: null, ...more });
    if (this.#events.length > EVENTS_MAX) this.#events.shift();
    this.#subscribers.tell({ id });
  }
}

/** `complete`: nothing of the VM is missing any more, and the VM was not lost. */
function phaseOf({ isCommitted, step, state, error }: MigrationJobView): Phase {
  if (!isCommitted) return 'begun';
  const isHere = step === 'releaseSource' || step === 'verifyMemory';
  return isHere || (state === 'done' && error === null) ? 'complete' : 'committed';
}

function splitId(id: string): [life?: string, number?: number] {
  const [, life, number] = /^([^-]+)-(\d{1,15})$/.exec(id) ?? [];
  return life === undefined ? [] : [life, Number(number)];
}
