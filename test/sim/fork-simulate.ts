import { callOn, hostOfCalls } from '../../src/api/peers/methods.js';
import { FileRegistry } from '../../src/cluster/file.js';
import { MigrationError } from '../../src/domain/errors.js';
import type { ForkRequest, ParentMode } from '../../src/domain/fork.js';
import type { JobState } from '../../src/domain/job.js';
import type { ForkPort } from '../../src/engine/ports/fork.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { SourcePort } from '../../src/engine/ports/source.js';
import { JobManager } from '../../src/jobs/jobs.js';
import { FileJournal } from '../../src/jobs/journal.js';
import { unreachableHost } from '../../src/jobs/unreachable-host.js';
import { diskHooks, jobWatch, runToRest, worldPorts } from './coordinator.js';
import { SimForkAgent } from './fork-agent.js';
import { CLONES, type ForkFault, ForkWorld } from './fork-world.js';
import { vmSpec } from './spec.js';
import { SimStore } from './store.js';
import { Life } from './time.js';

/** Orders of steps that are broken on purpose, one for each kind of violation that the oracle detects. */
export type ForkSabotage =
  | 'discardNothing'
  | 'forgetCommit'
  | 'runBeforeCommit'
  | 'takeBack'
  | 'neverRun'
  | 'completeTooSoon'
  | 'keepReserved'
  | 'loseJournal';

export interface ForkScenario {
  readonly seed: number;
  readonly faults: readonly ForkFault[];
  readonly parentMode?: ParentMode;
  readonly sabotage?: ForkSabotage;
}

export interface ForkResult {
  readonly violation: string | null;
  /** Null: the request was refused, or the daemon died before the job was durable. */
  readonly state: JobState | null;
  readonly eventCount: number;
  readonly trace: readonly string[];
}

export async function simulateFork({
  seed,
  faults,
  parentMode = 'continue',
  sabotage,
}: ForkScenario): Promise<ForkResult> {
  const world = new ForkWorld(seed, faults);
  let jobs: JobManager | null = null;
  let journal: FileJournal | null = null;

  const boot = async (): Promise<void> => {
    const life = new Life(world.time);
    world.life = life;
    const hooks = diskHooks(world, () => world.isDiskFull);
    const registry = await FileRegistry.on(new SimStore(world.owners, life, hooks));
    const agent = new SimForkAgent(world, life);
    if (sabotage === 'loseJournal') world.journal.bytes = Buffer.alloc(0);
    const opened = (await FileJournal.on(new SimStore(world.journal, life, hooks))).journal;
    await agent.start();
    const host: HostPort = { ...unreachableHost('A', null), source: agent as unknown as SourcePort, forks: agent };
    const local = hostOfCalls('A', (line, parameters) =>
      called(world, life, line.name, () => callOn(host, line, parameters)),
    );
    const wrong = sabotaged(local, world, sabotage);
    const manager = new JobManager({
      ...{ host: 'A', registry, journal: opened },
      agent: () => wrong,
      ...worldPorts(world, life),
    });
    jobs = manager;
    journal = opened;
    await manager.start();
  };

  world.onRestart = () => {
    world.trace.push('  restarts');
    boot().catch((error: unknown) => world.fail(`the daemon does not start again: ${String(error)}`));
  };
  world.onCancel = () => {
    const job = jobs?.list()[0];
    if (job !== undefined) void jobs?.cancel(job.id).catch(() => undefined);
  };

  await boot();
  const first = world.life;
  let isAnswered = false;
  jobs!
    .submitFork(requestFor(parentMode))
    .catch((error: unknown) => world.trace.push(`  refused: ${String(error)}`))
    .finally(() => {
      isAnswered = true;
    });

  const isRested = jobWatch();
  const hasRested = await runToRest(world, () => {
    if (!world.isCalm || world.life === null || jobs === null || journal === null) return false;
    return isRested(jobs, journal) ?? (isAnswered || world.life !== first);
  });
  const job = (jobs as JobManager | null)?.list()[0] ?? null;
  if (!hasRested) world.fail(`the job did not come to rest: ${JSON.stringify(job)}`);
  else if (world.violation === null) {
    checkAtRest(world, job?.state ?? null, parentMode);
    // A call without an answer may leave the names out of the report. A death of the daemon must not.
    const named = job?.kind === 'fork' ? (job.report?.clones.length ?? 0) : 0;
    const isHeard = faults.every(({ kind }) => kind === 'killDaemon');
    if (job?.state === 'done' && isHeard && named !== CLONES) world.fail(`the report names ${named} clones`);
  }
  const { violation, eventCount, trace } = world;
  return { violation, state: job?.state ?? null, eventCount, trace };
}

