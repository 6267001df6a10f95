/** What the API serves, as interfaces. The daemon plugs in its own parts; tests plug in others at the same places. */
import type { Duplex, Readable } from 'node:stream';
import type { TLSSocket } from 'node:tls';
import type { ForkPlan, ForkRequest, WarmRequest, WarmSetView } from '../../domain/fork.js';
import type { ImageView } from '../../domain/image.js';
import type { JobView } from '../../domain/job.js';
import type { MigrationOrder, MigrationPlan } from '../../domain/migration.js';
import type { Refusal } from '../../domain/refusal.js';
import type { VmSpec, VmView } from '../../domain/vm.js';
import type { HostPort } from '../../engine/ports/host.js';
import type { TargetPort } from '../../engine/ports/target.js';
import type { Identity } from '../../tls/identity.js';

export interface ApiVms {
  run(spec: VmSpec): Promise<VmView>;
  list(): readonly VmView[];
  /** NOT_FOUND if there is none. */
  find(name: string): VmView;
  pause(name: string): Promise<void>;
  resume(name: string): Promise<void>;
  stop(name: string, options: { isForced: boolean }): Promise<void>;
  /**
   * The VM's serial line, beginning with so much of its past; CONFLICT if it has none. Ends with the VM, or with the
   * past if it is not followed.
   */
  openConsole(name: string, options: { backlogBytes: number; isFollowing: boolean }): Promise<Duplex>;
}

export interface ApiJobs {
  dryRun(request: MigrationOrder): Promise<{ plan: MigrationPlan | null; refusals: readonly Refusal[] }>;
  submit(request: MigrationOrder): Promise<JobView>;
  dryRunFork(request: ForkRequest): Promise<{ plan: ForkPlan | null; refusals: readonly Refusal[] }>;
  submitFork(request: ForkRequest): Promise<JobView>;
  get(id: string): JobView;
  list(): readonly JobView[];
  cancel(id: string): Promise<JobView>;
  recover(id: string): Promise<JobView>;
  subscribe(id: string, listener: (view: JobView) => void): () => void;
}

/** The images on this host. */
export interface ApiImages {
  list(): readonly ImageView[];
  /** NOT_FOUND if there is none. */
  find(id: string): ImageView;
  /** CONFLICT while clones run on it or pages are still copied into it. */
  remove(id: string): Promise<void>;
  /** Into a file of its own, memory, device state and all; CONFLICT before the image is complete. */
  save(id: string, path: string): Promise<{ readonly fileBytes: number }>;
  /** What `save` wrote, here or elsewhere; everything in it is checked. */
  load(path: string): Promise<ImageView>;
}

/** QEMU processes that wait for a fork of a VM on this host. */
export interface ApiPool {
  list(): readonly WarmSetView[];
  /** Resolves when all of the set wait; PREFLIGHT_REFUSED where there is no room for them. */
  warm(request: WarmRequest): Promise<WarmSetView>;
  /** Ends those for one VM, or all. */
  drain(vm: string | null): Promise<{ readonly endedCount: number }>;
}

/** This host, with what is no call: the device state of a session, which arrives as a stream. */
export interface ApiAgent extends HostPort {
  readonly target: TargetPort & {
    /** Resolves when QEMU has loaded the state. */
    acceptState(session: string, stream: Readable): Promise<void>;
  };
}

/** The other hosts that this one knows, by name. */
export interface ApiPeers {
  readonly names: readonly string[];
  url(host: string): string;
  /** NOT_FOUND for a host that is neither this one nor a peer; UNREACHABLE at the first call if it does not answer. */
  agent(host: string): HostPort;
  /** One empty call there and back. */
  ping(host: string): Promise<{ roundTripMs: number }>;
}

export interface ApiTls {
  readonly expiresAt: string;
  /** Who is at the other end now; null if nobody of ours any more. */
  peerOf(socket: TLSSocket): Identity | null;
}

export interface ApiLog {
  info(details: object, message: string): void;
  warn(details: object, message: string): void;
  error(details: object, message: string): void;
}

export interface ApiServices {
  readonly host: string;
  readonly version: string;
  readonly startedAt: string;
  readonly vms: ApiVms;
  readonly jobs: ApiJobs;
  readonly images: ApiImages;
  readonly pool: ApiPool;
  readonly agent: ApiAgent;
  readonly peers: ApiPeers;
  /** Null where only the unix socket is served. */
  readonly tls: ApiTls | null;
  readonly log: ApiLog;
}
