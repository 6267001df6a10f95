/** Implementations of the API's ports in memory, so that the API can be tested without QEMU. */
import type { Socket } from 'node:net';
import { PassThrough, Readable } from 'node:stream';
import { stopEach } from '../../src/agent/host-images.js';
import type { ApiAgent, ApiImages, ApiPool, ApiServices, ApiTokens, AuditEntry } from '../../src/api/contract/ports.js';
import { hostOfCalls } from '../../src/api/peers/methods.js';
import type { Caller } from '../../src/domain/caller.js';
import { MigrationError } from '../../src/domain/errors.js';
import type { ForkRequest, WarmRequest, WarmSetView } from '../../src/domain/fork.js';
import type { FlattenReport, ImageRemoval, ImageView, KeptLayer, PruneReport } from '../../src/domain/image.js';
import type { ForkJobView, JobView, MigrationJobView } from '../../src/domain/job.js';
import type { MigrationOrder } from '../../src/domain/migration.js';
import { forbiddenIn, NOTHING_ALLOWED, refuseForbidden } from '../../src/domain/policy.js';
import type { Refusal } from '../../src/domain/refusal.js';
import type { TokenView } from '../../src/domain/token.js';
import type { VmView } from '../../src/domain/vm.js';
import type { VmEvent } from '../../src/domain/vm-event.js';

import { forkJobView, imageView, jobView, vmView } from './api-views.js';

export * from './api-views.js';

/** Images that a test adds. Files are kept in memory, not written. */
export class FakeImages implements ApiImages {
  readonly views = new Map<string, ImageView>();
  readonly files = new Map<string, string>();

  list(): ImageView[] {
    return [...this.views.values()];
  }

  find(id: string): ImageView {
    const view = this.views.get(id);
    if (view === undefined) throw new MigrationError('NOT_FOUND', `no image ${id}`);
    return view;
  }

  readonly removals: { id: string; options: object }[] = [];
  keptLayers: KeptLayer[] = [];

  async remove(id: string, options: { isForced: boolean; isDroppingSaved: boolean }): Promise<ImageRemoval> {
    const { allocatedBytes, clones } = this.find(id);
    if (clones.length > 0) throw new MigrationError('CONFLICT', 'clones run on it');
    this.removals.push({ id, options });
    this.views.delete(id);
    return { id, freedBytes: allocatedBytes, mergedDisks: [], keptLayers: this.keptLayers };
  }

  async prune({ isDryRun }: { isDryRun: boolean }): Promise<PruneReport> {
    const idle = this.list().filter(({ clones }) => clones.length === 0);
    const kept = this.list().filter(({ clones }) => clones.length > 0);
    const removed = idle.map(({ id, allocatedBytes: freedBytes }) => ({
      id,
      freedBytes,
      mergedDisks: [],
      keptLayers: [],
    }));
    if (!isDryRun) for (const { id } of idle) this.views.delete(id);
    const freedBytes = removed.reduce((sum, image) => sum + image.freedBytes, 0);
    return { removed, kept: kept.map(({ id }) => ({ id, reason: 'it has clones' })), freedBytes };
  }

  async flatten(vm: string): Promise<FlattenReport> {
    return { vm, mergedDisks: ['/srv/web.qcow2.0011223344556677'], keptLayers: this.keptLayers };
  }

  readonly saves: object[] = [];
  readonly loads: object[] = [];

  async save(id: string, path: string, options: { withDisks: boolean }): Promise<{ fileBytes: number }> {
    this.saves.push(options);
    this.files.set(path, this.find(id).id);
    return { fileBytes: 4096 };
  }

  async load(path: string, options: { isAssumed: boolean }): Promise<ImageView> {
    this.loads.push(options);
    const id = this.files.get(path);
    if (id === undefined) throw new MigrationError('NOT_FOUND', `no file ${path}`);
    this.views.set(id, imageView(id));
    return this.find(id);
  }
}

export class FakePool implements ApiPool {
  readonly requests: WarmRequest[] = [];
  readonly sets: WarmSetView[] = [];

  list(): WarmSetView[] {
    return this.sets;
  }

