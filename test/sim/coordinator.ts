/**
 * The common part of the simulations of migrations and forks: a coordinator's ports on a simulated world, and the check
 * whether its job has ended.
 */
import { readHistories } from '../../src/jobs/history.js';
import type { JobManager } from '../../src/jobs/jobs.js';
import type { FileJournal } from '../../src/jobs/journal.js';
import type { JobManagerOptions } from '../../src/jobs/options.js';
import type { Chance } from './chance.js';
import type { Life, Time } from './time.js';

export interface AnyWorld {
  readonly chance: Chance;
  readonly time: Time;
  readonly trace: string[];
  readonly violation: unknown;
  /** An event at which a fault may strike. */
  event(label: string): void;
  /** Stops all further faults. */
  endFaults(): void;
}

const REST_MS_MAX = 1_800_000;
/** Longer than the delay of any call. */
const AFTERMATH_MS = 90_000;

export function diskHooks(world: AnyWorld, isFull: () => boolean) {
  return { isFull, event: (label: string) => world.event(label), chance: () => world.chance.next() };
}

export function worldPorts(
  world: AnyWorld,
  life: Life,
): Pick<JobManagerOptions, 'clock' | 'random' | 'inject' | 'log'> {
  return {
    clock: life.clock,
    random: { hex: (bytes) => world.chance.hex(bytes) },
    inject: {
      hit: async (point) => {
        world.event(point);
        await life.survive();
      },
    },
    log: {
      info: () => undefined,
      warn: (fields, message) => world.trace.push(`  log ${message} ${JSON.stringify(fields)}`),
    },
  };
}

/**
 * Returns whether the only job of a world has ended, with nothing left to undo. Nobody helps a job that needs recovery:
 * it must go on by itself. Null: there is no job.
 */
export function jobWatch(): (jobs: JobManager, journal: FileJournal) => boolean | null {
  return (jobs, journal) => {
    const job = jobs.list()[0];
    if (job === undefined) return null;
    const isOver = ['done', 'failed', 'cancelled', 'lost'].includes(job.state);
    return isOver && [...readHistories(journal.entries()).values()].every(({ leftovers }) => leftovers.size === 0);
  };
}

/**
 * Runs the world until its job has ended, and then until no delayed call can arrive any more. Returns false if the job
 * does not end.
 */
export async function runToRest(world: AnyWorld, isAtRest: () => boolean): Promise<boolean> {
  const isOver = (): boolean => world.violation !== null || isAtRest();
  const hasRested = await world.time.run(isOver, REST_MS_MAX);
  world.endFaults();
  if (hasRested && world.violation === null) await world.time.run(() => world.violation !== null, AFTERMATH_MS);
  if (hasRested && world.violation === null) await world.time.run(isOver, REST_MS_MAX);
  return hasRested;
}
