/**
 * Who has which VM, and who waits. A VM is in one job at a time; a fork may wait for another fork of the same VM, which
 * holds it until its image is complete. All else that waits does so because enough is under way.
 */
import { isFinal } from '../domain/job.js';
import { type Job, vmOf } from './job.js';

export class JobQueue {
  /** VM -> job that has it. */
  readonly #holders = new Map<string, Job>();
  /** In the order of their requests. */
  readonly #waiting: Job[] = [];

  holderOf(vm: string): Job | undefined {
    return this.#holders.get(vm);
  }

  /** False: another has the VM. */
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

  /** The first that can begin; it has its VM from now on. */
  take(): Job | undefined {
    const position = this.#waiting.findIndex((job) => this.hold(job));
    return position < 0 ? undefined : this.#waiting.splice(position, 1)[0];
  }

  /** False: it does not wait here. */
  remove(job: Job): boolean {
    const position = this.#waiting.indexOf(job);
    if (position >= 0) this.#waiting.splice(position, 1);
    return position >= 0;
  }

  /** Those that wait for what this job has. */
  behind(job: Job): readonly Job[] {
    const vm = vmOf(job);
    if (vm === null || this.#holders.get(vm) !== job) return [];
    return this.#waiting.filter((other) => vmOf(other) === vm);
  }

  clear(): void {
    this.#waiting.length = 0;
  }
}

/** A fork of its VM will be possible when it has ended, and it will end by itself. */
export function isWaitedFor({ history, view }: Job): boolean {
  if (history.kind !== 'fork' || isFinal(view.state) || view.state === 'needsRecovery') return false;
  return history.record.plan.request.parentMode === 'continue';
}

/** May it wait for this one, which has its VM? */
export function mayFollow(job: Job, holder: Job): boolean {
  return job.history.kind === 'fork' && isWaitedFor(holder);
}