  async warm(request: WarmRequest): Promise<WarmSetView> {
    this.requests.push(request);
    const { parentMode: _, ...shape } = request;
    const set: WarmSetView = { image: '0'.repeat(16), ...shape, state: 'ready', readyCount: request.cloneCount };
    this.sets.push(set);
    return set;
  }

  async drain(vm: string | null): Promise<{ endedCount: number }> {
    const ended = this.sets.filter((set) => vm === null || set.vm === vm);
    for (const set of ended) this.sets.splice(this.sets.indexOf(set), 1);
    return { endedCount: ended.reduce((sum, { readyCount }) => sum + readyCount, 0) };
  }
}

/** Jobs whose state a test sets. */
export class FakeJobs {
  readonly views = new Map<string, JobView>();
  readonly requests: MigrationOrder[] = [];
  readonly forkRequests: ForkRequest[] = [];
  readonly listeners = new Set<{ id: string; listener: (view: JobView) => void }>();
  refusals: Refusal[] = [];
  private count = 0;

  change(id: string, change: Partial<MigrationJobView> | Partial<ForkJobView>): void {
    const view = { ...this.get(id), ...change } as JobView;
    this.views.set(id, view);
    for (const { id: wanted, listener } of this.listeners) if (wanted === '*' || wanted === id) listener(view);
  }

  dryRun(request: MigrationOrder) {
    this.requests.push(request);
    return Promise.resolve({ plan: null, refusals: this.refusals });
  }

  submit(request: MigrationOrder): Promise<JobView> {
    this.requests.push(request);
    if (this.refusals.length > 0)
      return Promise.reject(new MigrationError('PREFLIGHT_REFUSED', 'refused', { details: this.refusals }));
    const view = jobView(`job-${++this.count}`, { vm: request.vm, target: request.target });
    this.views.set(view.id, view);
    return Promise.resolve(view);
  }

  dryRunFork(request: ForkRequest) {
    this.forkRequests.push(request);
    return Promise.resolve({ plan: null, refusals: this.refusals });
  }

  submitFork(request: ForkRequest): Promise<JobView> {
    this.forkRequests.push(request);
    if (this.refusals.length > 0)
      return Promise.reject(new MigrationError('PREFLIGHT_REFUSED', 'refused', { details: this.refusals }));
    const view = forkJobView(`job-${++this.count}`, { vm: request.vm ?? 'web', cloneCount: request.cloneCount });
    this.views.set(view.id, view);
    return Promise.resolve(view);
  }

  get(id: string): JobView {
    const view = this.views.get(id);
    if (view === undefined) throw new MigrationError('NOT_FOUND', `no job ${id}`);
    return view;
  }

  list(): JobView[] {
    return [...this.views.values()];
  }

  cancel(id: string): Promise<JobView> {
    this.change(id, { state: 'cancelled', step: null });
    return Promise.resolve(this.get(id));
  }

  recover(id: string): Promise<JobView> {
    this.change(id, { state: 'recovering' });
    return Promise.resolve(this.get(id));
  }

  subscribe(id: string, listener: (view: JobView) => void): () => void {
    const entry = { id, listener };
    this.listeners.add(entry);
    return () => this.listeners.delete(entry);
  }
}

export interface FakeServices extends Omit<ApiServices, 'tokens'> {
  readonly jobs: FakeJobs;
  readonly images: FakeImages;
  readonly pool: FakePool;
  /** Calls that reached the agent: method and arguments. */
  readonly calls: { method: string; args: unknown[] }[];
  /** Answers of agent methods other than null. */
  readonly answers: Map<string, () => unknown>;
  /** Device states received, by session. */
  readonly states: Map<string, Buffer>;
  readonly consoles: Map<string, PassThrough>;
  /** The guest powers off; `log` is the output of its serial line. */
  readonly ends: (vm: string, log: string, exitCode?: number, image?: string) => void;
  /** The guest reports its exit code and keeps running; `log` is the output of its serial line. */
  readonly saysCode: (vm: string, log: string, exitCode: number) => void;
  readonly happens: (event: VmEvent) => void;
  readonly logged: { level: string; message: string }[];
  readonly audited: AuditEntry[];
  /** As whom requests on the unix socket are made. */
  localCaller: (socket: Socket) => Caller;
  readonly tokens: FakeTokens;
  /** What ties other hosts to this one. Nothing is known of what is not in it. */
  readonly ties: {
    readonly sources: Map<string, string>;
    readonly roots: Map<string, string>;
    readonly joined: Map<string, readonly string[]>;
    readonly images: Map<string, readonly string[]>;
  };
}

