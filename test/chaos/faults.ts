/**
 * The faults of a chaos run. Each strikes some time after a job was accepted, lasts a while, and is healed. The table
 * says what the crash tables of the engine permit under the fault: anything else is a violation.
 */
import { readFile } from 'node:fs/promises';
import { eventually, sleep } from '../hosts/cluster.js';
import { vmsOn } from './checks.js';
import type { Field } from './field.js';

/** What a fault may cost, by the crash tables at the head of both procedures (src/engine). */
export interface Cost {
  /** The VM that moves, or the parent of the fork, may end. */
  readonly vm?: boolean;
  /** Clones may end. */
  readonly clones?: boolean;
}

export interface Scene {
  readonly field: Field;
  readonly vm: string;
  readonly source: string;
  /** The host of the fork itself, in a fork. */
  readonly target: string;
  readonly job: string;
}

export interface Fault {
  readonly name: string;
  readonly costs?: Cost;
  strike(scene: Scene): Promise<void>;
  /** Absent if there is nothing to heal. */
  heal?(scene: Scene): Promise<void> | void;
}

const NOTICED_MS = 30_000;

type Side = 'source' | 'target';

const NONE: Fault = { name: 'none', strike: () => Promise.resolve() };

function daemonKilled(sides: readonly Side[]): Fault {
  return {
    name: `daemon killed: ${sides.join(' and ')}`,
    strike: async ({ field, ...scene }) => {
      for (const side of sides) await field.cluster.stopDaemon(scene[side]);
    },
    heal: async ({ field, ...scene }) => {
      for (const side of sides) await field.restart(scene[side]);
    },
  };
}

function daemonStopped(side: Side): Fault {
  const signal = ({ field, ...scene }: Scene, name: NodeJS.Signals) => {
    if (field.cluster.isDaemonRunning(scene[side])) process.kill(field.cluster.daemonPid(scene[side]), name);
    return Promise.resolve();
  };
  return {
    name: `daemon stopped: ${side}`,
    strike: (scene) => signal(scene, 'SIGSTOP'),
    heal: (scene) => signal(scene, 'SIGCONT'),
  };
}

function linkCut(side: Side): Fault {
  return {
    name: `link cut: ${side}`,
    strike: ({ field, ...scene }) => field.cluster.network.setLink(scene[side], false),
    heal: ({ field, ...scene }) => field.cluster.network.setLink(scene[side], true),
  };
}

/** Kills the QEMUs of that host that `isVictim` accepts. */
function qemuKilled(side: Side, whose: string, costs: Cost, isVictim: (commandLine: string) => boolean): Fault {
  return {
    name: `QEMU killed: ${whose}`,
    costs,
    strike: async ({ field, ...scene }) => {
      const killed = new Set<number>();
      for (const pid of await field.cluster.qemuPids(scene[side])) {
        const commandLine = await readFile(`/proc/${pid}/cmdline`, 'utf8').catch(() => '');
        if (!isVictim(commandLine)) continue;
        process.kill(pid, 'SIGKILL');
        killed.add(pid);
      }
      // Until the daemon has noticed, it lists them as running.
      await eventually('the daemon notices the end of its QEMUs', NOTICED_MS, async () =>
        (await vmsOn(field, scene[side])).some(({ pid }) => pid !== null && killed.has(pid)) ? undefined : true,
      );
    },
  };
}

function full(kind: 'memory' | 'state', side: Side, costs: Cost = {}): Fault {
  return {
    name: `${kind} file system full: ${side}`,
    costs,
    strike: ({ field, ...scene }) => field.fill(scene[side], kind),
    heal: ({ field, ...scene }) => field.unfill(scene[side], kind),
  };
}

const cancelled: Fault = {
  name: 'cancelled',
  // A committed job refuses, and a job that has ended, too.
  strike: ({ field, source, job }) =>
    field.cluster
      .api(source)
      .post(`/v1/jobs/${job}/cancel`)
      .then(
        () => undefined,
        () => undefined,
      ),
};

/** The file system is filled by somebody else, so the reservation of the VM's memory cannot hold. */
const FOREIGN: Cost = { vm: true };

export const MOVE_FAULTS: readonly Fault[] = [
  NONE,
  daemonKilled(['source']),
  daemonKilled(['target']),
  daemonKilled(['source', 'target']),
  daemonStopped('source'),
  daemonStopped('target'),
  linkCut('source'),
  linkCut('target'),
  qemuKilled('source', 'source', { vm: true }, () => true),
  qemuKilled('target', 'target', { vm: true }, () => true),
  full('memory', 'target', FOREIGN),
  full('state', 'source'),
  full('state', 'target'),
  cancelled,
  {
    name: 'stopped by a user at the target',
    // It is refused while the VM's memory is not all there. Afterwards it is an ordinary end.
    costs: { vm: true },
    strike: async ({ field, target, vm }) => {
      await field.cluster.vmctl(target, 'stop', vm, '--timeout', '0');
    },
  },
];

const isClone = (commandLine: string): boolean => commandLine.includes('/.images/');

export const FORK_FAULTS: readonly Fault[] = [
  NONE,
  daemonKilled(['source']),
  daemonStopped('source'),
  qemuKilled('source', 'parent', { vm: true }, (line) => !isClone(line)),
  qemuKilled('source', 'clones', { clones: true }, isClone),
  full('memory', 'source', { vm: true, clones: true }),
  full('state', 'source'),
  cancelled,
];

/** Strikes after `delayMs`, and heals `lastingMs` later, whatever happens in between. */
export async function inflict(fault: Fault, scene: Scene, delayMs: number, lastingMs: number): Promise<void> {
  await sleep(delayMs);
  try {
    await fault.strike(scene);
    if (fault.heal !== undefined) await sleep(lastingMs);
  } finally {
    await fault.heal?.(scene);
  }
}
