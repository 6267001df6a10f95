/**
 * Assembles the daemon of a host. This is the only file that knows all parts. It starts the state directory (locked),
 * certificates, data ports, VMs, sessions, jobs, and the API last, so that no request is answered before the host knows
 * its own state. The daemon closes the parts in reverse order. The QEMUs keep running.
 */
import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { readFile, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type Logger, pino } from 'pino';
import { groupId } from '../access/group.js';
import { localCaller } from '../access/local.js';
import { Tokens } from '../access/tokens.js';
import { LocalAgent } from '../agent/agent.js';
import { NOTHING_INJECTED, parseInjections } from '../agent/inject.js';
import { defaultMemoryDirectory, type MemoryDirectory } from '../agent/memory/default-directory.js';
import { tieHugePages } from '../agent/memory/huge-pages.js';
import { tieMemoryDirectory } from '../agent/memory/mark.js';
import { resizeOwnTmpfs } from '../agent/memory/own-tmpfs.js';
import type { MulticastConfig } from '../agent/vm/context.js';
import { protectDaemon } from '../agent/vm/oom-score.js';
import { raiseDaemonPriority } from '../agent/vm/priority.js';
import { VmManager } from '../agent/vm/vms.js';
import { VmEvents } from '../agent/vm-events.js';
import { RemoteAgents } from '../api/peers/client.js';
import { buildServer } from '../api/server.js';
import { QemuBackend } from '../backends/qemu/backend.js';
import { FileRegistry } from '../cluster/file.js';
import { OwnerMirror } from '../cluster/mirror.js';
import { type DaemonConfig, dataSocketPath } from '../config.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { SocketMark } from '../domain/host.js';
import { Reserve } from '../durable/reserve.js';
import { openStateDirectory } from '../durable/state-directory.js';
import { FORMAT_FILE, JOBS_LOG } from '../durable/state-format.js';
import type { Clock, Random } from '../engine/ports/clock.js';
import { JobsOfBothEnds } from '../jobs/both-ends.js';
import { JobManager } from '../jobs/jobs.js';
import { FileJournal } from '../jobs/journal.js';
import { openOwnDirectory } from '../kit/own-directory.js';
import { keepSpareDescriptor } from '../kit/spare-descriptor.js';
import { loadNativeBinding } from '../native/binding.js';
import { keepKnownHosts } from '../state/known-hosts.js';
import { TlsStore } from '../tls/store.js';
import { HostTransports, sharedPlaces } from '../transports/host/host-transports.js';
import { RdmaHost } from '../transports/rdma/host.js';
import { apiImages, apiPolicy, apiPool, apiVms, auditLog } from './api-services.js';

/** The path is the same from src/daemon and from dist/daemon. */
const PRELOAD = fileURLToPath(new URL('../../build/native/Release/libvmigrate-preload.so', import.meta.url));

const clock: Clock = {
  nowMs: () => performance.now(),
  isoNow: () => new Date().toISOString(),
  sleep: (ms, signal) =>
    new Promise((resolve) => {
      if (signal?.aborted === true) return resolve();
      const timer = setTimeout(done, ms);
      function done(): void {
        clearTimeout(timer);
        signal?.removeEventListener('abort', done);
        resolve();
      }
      signal?.addEventListener('abort', done, { once: true });
    }),
};

const random: Random = { hex: (bytes) => randomBytes(bytes).toString('hex') };

export function newLog(config: DaemonConfig): Logger {
  const destination = pino.destination(2);
  return pino(
    { level: config.logLevel, base: { host: config.name }, timestamp: pino.stdTimeFunctions.isoTime },
    destination,
  );
}

export interface Daemon {
  /** The actual ports of the https API, for a configuration with port 0. */
  readonly ports: readonly number[];
  close(): Promise<void>;
}

/** Resolves when the daemon answers requests. If a part cannot start, the started ones are closed again. */
export async function startDaemon(config: DaemonConfig, log: Logger, version: string): Promise<Daemon> {
  const closers: (() => Promise<void> | void)[] = [];
  const close = async (): Promise<void> => {
    for (const closer of closers.splice(0).reverse()) {
      try {
        await closer();
      } catch (error) {
        log.error({ err: toMigrationError(error) }, 'a part of the daemon cannot be closed');
      }
    }
  };
  try {
    return { ports: await start(config, log, { closers, version }), close };
  } catch (error) {
    await close();
    throw error;
  }
}

