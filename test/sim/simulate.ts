import { FileRegistry } from '../../src/cluster/file.js';
import { OwnerMirror } from '../../src/cluster/mirror.js';
import type { JobState, JobView } from '../../src/domain/job.js';
import { type MigrationMode, MODE_TRAITS } from '../../src/domain/migration.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { Registry } from '../../src/engine/ports/registry.js';
import type { TargetPort } from '../../src/engine/ports/target.js';
import { JobManager } from '../../src/jobs/jobs.js';
import { FileJournal } from '../../src/jobs/journal.js';
import { SimAgent } from './agent.js';
import { diskHooks, jobWatch, runToRest, worldPorts } from './coordinator.js';
import { remoteHost } from './network.js';
import { INCARNATION, startedVm, vmSpec } from './spec.js';
import { SimStore } from './store.js';
import { Life } from './time.js';
import { type Fault, type HostState, World } from './world.js';

/** Orders of steps that are broken on purpose, one for each kind of violation that the oracle detects. */
export type Sabotage =
  | 'resumeBeforeCommit'
  | 'continueAfterCommit'
  | 'completeTooSoon'
  | 'discardNothing'
  | 'loseJournal'
  | 'keepWritten';

export interface Scenario {
  readonly seed: number;
  readonly faults: readonly Fault[];
  readonly mode?: MigrationMode;
  readonly sabotage?: Sabotage;
}

export interface Result {
  readonly violation: string | null;
  /** Null: the request was refused, or the daemon died before the job was durable. */
  readonly state: JobState | null;
  /** Whether the job needed recovery at any time. */
  readonly hasNeededRecovery: boolean;
  readonly eventCount: number;
  /** The events at which the owner records of a host were other ones than before. */
  readonly ownersChangedAt: { readonly A: readonly number[]; readonly B: readonly number[] };
  readonly trace: readonly string[];
}

interface Daemon {
  readonly life: Life;
  readonly agent: SimAgent;
  readonly jobs: JobManager | null;
  readonly journal: FileJournal | null;
}

