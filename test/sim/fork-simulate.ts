import { FileRegistry } from '../../src/cluster/file.js';
import type { FanoutChoice, TopologyFile } from '../../src/domain/fanout.js';
import type { ForkReport, ForkRequest, HostWish, ParentMode } from '../../src/domain/fork.js';
import type { ForkJobView, JobState } from '../../src/domain/job.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { InventoryPort } from '../../src/engine/ports/inventory.js';
import type { SourcePort } from '../../src/engine/ports/source.js';
import { JobManager } from '../../src/jobs/jobs.js';
import { FileJournal } from '../../src/jobs/journal.js';
import { unreachableHost } from '../../src/jobs/unreachable-host.js';
import { host as inventoryOf, NO_RDMA } from '../unit/planner/planner-facts.js';
import { diskHooks, jobWatch, runToRest, worldPorts } from './coordinator.js';
import { SimForkAgent } from './fork-agent.js';
import { checkAtRest } from './fork-oracle.js';
import { type ForkSabotage, ofAgent, sabotaged } from './fork-sabotage.js';
import { CLONES, EARLIER_IMAGE, type ForkFault, type ForkHost, ForkWorld, PAGES, ROOT } from './fork-world.js';
import { remoteHost } from './network.js';
import { vmSpec } from './spec.js';
import { SimStore } from './store.js';
import { Life } from './time.js';

export interface ForkScenario {
  readonly seed: number;
  readonly faults: readonly ForkFault[];
  readonly parentMode?: ParentMode;
  /** Where the clones run. Absent: on the root alone, and the request names no host. */
  readonly wishes?: readonly HostWish[];
  readonly isPartial?: boolean;
  /** The fork is one of an image that is there. */
  readonly isOfImage?: boolean;
  /** Absent: each host reads from the root. */
  readonly fanout?: FanoutChoice;
  readonly topology?: TopologyFile;
  readonly sabotage?: ForkSabotage;
}

export interface ForkResult {
  readonly violation: string | null;
  /** Null: the request was refused, or the daemon died before the job was durable. */
  readonly state: JobState | null;
  /** How many clones the report names as failures. */
  readonly failureCount: number;
  readonly eventCount: number;
  readonly report: ForkReport | null;
  readonly trace: readonly string[];
}

interface Coordinator {
  readonly jobs: JobManager;
  readonly journal: FileJournal;
}