async function start(
  config: DaemonConfig,
  log: Logger,
  { closers, version }: { closers: (() => Promise<void> | void)[]; version: string },
): Promise<number[]> {
  raiseDaemonPriority();
  protectDaemon();
  keepSpareDescriptor();
  const startedAt = clock.isoNow();
  const { name: host, state: stateDir } = config;
  const inject = config.testFaults ? parseInjections(process.env.VMIGRATE_FAULT ?? '') : NOTHING_INJECTED;

  // What the user has named wrongly is refused before anything is made or changed.
  const tls = openTls(config, log);
  if (tls !== null) closers.push(() => tls.close());
  const ownState = await openOwnDirectory(stateDir, false);
  closers.push(() => ownState.close());
  const native = loadNativeBinding();
  const reserve = Reserve.of(stateDir);
  const state = await openStateDirectory(stateDir, (descriptor) => native.lockFile(descriptor));
  closers.push(() => state.giveBack());
  closers.push(() => reserve.close());
  // Only the holder of the directory may make the file.
  if (!(await reserve.restore())) log.warn({ stateDir }, 'the state directory is full: new VMs and moves are refused');
  const { path: ramDir, memoryId, problem: ramDirProblem } = await openMemoryDirectory(config, state.id, log);
  const mirror = await OwnerMirror.open(ramDir, (error) =>
    log.warn({ err: error, ramDir }, 'the second copy of the owner records, in the memory directory, is not kept'),
  );
  const registry = await FileRegistry.open(stateDir, mirror);
  closers.push(() => registry.close());
  if (registry.restored.length > 0)
    log.warn({ vms: registry.restored }, 'owner records were older than those in the memory directory: put right');
  const { journal } = await FileJournal.open(join(stateDir, JOBS_LOG));
  closers.push(() => journal.close());

  const tokens = await Tokens.open(stateDir, (err) => log.error({ err }, 'a token cannot be read, and is worthless'));
  const { socketGroup } = config.security;
  const socketGroupId = socketGroup === undefined ? undefined : await groupId(socketGroup);

  const audit = auditLog(config, log);

  const socketPath = dataSocketPath(stateDir);
  await rm(socketPath, { force: true }); // The directory is ours alone, so the socket is an earlier daemon's.
  const listener = native.openDataListener({ listen: sharedPlaces(config.data, socketPath) });
  closers.push(() => listener.close());
  const { address: rdmaAddress, ...rdmaTimeouts } = config.rdma;
  const rdma = new RdmaHost({
    native,
    dataAddress: config.data.address,
    config: {
      ...rdmaTimeouts,
      address: rdmaAddress?.address ?? null,
      port: rdmaAddress?.port ?? config.data.port,
    },
    log: log.child({ part: 'rdma' }),
  });
  closers.push(() => rdma.close());
  const transports = new HostTransports({ host, listener, devices: { rdma }, policy: config.security });

  const preloadPath = config.preload === undefined ? defaultPreload(log) : config.preload;
  const { accel } = config;
  const backend = new QemuBackend(config.qemu);
  backend.installed().catch((error: unknown) => {
    const { message, remedy } = toMigrationError(error);
    log.warn({ qemu: config.qemu, remedy }, `this host cannot run VMs: ${message}`);
  });
  if (!backend.isOutputBounded) log.warn('the program vmigrate-launcher is missing: the logs of VMs have no limit');
  const { qemuUser } = config.security;
  const qemuUsers = qemuUser === 'root' ? null : qemuUser;
  if (qemuUsers === null) log.warn('QEMU runs with the rights of the daemon (security.qemuUser: root)');
  const vms = new VmManager({
    ...{ host, stateDir, ramDir, memoryId, accel, preloadPath, native, registry, backend },
    qemuUsers,
    memory: withoutUndefined({
      ...{ budgetBytes: config.memory.budget, overcommit: config.memory.overcommit },
      ...{ cloneBudgetBytes: config.clones.budget, cloneOvercommit: config.clones.overcommit },
    }),
    log: log.child({ part: 'vms' }),
  });
  closers.push(() => vms.close());

  const peers = new RemoteAgents({ self: host, local: () => agent, peers: config.peers, store: tls });
  closers.push(() => peers.close());
  const agent = new LocalAgent({
    ...{ host, vms, native, transports, rdma, registry, peers, stateDir, clock, inject },
    dataAddress: config.data.address,
    multicast: multicastOf(config),
    policy: config.security.allow,
    signer: tls,
    hosts: peers,
    log: log.child({ part: 'agent' }),
    hostInfo: {
      dataPolicy: config.security,
      ...(qemuUsers === null ? {} : { containmentProblem: () => backend.containmentProblem(qemuUsers.from) }),
      ...{ preloadPath, ramDirProblem, certificateExpiresAt: () => tls?.expiresAt ?? null },
      socketMark: await markOf(join(stateDir, FORMAT_FILE)),
    },
    otherHosts: peers,
    jobs: () => jobs,
    imageBudgetBytes: config.images.budgetBytes ?? null,
    pool: withoutUndefined(config.pool),
    recoveryMsMax: config.limits.recoveryMsMax,
  });
  const jobs = new JobManager({
    ...{ host, registry, journal, clock, random, inject },
    agent: (name) => peers.agent(name),
    log: log.child({ part: 'jobs' }),
    limits: withoutUndefined(config.limits),
    topologyPath: config.topology ?? null,
  });
  const vmEvents = new VmEvents({
    ...{ host, clock, vms, life: random.hex(4) },
    onFailure: (error) => log.warn({ err: toMigrationError(error) }, 'a reader of events failed'),
  });
  await vms.start();
  await agent.start();
  closers.push(() => agent.close());
  const jobsOfBothEnds = new JobsOfBothEnds(jobs, agent.target.incoming);
  const server = buildServer({
    ...{ host, startedAt, agent, peers, tls, vmEvents },
    jobs: jobsOfBothEnds,
    version,
    vms: apiVms(vms, agent),
    images: apiImages(agent),
    pool: apiPool(agent),
    tokens,
    localCaller: (socket) => localCaller(socket, (fd) => native.peerUser(fd), config.security.socketRole),
    policy: apiPolicy(config, backend.diskFiles),
    audit,
    log: log.child({ part: 'api' }),
  });

  await keepKnownHosts(stateDir, { name: host, peers: config.peers, tls: config.tls ?? null }).catch((error: unknown) =>
    log.warn({ err: toMigrationError(error) }, 'the list of the other hosts, for "vmctl state repair", is not kept'),
  );
  // Resumed jobs call other hosts, and those call back. So the API must answer meanwhile.
  closers.push(() => jobs.close());
  closers.push(() => server.close());
  await jobs.start();
  vmEvents.begin({ jobs: jobsOfBothEnds, arrivalOf: (vm) => agent.target.arrivalOf(vm) });
  const ports: number[] = [];
  for (const api of config.api) {
    if (api.kind === 'unix') await server.listenUnix(api.path, socketGroupId);
    else if (tls !== null) ports.push(await server.listenTls(api.address, api.port, tls));
  }
  return ports;
}