export async function simulate({ seed, faults, mode = 'postcopy', sabotage }: Scenario): Promise<Result> {
  const world = new World(seed, faults);
  const daemons: { A: Daemon | null; B: Daemon | null } = { A: null, B: null };
  const { A, B } = world.hosts;
  let hasNeededRecovery = false;

  const boot = async (host: 'A' | 'B'): Promise<void> => {
    const state = world.hosts[host];
    const other = host === 'A' ? 'B' : 'A';
    const life = new Life(world.time);
    state.life = life;
    const hooks = diskHooks(world, () => state.isDiskFull);
    const registry = await registryOf(world, state, life);
    // Whether a session has run its VM, its host knows by the owner record alone.
    for (const noted of state.sessions.values())
      noted.hasRun = (await registry.owner(noted.vm))?.session === noted.session;
    const peer = (): SimAgent | null =>
      world.isNetworkUp && world.hosts[other].life ? (daemons[other]?.agent ?? null) : null;
    const agent = new SimAgent({ world, state, life, registry }, peer);
    if (host === 'B') {
      daemons.B = { life, agent, jobs: null, journal: null };
      return;
    }
    const find = (name: 'A' | 'B') => (): { agent: HostPort; life: Life } | null =>
      world.hosts[name].life === null ? null : daemons[name];
    if (sabotage === 'loseJournal') state.journal.bytes = Buffer.alloc(0);
    const { journal } = await FileJournal.on(new SimStore(state.journal, life, hooks));
    const agents: Record<string, HostPort> = {
      A: remoteHost(world, 'A', life, { host: 'A', find: find('A') }),
      B: remoteHost(world, 'A', life, { host: 'B', find: find('B') }),
    };
    const jobs = new JobManager({
      host: 'A',
      agent: (name) => sabotaged(agents[name]!, world, sabotage),
      registry: sabotage === 'resumeBeforeCommit' ? resumeFirst(registry, agents.B!) : registry,
      journal,
      ...worldPorts(world, life),
    });
    daemons.A = { life, agent, jobs, journal };
    jobs.subscribe('*', ({ state: jobState }) => {
      hasNeededRecovery ||= jobState === 'needsRecovery';
    });
    await jobs.start();
  };

  const restart = (host: 'A' | 'B'): void => {
    world.trace.push(`  ${host} restarts`);
    boot(host).catch((error: unknown) => world.fail(`${host} does not start again: ${String(error)}`));
  };
  world.onRestart = restart;
  world.onCancel = () => {
    const { jobs } = daemons.A ?? {};
    const job = jobs?.list()[0];
    if (job !== undefined) void jobs?.cancel(job.id).catch(() => undefined);
  };

  A.vms.set(vmSpec.name, startedVm());
  await giveToSource(world);
  world.ownersBackup = A.owners.bytes;
  await boot('B');
  await boot('A');
  const first = daemons.A?.life;

  const request = {
    vm: vmSpec.name,
    target: 'B',
    mode,
    transport: 'tcp',
    bandwidthBytesPerS: 0,
    downtimeMsMax: 300,
    // Half of the seeds. A verified move would see some sabotage before the oracle does.
    ...(MODE_TRAITS[mode].mover === 'pager' && seed % 2 === 1 && sabotage === undefined ? { verifyMemory: true } : {}),
  } as const;
  let isAnswered = false;
  daemons
    .A!.jobs!.submit(request)
    .catch((error: unknown) => world.trace.push(`  refused: ${String(error)}`))
    .finally(() => {
      isAnswered = true;
    });

  const isRested = jobWatch();
  const hasRested = await runToRest(world, () => {
    const daemon = daemons.A;
    if (!world.isCalm || A.life === null || B.life === null || daemon?.life !== A.life || daemon.jobs === null)
      return false;
    return isRested(daemon.jobs, daemon.journal!) ?? (isAnswered || daemon.life !== first);
  });
  const job = daemons.A?.jobs?.list()[0] ?? null;
  if (!hasRested) world.fail(`the job did not come to rest: ${JSON.stringify(job)}`);
  else if (world.violation === null) checkAtRest(world, daemons, job);
  return {
    violation: world.violation?.message ?? null,
    state: job?.state ?? null,
    hasNeededRecovery,
    eventCount: world.eventCount,
    ownersChangedAt: world.ownersChangedAt,
    trace: world.trace,
  };
}

async function registryOf(world: World, state: HostState, life: Life): Promise<FileRegistry> {
  const hooks = diskHooks(world, () => state.isDiskFull);
  const inMemory = diskHooks(world, () => false);
  const mirrorOf = async () => new SimStore(state.mirror, life, inMemory);
  const mirror = await OwnerMirror.on(mirrorOf, () => undefined);
  return FileRegistry.on(new SimStore(state.owners, life, hooks), mirror);
}

/** The owner record that the start of the VM has written. */
async function giveToSource({ hosts, time }: World): Promise<void> {
  const hooks = { isFull: () => false, event: () => undefined, chance: () => 0 };
  const life = new Life(time);
  const mirror = await OwnerMirror.on(
    async () => new SimStore(hosts.A.mirror, life, hooks),
    () => undefined,
  );
  const registry = await FileRegistry.on(new SimStore(hosts.A.owners, life, hooks), mirror);
  let isDone = false;
  void registry
    .swapOwner(vmSpec.name, null, { vm: vmSpec.name, owner: 'A', epoch: 1, session: null, incarnation: INCARNATION })
    .then(() => {
      isDone = true;
    });
  await time.run(() => isDone, 1);
}

