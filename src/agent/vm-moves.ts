/**
 * What this host can truly say of its VMs while they move: how much of one that arrives is here, how far one that
 * leaves is, where one that has left went, and what ending one would lose.
 */
import { type ErrorCode, MigrationError, toMigrationError } from '../domain/errors.js';
import type { JobView, MigrationJobView } from '../domain/job.js';
import type { Arrival, Departure, VmView } from '../domain/vm.js';
import type { Registry } from '../engine/ports/registry.js';
import { type ArrivalView, percentOf } from './migration/arrival.js';

export interface VmMovesOptions {
  readonly host: string;
  readonly registry: Pick<Registry, 'owner'>;
  /** Returns what is known of a VM whose pages have not all arrived on this host, or null. */
  readonly arrivalOf: (vm: string) => ArrivalView | null;
  /** Returns what is wrong with the VM's records, for people, or null. */
  readonly noticeOf: (vm: string) => string | null;
  /** Returns the job of this daemon that holds the VM, if any. */
  readonly jobOf: (vm: string) => JobView | undefined;
  /** Ends a committed migration from this host as lost. Throws CONFLICT if that would lose nothing. */
  readonly giveUp: (job: string) => Promise<void>;
}

export class VmMoves {
  readonly #options: VmMovesOptions;

  constructor(options: VmMovesOptions) {
    this.#options = options;
  }

  /** Adds what is known of a move under way. */
  view(vm: VmView): VmView {
    const arriving = arrivalFor(this.#options.arrivalOf(vm.name));
    const leaving = departureFor(this.#options.jobOf(vm.name));
    const notice = this.#options.noticeOf(vm.name);
    return {
      ...vm,
      job: vm.job ?? arriving?.job ?? null,
      ...(notice === null ? {} : { notice }),
      ...(arriving === null ? {} : { arriving }),
      ...(leaving === null ? {} : { leaving }),
    };
  }

  /**
   * To be called before a user ends the VM. Throws CONFLICT if that would lose a VM that is spread over two hosts. By
   * force, such a VM is given up: on the source its job ends first, so that nothing needs the memory any more.
   */
  async beforeStop({ name, state }: Pick<VmView, 'name' | 'state'>, isForced: boolean): Promise<void> {
    const { host } = this.#options;
    const arriving = arrivalFor(this.#options.arrivalOf(name));
    if (arriving !== null && arriving.incompleteSince !== null && !isForced) {
      const { job, source, percent } = arriving;
      const part = percent === null ? 'not all of its memory has' : `only ${percent} % of its memory have`;
      throw new MigrationError(
        'CONFLICT',
        `${name} runs here, but ${part} arrived from ${source}: the VM would be lost, on ${source} too`,
        { remedy: waitOr(job, name) },
      );
    }
    const job = this.#options.jobOf(name);
    if (state !== 'departed' || job?.kind !== 'migrate' || !job.isCommitted) return;
    if (isForced) return this.#options.giveUp(job.id);
    const percent = percentIn(job);
    const part = percent === null ? '' : ` (${percent} % have arrived)`;
    throw new MigrationError(
      'CONFLICT',
      `${name} runs on ${job.target}, which still fetches its memory from ${host}${part}: the VM would be lost`,
      { remedy: waitOr(job.id, name) },
    );
  }

  /** Runs `work` on a VM. If this host does not have the VM but knows where it went, the error says so. */
  async located<T>(name: string, work: () => T | Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (thrown) {
      const error = toMigrationError(thrown);
      if (error.code !== ('NOT_FOUND' satisfies ErrorCode)) throw error;
      const { host, registry } = this.#options;
      const record = await registry.owner(name).catch(() => null);
      if (record === null || record.owner === host) throw error;
      throw new MigrationError('NOT_FOUND', `${name} is not on ${host}: it has moved to ${record.owner}`, {
        remedy: `ask ${record.owner}: "vmctl show ${name}" there`,
        details: { owner: record.owner, epoch: record.epoch },
        cause: error,
      });
    }
  }
}

function waitOr(job: string, vm: string): string {
  return `wait for the rest: "vmctl job ${job} --follow"; to give the VM up: "vmctl stop --force ${vm}"`;
}

function arrivalFor(arrival: ArrivalView | null): Arrival | null {
  if (arrival === null) return null;
  const { request, isStalled, incompleteSince } = arrival;
  return { job: request.job, source: request.source, percent: percentOf(arrival), isStalled, incompleteSince };
}

function departureFor(job: JobView | undefined): Departure | null {
  if (job?.kind !== 'migrate' || job.state === 'queued') return null;
  const isStalled = job.state === 'recovering' || job.state === 'needsRecovery';
  return { job: job.id, target: job.target, percent: percentIn(job), isStalled };
}

function percentIn({ progress }: MigrationJobView): number | null {
  if (progress === null || progress.pagesTotal === 0) return null;
  return Math.floor((100 * progress.pagesDone) / progress.pagesTotal);
}
