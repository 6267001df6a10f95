/** Forks that are broken on purpose, one for each kind of violation that the oracle detects. */
import type { ForkPort } from '../../src/engine/ports/fork.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { FanoutSabotage } from './fork/fanout-state.js';
import type { AgentSabotage } from './fork-agent.js';
import { CLONES, EARLIER_IMAGE, type ForkWorld } from './fork-world.js';

/** Some hosts are broken themselves (fork-agent.ts), the others in what a coordinator's calls do there. */
export type ForkSabotage = AgentSabotage | FanoutSabotage | CallSabotage | 'loseJournal';

type CallSabotage =
  | 'discardNothing'
  | 'forgetCommit'
  | 'runBeforeCommit'
  | 'takeBack'
  | 'neverRun'
  | 'completeTooSoon'
  | 'keepReserved'
  | 'forgetTooSoon'
  | 'commitWithout'
  | 'hideFailures';

const AGENTS: readonly string[] = [
  'startByItself',
  'discardWhenOpen',
  'givePagesEarly',
  'rememberForEver',
  'runTooSoon',
] satisfies AgentSabotage[];

export function ofAgent(sabotage: ForkSabotage | undefined): AgentSabotage | null {
  return sabotage !== undefined && AGENTS.includes(sabotage) ? (sabotage as AgentSabotage) : null;
}

/** The host as a coordinator sees it whose calls are sabotaged. */
export function sabotaged(port: HostPort, world: ForkWorld, sabotage: ForkSabotage | undefined): HostPort {
  const { source, forks } = port;
  const host = world.host(port.host);
  const isRoot = host === world.root;
  const withForks = (change: Partial<ForkPort>): HostPort => ({ ...port, forks: { ...forks, ...change } });
  const forget = (fork: string): void => {
    if (isRoot) world.parent.protectedFor = null;
    host.forks.delete(fork);
  };
  switch (sabotage) {
    case 'discardNothing':
      return withForks({ discardFork: () => Promise.resolve() });
    case 'forgetCommit':
      return withForks({
        commitFork: async (fork) => {
          world.event('commit, not written');
          const note = host.forks.get(fork);
          if (note !== undefined) note.isCommitted = true;
        },
      });
    case 'runBeforeCommit':
      return withForks({
        loadClones: async (fork) => {
          const reply = await forks.loadClones(fork);
          for (const clone of host.clones.values()) world.run(clone);
          return reply;
        },
      });
    case 'takeBack':
      return withForks({
        discardFork: async (fork) => {
          for (const name of [...host.clones.keys()]) world.take(host, name);
          for (const image of [...host.images.keys()]) if (image !== EARLIER_IMAGE) host.images.delete(image);
          forget(fork);
          if (isRoot) world.parent.state = 'running';
        },
      });
    case 'neverRun':
      return withForks({
        runClones: async () => ({
          ready: [...Array(CLONES).keys()].map((index) => ({ index, atMs: 1 })),
          failures: [],
        }),
        finishFork: async (fork) => forget(fork),
      });
    case 'completeTooSoon':
      return withForks({
        forkProgress: async (fork) => ({ ...(await forks.forkProgress(fork)), state: 'complete' }),
        finishFork: async (fork) => forget(fork),
      });
    case 'keepReserved':
      return { ...port, source: { ...source, unreserve: () => Promise.resolve() } };
    case 'forgetTooSoon':
      if (!isRoot) return port;
      return withForks({
        runClones: async (fork, decision) => {
          const reply = await forks.runClones(fork, decision);
          host.forks.delete(fork);
          return reply;
        },
      });
    case 'commitWithout':
      return withForks({ sendForkState: () => Promise.resolve({ failures: [] }) });
    case 'hideFailures':
      return withForks({
        runClones: async (fork, decision) => {
          const { ready, failures } = await forks.runClones(fork, decision);
          return { ready: [...ready, ...failures.map(({ index }) => ({ index, atMs: 0 }))], failures: [] };
        },
      });
    default:
      return port;
  }
}