/** Chooses the directory of the guests' memory, and ties it to the state directory, which is locked by now. */
async function openMemoryDirectory(
  config: DaemonConfig,
  stateId: string,
  log: Logger,
): Promise<MemoryDirectory & { readonly memoryId: string }> {
  const { name: host, state: stateDir, memory, clones } = config;
  const bootId = (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
  const sizes = { budgetBytes: memory.budget, cloneBudgetBytes: clones.budget };
  const directory =
    config.ramDir === undefined
      ? await defaultMemoryDirectory({ host, stateDir, bootId, sizes })
      : { path: config.ramDir, problem: null };
  const own = await openOwnDirectory(directory.path, true);
  try {
    const memoryId = await tieMemoryDirectory({ stateDir, stateId, ramDir: directory.path, bootId });
    await tieHugePages({ host, stateDir, memoryId }, log);
    const isDefault = config.ramDir === undefined;
    const problem = directory.problem ?? (isDefault ? await resizeOwnTmpfs(directory.path, sizes) : null);
    if (problem !== null) log.warn({ directory: directory.path }, problem);
    return { ...directory, problem, memoryId };
  } finally {
    await own.close();
  }
}

/** A file of the state directory that is never replaced while its daemon runs. */
async function markOf(path: string): Promise<SocketMark> {
  const { dev, ino } = await stat(path, { bigint: true });
  return { path, inode: `${dev}:${ino}` };
}

function openTls(config: DaemonConfig, log: Logger): TlsStore | null {
  if (config.tls === undefined) return null;
  const store = new TlsStore(config.tls, (error) =>
    log.error({ err: error }, 'the changed certificate folder cannot be loaded'),
  );
  const { role, name } = store.identity;
  if (role === 'host' && name === config.name) return store;
  store.close();
  throw new MigrationError(
    'SPEC_INVALID',
    `${config.tls} holds the certificate of ${role} ${name}, not of host ${config.name}`,
    {
      remedy: `vmctl certs host ${config.name} --address IP --dir CA_DIR --out DIR`,
    },
  );
}

function defaultPreload(log: Logger): string | null {
  if (existsSync(PRELOAD)) return PRELOAD;
  log.warn({ path: PRELOAD }, 'the preload library is missing: VMs are started without it');
  return null;
}

/** Removes keys with the value `undefined`, which would otherwise replace the defaults. */
function multicastOf({ multicast }: DaemonConfig): MulticastConfig {
  const { bandwidth, ...place } = multicast;
  return { ...place, bandwidthBytesPerS: bandwidth };
}

function withoutUndefined<T extends object>(value: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(value).filter(([, member]) => member !== undefined)) as {
    [K in keyof T]: Exclude<T[K], undefined>;
  };
}
