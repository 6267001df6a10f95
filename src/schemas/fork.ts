/** Schemas of fork requests, and of the views of forks: plan, report and waiting sets. */
import { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import type { ForkPlan, ForkReport, ForkRequest, WarmRequest, WarmSetView } from '../domain/fork.js';
import { errorJson } from './error.js';
import { refusalView } from './migration.js';
import { count, list, of, text } from './of.js';
import { cloneDisks, cloneMemory, cloneNetwork, forkStep, hostName, imageId, parentMode, vmName } from './words.js';

/** Short enough to remain a VM name when the clone's index is appended. */
export const namePrefix = vmName.max(56);

const HOSTS_MAX = 10_000;

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
  /** Hosts on which the clones run; empty means this host. */
  hosts: z.array(hostName).max(HOSTS_MAX).default([]),
  /** Return the plan and start nothing. */
  dryRun: z.boolean().default(false),
});

export type ForkBody = z.input<typeof forkBody>;

export const warmBody = z.strictObject({ vm: vmName, ...ofClones });

export type WarmBody = z.input<typeof warmBody>;

export const drainBody = z.strictObject({ vm: vmName.nullable().default(null) }).nullish();

/** Turns the body into a request. Throws USAGE for a contradiction, UNSUPPORTED for what this build cannot do. */
export function forkRequest(body: z.output<typeof forkBody>, host: string): ForkRequest {
  const { dryRun: _, hosts, replace, ...request } = body;
  if ((request.vm === null) === (request.image === null)) {
    throw new MigrationError('USAGE', 'a fork needs either a VM or an image');
  }
  const others = hosts.filter((name) => name !== host);
  if (others.length > 0) {
    throw new MigrationError('UNSUPPORTED', `clones run on ${host} only, not on ${others.join(', ')}`, {
      remedy: 'omit hosts: this build does not send images to other hosts',
    });
  }
  return replace ? { ...request, isReplacing: true } : request;
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
  }),
);

const forkPlanView = of<ForkPlan>(
  z.object({
    request: requestView,
    host: hostName,
    parent: text,
    memoryBytes: count,
    steps: list(z.object({ name: forkStep, host: hostName, text, isInPause: z.boolean(), timeoutMs: count })),
    notes: list(text),
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

export const cloneFailure = z.object({ index: count, name: text, error: z.unknown() });

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
    }),
    faults: z.object({ parent: count, clones: count }),
    phases: list(z.object({ name: text, ms: z.number() })),
  }),
);

/** The result of stopping all clones of an image. */
export const stoppedView = z.object({
  stopped: list(text),
  failures: list(z.object({ name: text, error: errorJson })),
});

export type StoppedView = z.output<typeof stoppedView>;

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
