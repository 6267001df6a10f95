/** Schemas of fork requests, and of the views of forks: plan, report and waiting sets. */
import { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import type { ForkPlan, ForkReport, ForkRequest, HostWish, WarmRequest, WarmSetView } from '../domain/fork.js';
import { CLONES_MAX, DISK_ACCESSES } from '../domain/fork.js';
import { fanout, fanoutChoice, fanoutPlan, multicastProvider, topologyFile } from './fanout.js';
import { refusalView } from './migration.js';
import { count, list, of, text } from './of.js';
import { sharedStorage } from './storage.js';
import {
  cloneDisks,
  cloneMemory,
  cloneNetwork,
  dataSecurity,
  forkStep,
  hostName,
  imageFetchMode,
  imageId,
  parentMode,
  placement,
  transport,
  transportChoice,
  vmName,
} from './words.js';

/** Short enough to remain a VM name when the clone's index is appended. */
export const namePrefix = vmName.max(56);

const HOSTS_MAX = 10_000;

/** Zero clones: the host only gets the image. */
const hostWish = z.strictObject({ host: hostName, cloneCount: z.int().min(0).max(CLONES_MAX) });

const ofClones = {
  /** Any whole number; pre-flight checks the range. */
  cloneCount: z.int(),
  namePrefix: namePrefix.nullable().default(null),
  parentMode: parentMode.default('continue'),
  memory: cloneMemory.default('cow'),
  network: cloneNetwork.default('fresh'),
  disks: cloneDisks.default('overlay'),
};

export const forkBody = z.strictObject({
  /** Exactly one of `vm` (the VM to fork) and `image` (an image to run) is set. */
  vm: vmName.nullable().default(null),
  image: imageId.nullable().default(null),
  ...ofClones,
  isPartialAllowed: z.boolean().default(false),
  /** Remove ended VMs that have the clones' names, with their exit codes and logs. */
  replace: z.boolean().default(false),
  /**
   * Hosts on which the clones run, each with its number of clones or without one; `all` means this host and all of its
   * peers, empty means this host.
   */
  hosts: z.union([z.literal('all'), z.array(z.union([hostName, hostWish])).max(HOSTS_MAX)]).default([]),
  /** How clones without a given host are placed. */
  placement: placement.default('spread'),
  /** How much of the image the other hosts read. */
  fetch: imageFetchMode.default('all'),
  /** How they read it. */
  transport: transportChoice.default('auto'),
  /** prove: a disk is shared only with a host that is proven to see it, and served to the others. */
  sharedStorage: sharedStorage.default('prove'),
  /** The least protection of the image on its way to them. Default: what the hosts demand. */
  dataSecurity: dataSecurity.exactOptional(),
  /** How the image gets to the other hosts. */
  fanout: fanoutChoice.default('auto'),
  /** A topology.conf of Slurm, or the same in YAML: which hosts share a switch. */
  topology: topologyFile.nullable().default(null),
  /** Return the plan and start nothing. */
  dryRun: z.boolean().default(false),
});

export type ForkBody = z.input<typeof forkBody>;

export const warmBody = z.strictObject({ vm: vmName, ...ofClones });

export type WarmBody = z.input<typeof warmBody>;

export const drainBody = z.strictObject({ vm: vmName.nullable().default(null) }).nullish();

/** Turns the body into a request to the host `host`, which knows `peers`. Throws USAGE for a contradiction. */
export function forkRequest(body: z.output<typeof forkBody>, host: string, peers: readonly string[]): ForkRequest {
  const { dryRun: _, hosts, replace, placement: placed, fetch, transport: by, ...others } = body;
  const { sharedStorage: shared, fanout: how, topology, dataSecurity: least, ...rest } = others;
  if ((rest.vm === null) === (rest.image === null)) {
    throw new MigrationError('USAGE', 'a fork needs either a VM or an image');
  }
  const request = replace ? { ...rest, isReplacing: true } : rest;
  const wishes = wishesOf(hosts === 'all' ? [host, ...peers] : hosts);
  checkWishes(wishes, request.cloneCount);
  // A fork on this host alone is the same whether or not its name is given.
  if (wishes.every((wish) => wish.host === host)) return request;
  return {
    ...{ ...request, hosts: wishes, placement: placed, fetch, transport: by },
    ...(shared === 'assume' ? { sharedStorage: shared } : {}),
    ...(least === undefined ? {} : { dataSecurity: least }),
    ...(how === 'auto' ? {} : { fanout: how }),
    ...(topology === null ? {} : { topology }),
  };
}

function wishesOf(hosts: readonly (string | HostWish)[]): HostWish[] {
  return hosts.map((wish) => (typeof wish === 'string' ? { host: wish, cloneCount: null } : wish));
}

function checkWishes(wishes: readonly HostWish[], cloneCount: number): void {
  const twice = wishes.find(({ host }, index) => wishes.findIndex((other) => other.host === host) !== index);
  if (twice !== undefined) throw new MigrationError('USAGE', `host ${twice.host} is named twice`);
  if (wishes.length === 0) return;
  const wanted = wishes.reduce((sum, wish) => sum + (wish.cloneCount ?? 0), 0);
  const isOpen = wishes.some((wish) => wish.cloneCount === null);
  if (isOpen ? wanted <= cloneCount : wanted === cloneCount) return;
  throw new MigrationError('USAGE', `the hosts are to have ${wanted} clones, and the fork has ${cloneCount}`, {
    remedy: 'give the numbers of the hosts so that they add up, or leave some of them out',
  });
}

const requestView = of<ForkRequest>(
  z.object({
    vm: vmName.nullable(),
    image: imageId.nullable(),
    cloneCount: z.number(),
    namePrefix: text.nullable(),
    parentMode,
    memory: cloneMemory,
    network: cloneNetwork,
    disks: cloneDisks,
    isPartialAllowed: z.boolean(),
    isReplacing: z.boolean().optional(),
    hosts: list(z.object({ host: hostName, cloneCount: count.nullable() })).exactOptional(),
    placement: placement.exactOptional(),
    fetch: imageFetchMode.exactOptional(),
    transport: transportChoice.exactOptional(),
    sharedStorage: sharedStorage.exactOptional(),
    dataSecurity: dataSecurity.exactOptional(),
    fanout: fanoutChoice.exactOptional(),
    topology: topologyFile.exactOptional(),
  }),
);

const diskShare = z.object({ id: text, access: z.enum(DISK_ACCESSES) });
const hostShare = z.object({ host: hostName, first: count, count, disks: list(diskShare).exactOptional() });

const forkPlanView = of<ForkPlan>(
  z.object({
    request: requestView,
    host: hostName,
    parent: text,
    memoryBytes: count,
    steps: list(z.object({ name: forkStep, host: hostName, text, isInPause: z.boolean(), timeoutMs: count })),
    notes: list(text),
    shares: list(hostShare).exactOptional(),
    transport: transport.exactOptional(),
    transportReason: text.exactOptional(),
    fanout: fanoutPlan.exactOptional(),
    coldReason: text.optional(),
  }),
);

export const forkDryRunView = z.object({ plan: forkPlanView.nullable(), refusals: list(refusalView) });

export const cloneIdentity = z.object({
  index: count,
  cloneCount: count,
  name: text,
  uuid: text,
  vmGenerationId: text,
  macs: z.record(text, text),
});

const cloneReport = cloneIdentity.extend({
  host: hostName,
  mac: text.nullable(),
  readyMs: count,
});

export const cloneFailure = z.object({ index: count, name: text, error: z.unknown(), host: hostName.exactOptional() });

export const forkReportView = of<ForkReport>(
  z.object({
    job: text,
    image: imageId,
    parent: text,
    parentPauseMs: count,
    isWarm: z.boolean(),
    coldReason: text.optional(),
    totalMs: count,
    firstReadyMs: count,
    lastReadyMs: count,
    memoryBytes: count,
    clones: list(cloneReport),
    failures: list(cloneFailure),
    bytes: z.object({
      copied: count,
      zeroSkipped: count,
      deviceState: count,
      perHost: z.record(text, count),
      rootEgress: count,
      multicast: count,
      repair: count,
      relayed: count,
      perLink: z.record(text, count),
    }),
    fanout: z
      .object({
        kind: fanout,
        reason: text,
        provider: multicastProvider.exactOptional(),
        lossPerHost: z.record(text, z.number()),
      })
      .exactOptional(),
    faults: z.object({ parent: count, clones: count }),
    phases: list(z.object({ name: text, ms: z.number() })),
  }),
);

export const warmSetView = of<WarmSetView>(
  z.object({
    image: imageId,
    vm: text,
    cloneCount: count,
    namePrefix: text.nullable(),
    memory: cloneMemory,
    network: cloneNetwork,
    disks: cloneDisks,
    state: z.enum(['starting', 'ready']),
    readyCount: count,
  }),
);

export function warmRequest(body: z.output<typeof warmBody>): WarmRequest {
  return body;
}
