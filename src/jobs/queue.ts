/**
 * Tracks which job holds which VM, and which jobs wait. A VM is in one job at a time. A fork may wait for another fork
 * of the same VM, which holds the VM until its image is complete. All other waiting jobs wait for the limit of running
 * jobs.
 */
import { isFinal } from '../domain/job.js';
import { type Job, vmOf } from './job.js';

export class JobQueue {
  /** VM name -> the job that holds it. */
  readonly #holders = new Map<string, Job>();
  /** Waiting jobs in the order of their requests. */
  readonly #waiting: Job[] = [];

  holderOf(vm: string): Job | undefined {
    return this.#holders.get(vm);
  }

  /** Takes the VM for the job. Returns false if another job holds it. */
  hold(job: Job): boolean {
    const vm = vmOf(job);
    if (vm === null) return true;
    const holder = this.#holders.get(vm);
    if (holder === undefined) this.#holders.set(vm, job);
    return holder === undefined || holder === job;
  }

  release(job: Job): void {
    const vm = vmOf(job);
    if (vm !== null && this.#holders.get(vm) === job) this.#holders.delete(vm);
  }

  push(job: Job): void {
    this.#waiting.push(job);
  }

  /** Removes and returns the first job that can begin. It holds its VM from now on. */
  take(): Job | undefined {
    const position = this.#waiting.findIndex((job) => this.hold(job));
    return position < 0 ? undefined : this.#waiting.splice(position, 1)[0];
  }

  /** Returns false if the job is not in the queue. */
  remove(job: Job): boolean {
    const position = this.#waiting.indexOf(job);
    if (position >= 0) this.#waiting.splice(position, 1);
    return position >= 0;
  }

  /** Returns the jobs that wait for the VM of this job. */
  behind(job: Job): readonly Job[] {
    const vm = vmOf(job);
    if (vm === null || this.#holders.get(vm) !== job) return [];
    return this.#waiting.filter((other) => vmOf(other) === vm);
  }

  clear(): void {
    this.#waiting.length = 0;
  }
}

/**
 * Returns whether a fork may wait for this job: the job ends by itself, and then a fork of its VM is possible.
 */
export function isWaitedFor({ history, view }: Job): boolean {
  if (history.kind !== 'fork' || isFinal(view.state) || view.state === 'needsRecovery') return false;
  return history.record.plan.request.parentMode === 'continue';
}

/** Returns whether `job` may wait for `holder`, which holds its VM. */
export function mayFollow(job: Job, holder: Job): boolean {
  return job.history.kind === 'fork' && isWaitedFor(holder);
}
