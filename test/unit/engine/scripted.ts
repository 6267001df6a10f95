/**
 * A coordinator with two agents that a test scripts. Registry, journal, jobs and engine are real, on stores in memory.
 */

import { hostOfCalls } from '../../../src/api/peers/methods.js';
import { FileRegistry } from '../../../src/cluster/file.js';
import type { ForkJobView, JobView, MigrationJobView } from '../../../src/domain/job.js';
import type { HostPort } from '../../../src/engine/ports/host.js';
import type { JournalEntry } from '../../../src/engine/ports/journal.js';
import type { SessionProgress } from '../../../src/engine/ports/session.js';
import { JobManager } from '../../../src/jobs/jobs.js';
import { FileJournal } from '../../../src/jobs/journal.js';
import type { JobLimits } from '../../../src/jobs/options.js';
import { MemoryStore } from '../durable/memory-store.js';
import { forkAnswers } from '../planner/fork-facts.js';
import { goodFacts, host, vm } from '../planner/planner-facts.js';

export const complete: SessionProgress = {
  state: 'complete',
  hasRun: true,
  error: null,
  pagesTotal: 100,
  pagesPresent: 100,
  pageBytes: 4096,
  counters: {
    demandBytes: 40_960,
    prefetchBytes: 81_920,
    pagesZero: 70,
    faultCount: 10,
    faultP50Ns: 200_000,
    faultP99Ns: 900_000,
    faultMaxNs: 1_000_000,
    degradedNs: 30_000_000,
    cpuNs: 5e8,
    reconnectCount: 1,
  },
};

export const INCARNATION = 'e'.repeat(32);

export class Scripted {
  /** The calls in their order, as "A.stop" or "B.prepare". */
  readonly calls: string[] = [];
  readonly warnings: string[] = [];
  readonly journalStore = new MemoryStore();
  readonly ownerStore = new MemoryStore();
  /** The calls that a test overrides, each called instead of the ordinary answer. */
  readonly on: { [call: string]: (...parameters: never[]) => unknown } = {};
  onInject: (point: string) => Promise<void> = () => Promise.resolve();
  peers = ['A', 'B'];
  #count = 0;
  /** The clock never returns the same time twice, so that equal times are not equal by chance. */
  #isoMs = 0;