/** The tokens of the daemon, in memory. Each is "token-NAME". */
export class FakeTokens implements ApiTokens {
  readonly views: TokenView[] = [];

  get isAnyValid(): boolean {
    return this.views.length > 0;
  }

  list(): TokenView[] {
    return this.views;
  }

  async create({ name, role, createdBy }: Parameters<ApiTokens['create']>[0]) {
    const at = '2030-01-01T00:00:00.000Z';
    const view = { id: '0123456789ab', name, role, createdBy, createdAt: at, expiresAt: at };
    this.views.push(view);
    return { ...view, token: `token-${name}` };
  }

  async revoke(name: string): Promise<TokenView[]> {
    const hit = this.views.filter((view) => view.name === name);
    for (const view of hit) this.views.splice(this.views.indexOf(view), 1);
    for (const listener of this.listeners) listener();
    return hit;
  }

  readonly listeners = new Set<() => void>();

  onRevoked(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => void this.listeners.delete(listener);
  }

  holderOf(token: string): TokenView | null {
    return this.views.find(({ name }) => token === `token-${name}`) ?? null;
  }
}

/** The answers of host B, unless a test gives others. */
const HAS_NOTHING: { readonly [call: string]: () => unknown } = {
  vmViews: () => ({ vms: [] }),
  imageViews: () => ({ images: [] }),
  imageClones: () => ({ clones: [] }),
  stopClones: () => ({ stopped: [], failures: [] }),
};