export async function simulateFork(scenario: ForkScenario): Promise<ForkResult> {
  const { seed, faults, parentMode = 'continue', wishes, isPartial = false, isOfImage = false, sabotage } = scenario;
  const joined = (wishes ?? []).map(({ host }) => host).filter((host) => host !== ROOT);
  const world = new ForkWorld(seed, faults, [ROOT, ...joined]);
  world.isPartial = isPartial;
  world.fanout.sabotage = sabotage ?? null;
  let coordinator: Coordinator | null = null;

  const boot = async (host: ForkHost): Promise<void> => {
    const life = new Life(world.time);
    host.life = life;
    const find = (name: string) => () => {
      const { life: current, agent } = world.host(name);
      return current === null || agent === null ? null : { life: current, agent };
    };
    const calls = (name: string): HostPort => remoteHost(world, host.name, life, { host: name, find: find(name) });
    const agent = new SimForkAgent({ world, host, life, peer: calls, sabotage: ofAgent(sabotage) });
    await agent.start();
    host.agent = { ...unreachableHost(host.name, null), ...portsOf(host, agent) };
    if (host !== world.root) return;
    const hooks = diskHooks(world, () => host.isDiskFull);
    const registry = await FileRegistry.on(new SimStore(world.owners, life, hooks));
    if (sabotage === 'loseJournal') world.journal.bytes = Buffer.alloc(0);
    const { journal } = await FileJournal.on(new SimStore(world.journal, life, hooks));
    const jobs = new JobManager({
      ...{ host: host.name, registry, journal },
      agent: (name) => sabotaged(calls(name), world, sabotage),
      ...worldPorts(world, life),
    });
    coordinator = { jobs, journal };
    await jobs.start();
  };

  world.onRestart = (host) => {
    world.trace.push(`  ${host.name} restarts`);
    boot(host).catch((error: unknown) => world.fail(`${host.name} does not start again: ${String(error)}`));
  };
  world.onCancel = () => {
    const job = coordinator?.jobs.list()[0];
    if (job !== undefined) void coordinator?.jobs.cancel(job.id).catch(() => undefined);
  };

  if (isOfImage) {
    world.points.set(EARLIER_IMAGE, Array(PAGES).fill(1));
    world.root.images.set(EARLIER_IMAGE, { pages: Array(PAGES).fill(1), hasState: true });
  }
  for (const host of world.hosts.values()) await boot(host);
  const first = world.root.life;
  let isAnswered = false;
  coordinator!.jobs
    .submitFork(requestFor(scenario))
    .catch((error: unknown) => world.trace.push(`  refused: ${String(error)} ${JSON.stringify(error)}`))
    .finally(() => {
      isAnswered = true;
    });

  const isRested = jobWatch();
  const hasRested = await runToRest(world, () => {
    const areUp = [...world.hosts.values()].every(({ life, agent }) => life !== null && agent !== null);
    if (!world.isCalm || !areUp || coordinator === null) return false;
    return isRested(coordinator.jobs, coordinator.journal) ?? (isAnswered || world.root.life !== first);
  });
  const job = ((coordinator as Coordinator | null)?.jobs.list()[0] ?? null) as ForkJobView | null;
  if (!hasRested) world.fail(`the job did not come to rest: ${JSON.stringify(job)}`);
  else if (world.violation === null) {
    const parentState = parentMode === 'stop' && !isOfImage ? 'paused' : 'running';
    checkAtRest({ world, job, parentState, hosts: [ROOT, ...joined] });
  }
  const { violation, eventCount, trace } = world;
  return {
    ...{ violation, eventCount, trace, report: job?.report ?? null },
    state: job?.state ?? null,
    failureCount: job?.report?.failures.length ?? 0,
  };
}

/** Describes how to reproduce a failure: the scenario, and the last events of the run. */
export async function expectSoundFork(scenario: ForkScenario): Promise<ForkResult> {
  const result = await simulateFork(scenario);
  const { violation, state, trace } = result;
  if (violation === null) return result;
  throw new Error([`${violation} (job ${state})`, JSON.stringify(scenario), ...trace.slice(-100)].join('\n'));
}

function requestFor(scenario: ForkScenario): ForkRequest {
  const { parentMode = 'continue', wishes, isPartial, isOfImage, fanout, topology } = scenario;
  return {
    ...(isOfImage === true ? { vm: null, image: EARLIER_IMAGE } : { vm: vmSpec.name, image: null }),
    ...{ cloneCount: CLONES, namePrefix: null, parentMode },
    ...{ memory: 'cow', network: 'none', disks: 'overlay', isPartialAllowed: isPartial === true },
    ...(wishes === undefined ? {} : { hosts: wishes }),
    ...(fanout === undefined ? {} : { fanout }),
    ...(topology === undefined ? {} : { topology }),
  };
}

function portsOf({ name }: ForkHost, agent: SimForkAgent): Pick<HostPort, 'forks' | 'source' | 'inventory' | 'fanout'> {
  const inventory: Partial<InventoryPort> = {
    inventory: async () => ({ ...inventoryOf(name), qemuVersion: '7.2.22', rdma: NO_RDMA, clockMs: 0 }),
    checkTarget: async () => ({ disks: [], files: [], rdma: { isReached: false } }),
  };
  const { port: fanout } = agent.fanout;
  return { forks: agent, fanout, source: agent as unknown as SourcePort, inventory: inventory as InventoryPort };
}