/** Checks the invariants that hold when all daemons run, all faults have ended and the job has ended. */
function checkAtRest(world: World, { A, B }: { A: Daemon | null; B: Daemon | null }, job: JobView | null): void {
  const state = job?.state ?? null;
  const verified = job?.kind === 'migrate' ? job.report?.verified : undefined;
  const source = world.hosts.A.vms.get(vmSpec.name);
  const target = world.hosts.B.vms.get(vmSpec.name);
  const runs = (record: typeof source): boolean => record?.qemu?.isAlive === true && record.qemu.state === 'running';
  const { isCommitted, killed, guestEndedOn } = world;
  const fail = (what: string): void => world.fail(`at rest (${state}): ${what}`);
  if (state === 'lost') {
    if (!(isCommitted || world.areOwnersLost) || !killed.target)
      fail('lost, although nothing was killed that the VM needs');
    if (runs(source) || runs(target)) fail('lost, but it runs');
    if (world.hosts.B.sessions.size > 0) fail('the session of a lost VM is left over on the target');
    return;
  }
  if ((state === 'done') !== isCommitted && !world.areOwnersLost)
    fail(`the registry says ${isCommitted ? 'moved' : 'not moved'}`);
  if (state === 'done') {
    const isNeeded = guestEndedOn !== 'target';
    if (isNeeded && !runs(target) && !killed.target) fail('the VM does not run on the target');
    if (isNeeded && target?.memory?.pages.includes(null) !== false) fail('pages are missing on the target');
    if (source !== undefined) fail('the VM is left over on the source');
    if (isNeeded && !killed.target && verified?.isComplete === false)
      fail(`the memory is not verified: ${verified.reason}`);
    if (target !== undefined && target.job !== null) fail('the VM is still reserved on the target');
  } else {
    if (!runs(source) && !killed.source && guestEndedOn !== 'source') fail('the VM does not run on the source');
    if (target !== undefined) fail('the VM is left over on the target');
    if (source !== undefined && source.job !== null) fail('the VM is still reserved on the source');
  }
  if (world.hosts.B.sessions.size > 0) fail('a session is left over on the target');
  if ((A?.agent.source.exposureCount ?? 0) > 0 || (B?.agent.source.exposureCount ?? 0) > 0)
    fail('memory is still exposed');
}

function resumeFirst(registry: Registry, { target }: HostPort): Registry {
  return {
    owner: (vm) => registry.owner(vm),
    announceMove: (vm, epoch, session) => registry.announceMove(vm, epoch, session),
    removeOwner: (vm, epoch) => registry.removeOwner(vm, epoch),
    lastEpoch: (vm) => registry.lastEpoch(vm),
    swapOwner: async (vm, epoch, next) => {
      await target.resume(next.session ?? '', next.epoch);
      await registry.swapOwner(vm, epoch, next);
    },
  };
}

function sabotaged(host: HostPort, world: World, sabotage: Sabotage | undefined): HostPort {
  const { target } = host;
  switch (sabotage) {
    case 'continueAfterCommit': {
      const resume: TargetPort['resume'] = async (session, epoch) => {
        const qemu = world.hosts.A.vms.get(vmSpec.name)?.qemu;
        if (qemu) qemu.state = 'running';
        return target.resume(session, epoch);
      };
      return { ...host, target: { ...target, resume } };
    }
    case 'completeTooSoon': {
      const progress: TargetPort['progress'] = async (session) => ({
        ...(await target.progress(session)),
        state: 'complete',
      });
      return { ...host, target: { ...target, progress, finish: () => Promise.resolve() } };
    }
    case 'keepWritten': {
      // The target believes that every round told of nothing.
      const noteDirty: HostPort['source']['noteDirty'] = async (vm, session) => {
        world.isTakeBackBroken = true;
        return host.source.noteDirty(vm, session);
      };
      return { ...host, source: { ...host.source, noteDirty } };
    }
    case 'discardNothing':
      return { ...host, target: { ...target, discard: () => Promise.resolve() } };
    default:
      return host;
  }
}