  /** `hasOwner`: the VM has an owner record, written now if there is none. */
  async daemon(limits: Partial<JobLimits> = {}, { hasOwner } = { hasOwner: true }) {
    const registry = await FileRegistry.on(this.ownerStore);
    if (hasOwner && (await registry.owner('vm1')) === null) {
      await registry.swapOwner('vm1', null, {
        vm: 'vm1',
        owner: 'A',
        epoch: 3,
        session: null,
        incarnation: INCARNATION,
      });
    }
    const { journal } = await FileJournal.on(this.journalStore);
    const jobs = new JobManager({
      host: 'A',
      agent: (name) => {
        if (!this.peers.includes(name)) throw new Error(`no peer ${name}`);
        return this.agent(name);
      },
      registry,
      journal,
      clock: {
        nowMs: () => performance.now(),
        isoNow: () => {
          this.#isoMs = Math.max(Date.now(), this.#isoMs + 1);
          return new Date(this.#isoMs).toISOString();
        },
        sleep: (ms, signal) =>
          new Promise((resolve) => {
            const end = (): void => {
              clearTimeout(timer);
              signal?.removeEventListener('abort', end);
              resolve();
            };
            const timer = setTimeout(end, ms);
            signal?.addEventListener('abort', end);
          }),
      },
      random: { hex: (bytes) => (++this.#count).toString(16).padStart(bytes * 2, '0') },
      inject: { hit: (point) => this.onInject(point) },
      log: { info: () => undefined, warn: (_, message) => this.warnings.push(message) },
      limits: { pollMsFirst: 1, pollMs: 2, retryMsFirst: 1, retryMsMax: 4, leftoverMsFirst: 5, ...limits },
    });
    await jobs.start();
    return { jobs, registry, journal };
  }

  agent(name: string): HostPort {
    const answers: Readonly<Record<string, unknown>> = {
      inventory: host(name),
      vmInventory: { ...vm, owner: 'A', incarnation: INCARNATION },
      checkTarget: goodFacts().target.checks,
      offerStorage: { proof: '0'.repeat(32), files: [], views: [] },
      viewStorage: [],
      prepare: { nativeUri: null },
      fetchAhead: { isDone: true, isHeld: true },
      takeBack: { pages: 0 },
      resume: { resumedAtUs: 12_000 },
      progress: complete,
      expose: { transport: 'tcp', host: '10.0.0.1', port: 1, keys: [] },
      noteDirty: { round: 1, dirtyPages: 0, againPages: 0 },
      stop: { stoppedAtUs: 2_000, stoppedForMs: 0 },
      transferState: { deviceStateBytes: 300_000 },
      nativeProgress: { status: 'completed', downtimeMs: 20, ramTransferredBytes: 5_000, rounds: 3 },
      sourceCounters: { cpuNs: 25e7 },
      ...forkAnswers,
    };
    return hostOfCalls(name, async ({ name: call }, parameters) => {
      this.calls.push(`${name}.${call}`);
      const scripted = this.on[`${name}.${call}`];
      return scripted === undefined ? answers[call] : scripted(...(parameters as never[]));
    });
  }

  /** The calls that change something, without the earlier questions and the polls. */
  get acts(): string[] {
    const questions = /[iI]nventory|checkTarget|Storage|\.progress|sourceCounters|nativeProgress|forkProgress/;
    return this.calls.filter((call) => !questions.test(call));
  }

  sessionOf(id: string): string | undefined {
    return this.journalled().flatMap((entry) => (entry.type === 'job' && entry.job === id ? [entry.session] : []))[0];
  }

  journalled(): JournalEntry[] {
    const lines = this.journalStore.bytes.toString().trim().split('\n');
    return lines.map((line) => JSON.parse(line.slice(line.indexOf('{'))) as JournalEntry);
  }
}

export function rest(jobs: JobManager, id: string): Promise<JobView> {
  const isAtRest = ({ state }: JobView) => ['done', 'failed', 'cancelled', 'lost', 'needsRecovery'].includes(state);
  return new Promise((resolve) => {
    if (isAtRest(jobs.get(id))) return resolve(jobs.get(id));
    const end = jobs.subscribe(id, (view) => {
      if (!isAtRest(view)) return;
      end();
      resolve(view);
    });
  });
}

export async function restMigration(jobs: JobManager, id: string): Promise<MigrationJobView> {
  return (await rest(jobs, id)) as MigrationJobView;
}

export async function restFork(jobs: JobManager, id: string): Promise<ForkJobView> {
  return (await rest(jobs, id)) as ForkJobView;
}

/** A promise with its settling functions. */
export function gate(): { passed: Promise<void>; open: () => void } {
  let open = (): void => undefined;
  const passed = new Promise<void>((resolve) => {
    open = resolve;
  });
  return { passed, open };
}

/** A call that is answered only when the test says so. `came` resolves when the call has been made. */
export function held(world: Scripted, call: string, answer?: unknown): { came: Promise<void>; release: () => void } {
  const came = gate();
  const parked = gate();
  world.on[call] = async () => {
    came.open();
    await parked.passed;
    return answer;
  };
  return { came: came.passed, release: parked.open };
}

/** A daemon that never gets beyond `point`. The files are then as after a crash there. */
export async function crashedAt(
  point: string,
  submit: (jobs: JobManager) => Promise<JobView>,
  world = new Scripted(),
): Promise<{ world: Scripted; id: string }> {
  const crashed = gate();
  world.onInject = (hit) => {
    if (hit !== point) return Promise.resolve();
    crashed.open();
    return new Promise(() => undefined);
  };
  const { jobs } = await world.daemon();
  const { id } = await submit(jobs);
  await crashed.passed;
  world.onInject = () => Promise.resolve();
  world.calls.length = 0;
  return { world, id };
}
