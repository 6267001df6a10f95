/** The interfaces of the services behind the API. The daemon passes its own parts; tests pass others. */
import type { Socket } from 'node:net';
import type { Duplex, Readable } from 'node:stream';
import type { TLSSocket } from 'node:tls';
import type { Caller, UserRole } from '../../domain/caller.js';
import type { ErrorCode } from '../../domain/errors.js';
import type { ForkPlan, ForkRequest, WarmRequest, WarmSetView } from '../../domain/fork.js';
import type { FlattenReport, ImageRemoval, ImageView, PruneReport } from '../../domain/image.js';
import type { JobView } from '../../domain/job.js';
import type { MigrationOrder, MigrationPlan } from '../../domain/migration.js';
import type { Refusal } from '../../domain/refusal.js';
import type { TokenView } from '../../domain/token.js';
import type { StopResult, VmSpec, VmView } from '../../domain/vm.js';
import type { VmEvent } from '../../domain/vm-event.js';
import type { ForkPort, LoadClonesReply } from '../../engine/ports/fork.js';
import type { HostPort } from '../../engine/ports/host.js';
import type { TargetPort } from '../../engine/ports/target.js';
import type { ProvenIdentity } from '../../tls/identity.js';

export interface ApiVms {
  /**
   * Asks the peers for the name first. `isNameForced`: the host to which the VM last belonged need not answer. What
   * could not be found out is in the view's `warnings`.
   */
  run(spec: VmSpec, options?: { isNameForced: boolean }): Promise<VmView>;
  list(): readonly VmView[];
  /** Throws NOT_FOUND if there is no such VM. */
  find(name: string): VmView;
  /** The same. The error says where the VM went, if this host knows it. */
  locate(name: string): Promise<VmView>;
  pause(name: string): Promise<void>;
  resume(name: string): Promise<void>;
  /** Restarts the guest, as its reset button does. */
  reset(name: string): Promise<void>;
  /** `gracefulMs`: how long the guest may take to react to its power button; 0: it is not pressed. */
  stop(name: string, options: { isForced: boolean; gracefulMs: number }): Promise<StopResult>;
  /**
   * Opens the VM's serial line, beginning with the last `backlogBytes` of its output. Throws CONFLICT if the VM has no
   * serial line. The stream ends with the VM, or after the earlier output if `isFollowing` is false.
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

/** What has happened to the VMs on this host, as far as it is kept. */
export interface ApiVmEvents {
  /** Oldest first: the events after the one with the id `after`, or all if that is not one of this daemon's. */
  list(after?: string): readonly VmEvent[];
  /** Calls `onEvent` after each event. Returns a function that ends the subscription. */
  subscribe(onEvent: () => void): () => void;
}

/** The images on this host. */
export interface ApiImages {
  list(): readonly ImageView[];
  /** Throws NOT_FOUND if there is no such image. */
  find(id: string): ImageView;
  /**
   * Throws CONFLICT while clones run on the image or pages are still copied into it. `isForced` merges layers although
   * another host may need them, `isDroppingSaved` gives up saved files that need them.
   */
  remove(id: string, options: { isForced: boolean; isDroppingSaved: boolean }): Promise<ImageRemoval>;
  /** Removes the images that nobody needs, or only says which. */
  prune(options: { isDryRun: boolean }): Promise<PruneReport>;
  /** Writes memory, device state and the rest of the image to one file. Throws CONFLICT before it is complete. */
  save(id: string, path: string, options: { withDisks: boolean }): Promise<{ readonly fileBytes: number }>;
  /** Loads a file that `save` has written on any host, and checks everything in it. */
  load(path: string, options: { isAssumed: boolean; isTrusted: boolean }): Promise<ImageView>;
  /** Merges the overlays that forks have left below a VM's disks, as far as nobody needs the layers. */
  flatten(vm: string): Promise<FlattenReport>;
}

/** QEMU processes that wait for a fork of a VM on this host. */
export interface ApiPool {
  list(): readonly WarmSetView[];
  /** Resolves when all processes of the set wait. Throws PREFLIGHT_REFUSED if there is no room for them. */
  warm(request: WarmRequest): Promise<WarmSetView>;
  /** Ends the waiting processes for one VM, or all (null). */
  drain(vm: string | null): Promise<{ readonly endedCount: number }>;
}

/** What ties other hosts to what is here. Null: there is nothing of this name here. */
export interface HostTies {
  /** The host from which the VM of this session comes. */
  sourceOf(session: string): string | null;
  /** The host that has, or had, the parent or the image of this fork. It may be this host. */
  rootOf(fork: string): string | null;
  /** The hosts that this host, as the root of the fork, has asked to join. */
  joinedOf(fork: string): readonly string[] | null;
  /** The other hosts that have taken part in a fork of this image: they may read it, and end what runs on it. */
  hostsOf(image: string): readonly string[] | null;
  /** The image that this VM runs on; null: none. Undefined: there is no VM of this name and UUID. */
  imageOf(vm: string, uuid: string | null): string | null | undefined;
}

/** This host. Besides the calls it accepts the device state of a session or fork, which arrives as a stream. */
export interface ApiAgent extends HostPort {
  readonly ties: HostTies;
  readonly target: TargetPort & {
    /** Resolves when QEMU has loaded the state. */
    acceptState(session: string, stream: Readable): Promise<void>;
    /** Connects the source's QEMU to the one that waits for this session's migration by QEMU itself. */
    openStream(session: string): Promise<Duplex>;
  };
  readonly forks: ForkPort & {
    /** Resolves when this host has all of the state, and has loaded it into its clones. */
    acceptForkState(fork: string, stream: Readable): Promise<LoadClonesReply>;
    /** Connects the host `reader` to a disk of an image of this host. */
    openDisk(image: string, disk: string, reader: string): Promise<Duplex>;
  };
}

/** The other hosts that this host knows, by name. */
export interface ApiPeers {
  readonly names: readonly string[];
  url(host: string): string;
  /** Throws NOT_FOUND for a host that is neither this one nor a peer. If it is down, its calls throw UNREACHABLE. */
  agent(host: string): HostPort;
  /** The serial output that another host keeps of a VM. The stream fails if it is cut off. */
  serialLog(host: string, vm: string): Promise<Readable>;
  /** Times one empty call. */
  ping(host: string): Promise<{ roundTripMs: number }>;
  /** The same, after a connection has been made anew, so that both certificates are checked now. */
  check(host: string): Promise<{ roundTripMs: number }>;
}

export interface ApiTls {
  readonly expiresAt: string;
  /** Returns the identity of the peer. Null if it has no valid certificate of this cluster any more. */
  peerOf(socket: TLSSocket): ProvenIdentity | null;
}

/** The bearer tokens of this host. */
export interface ApiTokens {
  /** False: nobody can come with a token now. */
  readonly isAnyValid: boolean;
  list(): TokenView[];
  create(order: {
    readonly name: string;
    readonly role: UserRole;
    readonly expiresInMs: number;
    readonly createdBy: string;
  }): Promise<TokenView & { readonly token: string }>;
  revoke(nameOrId: string): Promise<TokenView[]>;
  holderOf(token: string): TokenView | null;
  /** Calls `listener` when a token has been revoked or has expired. Returns a function that ends the subscription. */
  onRevoked(listener: () => void): () => void;
}

/**
 * What this host lets callers name who are not its administrators (src/domain/policy.ts). Throws NOT_PERMITTED. An
 * unknown caller is not an administrator.
 */
export interface ApiPolicy {
  refuseSpec(spec: VmSpec, caller: Caller | null): Promise<void>;
  /** A file that is read, or written and may be missing. */
  refusePath(path: string, caller: Caller | null): Promise<void>;
}

/** One line of the audit log: a call that changes something, or that was refused. */
export interface AuditEntry {
  readonly who: string;
  readonly from: string;
  /** The method and the route, or the name of a call between hosts. */
  readonly what: string;
  /** The VM, job, image, token, session or fork. */
  readonly object: string | null;
  /** `unanswered`: the client has hung up before the result was known. */
  readonly result: 'ok' | 'unanswered' | ErrorCode;
  readonly message?: string;
}

export interface ApiAudit {
  note(entry: AuditEntry): void;
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
  readonly vmEvents: ApiVmEvents;
  readonly jobs: ApiJobs;
  readonly images: ApiImages;
  readonly pool: ApiPool;
  readonly agent: ApiAgent;
  readonly peers: ApiPeers;
  /** Null if only the unix socket is served. */
  readonly tls: ApiTls | null;
  readonly tokens: ApiTokens;
  /** Who is at the other end of the unix socket. */
  readonly localCaller: (socket: Socket) => Caller;
  readonly policy: ApiPolicy;
  readonly audit: ApiAudit;
  readonly log: ApiLog;
}