/** Describes how to reproduce a failure: the scenario, and the last events of the run. */
export async function expectSoundFork(scenario: ForkScenario): Promise<ForkResult> {
  const result = await simulateFork(scenario);
  const { violation, state, trace } = result;
  if (violation === null) return result;
  throw new Error([`${violation} (job ${state})`, JSON.stringify(scenario), ...trace.slice(-80)].join('\n'));
}

function requestFor(parentMode: ParentMode): ForkRequest {
  return {
    ...{ vm: vmSpec.name, image: null, cloneCount: CLONES, namePrefix: null, parentMode },
    ...{ memory: 'cow', network: 'none', disks: 'overlay', isPartialAllowed: false },
  };
}

/**
 * Calls within one daemon. They may fail before or after they have taken effect, or be delayed. They die with the
 * daemon.
 */
async function called(world: ForkWorld, life: Life, name: string, work: () => Promise<unknown>): Promise<unknown> {
  await life.survive();
  world.event(`call ${name}`);
  await life.survive();
  const fault = world.callFault;
  world.callFault = null;
  if (fault?.kind === 'failCall') throw new MigrationError('TIMEOUT', `${name} was not begun`);
  if (fault?.kind === 'delayCall') await life.sleep(fault.ms);
  const answer = await work();
  world.event(`answer ${name}`);
  await life.survive();
  if (fault?.kind === 'failAnswer') throw new MigrationError('TIMEOUT', `the answer of ${name} was lost`);
  return answer;
}

/** Checks the invariants that hold when the daemon runs, all faults have ended and the job has ended. */
function checkAtRest(world: ForkWorld, state: JobState | null, parentMode: ParentMode): void {
  const { parent, clones, images, forks, killed, ended } = world;
  const fail = (what: string): void => world.fail(`at rest (${state}): ${what}`);
  if (parent.job !== null) fail('the parent is still reserved');
  if (parent.protectedFor !== null) fail('the parent is still write-protected');
  if (forks.size > 0) fail('a fork is left over');
  const waiting = [...clones.values()].filter(({ isAlive, hasRun }) => isAlive && !hasRun);
  if (waiting.length > 0) fail(`${waiting.map(({ name }) => name).join(', ')} never ran`);
  if (state === 'done') {
    if (clones.size !== CLONES) fail(`${clones.size} clones are there`);
    const deadCount = [...clones.values()].filter(({ isAlive, state: run }) => !isAlive || run !== 'running').length;
    if (deadCount > killed.clones + ended.clones) fail(`${deadCount} clones do not run`);
    if (images.size !== 1 || [...images.values()].some(({ pages }) => pages.includes(null))) fail('pages are missing');
    const wanted = parentMode === 'stop' ? 'paused' : 'running';
    if (!killed.parent && !ended.parent && parent.state !== wanted) fail(`the parent is ${parent.state}`);
    return;
  }
  if (state === 'lost') fail('lost, although its files are there');
  if (clones.size > 0) fail(`${clones.size} clones are left over`);
  if (images.size > 0) fail('an image is left over');
  if (!killed.parent && !ended.parent && parent.state !== 'running') fail('the parent does not run');
}

function sabotaged(host: HostPort, world: ForkWorld, sabotage: ForkSabotage | undefined): HostPort {
  const { source, forks } = host;
  const withForks = (change: Partial<ForkPort>): HostPort => ({ ...host, forks: { ...forks, ...change } });
  switch (sabotage) {
    case 'discardNothing':
      return withForks({ discardFork: () => Promise.resolve() });
    case 'forgetCommit':
      return withForks({
        commitFork: async (fork) => {
          world.event('commit, not written');
          const note = world.forks.get(fork);
          if (note !== undefined) note.isCommitted = true;
        },
      });
    case 'runBeforeCommit':
      return withForks({
        loadClones: async (fork) => {
          const reply = await forks.loadClones(fork);
          for (const clone of world.clones.values()) world.run(clone);
          return reply;
        },
      });
    case 'takeBack':
      return withForks({
        discardFork: async (fork) => {
          for (const { name } of [...world.clones.values()]) world.take(name);
          world.images.delete(fork);
          world.forks.delete(fork);
          world.parent.protectedFor = null;
          world.parent.state = 'running';
        },
      });
    case 'neverRun':
      return withForks({
        runClones: async () => ({
          ready: [...Array(CLONES).keys()].map((index) => ({ index, atMs: 1 })),
          failures: [],
        }),
        finishFork: async (fork) => {
          world.parent.protectedFor = null;
          world.forks.delete(fork);
        },
      });
    case 'completeTooSoon':
      return withForks({
        forkProgress: async (fork) => ({ ...(await forks.forkProgress(fork)), state: 'complete' }),
        finishFork: async (fork) => {
          world.parent.protectedFor = null;
          world.forks.delete(fork);
        },
      });
    case 'keepReserved':
      return { ...host, source: { ...source, unreserve: () => Promise.resolve() } };
    default:
      return host;
  }
}