export function fakeServices(change: Partial<ApiServices> = {}): FakeServices {
  const calls: FakeServices['calls'] = [];
  const answers: FakeServices['answers'] = new Map();
  const states: FakeServices['states'] = new Map();
  const consoles: FakeServices['consoles'] = new Map();
  const logged: FakeServices['logged'] = [];
  const events: VmEvent[] = [];
  const eventListeners = new Set<() => void>();
  const happens: FakeServices['happens'] = (event) => {
    events.push(event);
    for (const onEvent of eventListeners) onEvent();
  };
  const vms = new Map<string, VmView>();
  const logs = new Map<string, string>();
  const ends: FakeServices['ends'] = (name, log, exitCode = 0, image) => {
    const exit = { at: '2030-01-01T00:00:00Z', reason: 'guest-shutdown', code: 0, signal: null, exitCode };
    logs.set(name, log);
    vms.set(name, { ...find(name), state: 'stopped', pid: null, exitCode, exit, image: image ?? find(name).image });
  };
  const saysCode: FakeServices['saysCode'] = (name, log, exitCode) => {
    logs.set(name, log);
    vms.set(name, { ...find(name), exitCode });
  };
  const find = (name: string): VmView => {
    const vm = vms.get(name);
    if (vm === undefined) throw new MigrationError('NOT_FOUND', `no VM ${name}`);
    return vm;
  };
  const setState = (name: string, state: VmView['state']): Promise<void> => {
    vms.set(name, { ...find(name), state });
    return Promise.resolve();
  };
  const acceptState = async (session: string, stream: Readable): Promise<void> => {
    const chunks: Buffer[] = [];
    for await (const chunk of stream as AsyncIterable<Buffer>) chunks.push(chunk);
    states.set(session, Buffer.concat(chunks));
  };
  const host = hostOfCalls('A', async ({ name }, args) => {
    calls.push({ method: name, args: [...args] });
    return answers.get(name)?.();
  });
  const hostB = hostOfCalls('B', async ({ name }, args) => {
    calls.push({ method: name, args: [...args] });
    return (answers.get(name) ?? HAS_NOTHING[name])?.();
  });
  const images = new FakeImages();
  const audited: AuditEntry[] = [];
  const ties: FakeServices['ties'] = { sources: new Map(), roots: new Map(), joined: new Map(), images: new Map() };
  const listed = () => [...vms.values()];
  const agent: ApiAgent = {
    ...host,
    ties: {
      sourceOf: (session) => ties.sources.get(session) ?? null,
      rootOf: (fork) => ties.roots.get(fork) ?? null,
      joinedOf: (fork) => ties.joined.get(fork) ?? null,
      hostsOf: (image) => ties.images.get(image) ?? null,
      imageOf: (vm) => vms.get(vm)?.image ?? undefined,
    },
    inventory: { ...host.inventory, vmViews: async () => ({ vms: listed() }) },
    images: {
      imageViews: async (id) => ({ images: images.list().filter((view) => id === null || view.id === id) }),
      imageClones: async (id) => {
        const clones = images.views.get(id)?.clones ?? [];
        return { clones: listed().filter(({ name, image }) => image === id || clones.includes(name)) };
      },
      stopClones: (clones, isForced) =>
        stopEach({ list: listed, stop: (name, options) => fakes.vms.stop(name, options) }, clones, isForced),
      removeImage: (id, options) => images.remove(id, options),
    },
    target: { ...host.target, acceptState, openStream: async () => new PassThrough() },
    forks: {
      ...host.forks,
      acceptForkState: async (fork, stream) => acceptState(fork, stream).then(() => host.forks.loadClones(fork)),
      openDisk: async () => new PassThrough(),
    },
  };
  const log = (level: string) => (_: object, message: string) => void logged.push({ level, message });
  const fakes: FakeServices = {
    localCaller: () => ({ name: 'local/0', role: 'admin', from: 'unix socket' }),
    policy: {
      async refuseSpec(spec, caller) {
        if (caller?.role !== 'admin') refuseForbidden(forbiddenIn(spec, NOTHING_ALLOWED), caller?.name ?? '', 'A');
      },
      async refusePath(path, caller) {
        const forbidden = [{ what: 'the file', value: path, key: 'paths' as const }];
        if (caller?.role !== 'admin') refuseForbidden(forbidden, caller?.name ?? '', 'A');
      },
    },
    audit: { note: (entry) => void audited.push(entry) },
    ...{ audited, ties },
    host: 'A',
    version: '0.0.0',
    startedAt: '2030-01-01T00:00:00Z',
    vms: {
      run: (spec) => {
        vms.set(spec.name, vmView(spec.name, { uuid: spec.uuid }));
        return Promise.resolve(find(spec.name));
      },
      list: () => [...vms.values()],
      find,
      locate: async (name) => find(name),
      pause: (name) => setState(name, 'paused'),
      resume: (name) => setState(name, 'running'),
      reset: (name) => setState(name, 'running'),
      stop: (name, { isForced, gracefulMs }) => {
        find(name);
        calls.push({ method: 'vms.stop', args: [name, { isForced, gracefulMs }] });
        vms.delete(name);
        const how = isForced ? 'killed' : gracefulMs > 0 ? 'shutDown' : 'ended';
        return Promise.resolve({ name, how, exitCode: how === 'shutDown' ? 0 : null, reason: 'stopped' });
      },
      openConsole: (name, { isFollowing }) => {
        const { state } = find(name);
        const line = new PassThrough(); // It echoes the input, as a terminal does.
        if (state === 'stopped' || !isFollowing) line.end(logs.get(name) ?? '');
        consoles.set(name, line);
        return Promise.resolve(line);
      },
    },
    vmEvents: {
      list: (after) => events.slice(after === undefined ? 0 : events.findIndex(({ id }) => id === after) + 1),
      subscribe: (onEvent) => {
        eventListeners.add(onEvent);
        return () => eventListeners.delete(onEvent);
      },
    },
    agent,
    peers: {
      names: ['B'],
      url: () => 'https://127.0.0.2:7400',
      agent: (name) => (name === 'B' ? hostB : agent),
      serialLog: async (_, name) => Readable.from([logs.get(name) ?? '']),
      ping: () => Promise.resolve({ roundTripMs: 0.5 }),
      check: () => Promise.resolve({ roundTripMs: 0.5 }),
    },
    tls: null,
    log: { info: log('info'), warn: log('warn'), error: log('error') },
    ...change,
    tokens: (change.tokens as FakeTokens | undefined) ?? new FakeTokens(),
    jobs: (change.jobs as FakeJobs | undefined) ?? new FakeJobs(),
    images,
    pool: new FakePool(),
    ...{ calls, answers, states, consoles, logged, ends, saysCode, happens },
  };
  return fakes;
}
