/** As schemas.ts, for clones and images, and for jobs of both kinds. */
import { z } from 'zod';
import { MigrationError } from '../domain/errors.js';
import type { ForkPlan, ForkReport, ForkRequest, WarmRequest, WarmSetView } from '../domain/fork.js';
import type { ImageView } from '../domain/image.js';
import type { ForkJobView, JobView, MigrationJobView } from '../domain/job.js';
import { count, errorJson, hostName, jobId, list, of, refusalView, reportView, stepName, text, vmName } from './api.js';

export const imageId = z.string().regex(/^[0-9a-f]{16}$/, 'is not an image id');
export const parentMode = z.enum(['continue', 'stop']);
export const cloneMemory = z.enum(['cow', 'private']);
export const cloneNetwork = z.enum(['fresh', 'isolated', 'none']);
export const cloneDisks = z.enum(['overlay', 'scratch']);
/** With the index behind it still a VM's name. */
export const namePrefix = vmName.max(56);

// ---- requests
// ---------------------------------------------------------------------------------------------------------------------------

const HOSTS_MAX = 10_000;
const PATH_MAX = 4096;

const ofClones = {
  /** Any whole number: what is too many or too few is for pre-flight to say. */
  cloneCount: z.int(),
  namePrefix: namePrefix.nullable().default(null),
  parentMode: parentMode.default('continue'),
  memory: cloneMemory.default('cow'),
  network: cloneNetwork.default('fresh'),
  disks: cloneDisks.default('overlay'),
};

export const forkBody = z.strictObject({
  /** One of the two: the VM to fork, or an image to run. */
  vm: vmName.nullable().default(null),
  image: imageId.nullable().default(null),
  ...ofClones,
  isPartialAllowed: z.boolean().default(false),
  /** Where the clones run; empty: here. */
  hosts: z.array(hostName).max(HOSTS_MAX).default([]),
  /** Answer the plan and start nothing. */
  dryRun: z.boolean().default(false),
});
export type ForkBody = z.input<typeof forkBody>;

export const warmBody = z.strictObject({ vm: vmName, ...ofClones });
export type WarmBody = z.input<typeof warmBody>;

export const drainBody = z.strictObject({ vm: vmName.nullable().default(null) }).nullish();
export const fileBody = z.strictObject({ path: z.string().min(1).max(PATH_MAX).startsWith('/', 'is not absolute') });
export const imageParams = z.strictObject({ id: imageId });

/** USAGE for what no host could do, UNSUPPORTED for what this one cannot. */
export function forkRequest(body: z.output<typeof forkBody>, host: string): ForkRequest {
  const { dryRun: _, hosts, ...request } = body;
  if ((request.vm === null) === (request.image === null)) {
    throw new MigrationError('USAGE', 'a fork is of a VM or of an image: name one of the two');
  }
  const others = hosts.filter((name) => name !== host);
  if (others.length > 0) {
    throw new MigrationError('UNSUPPORTED', `clones run on ${host} only, not on ${others.join(', ')}`, {
      remedy: 'leave hosts out: this build does not send images to other hosts',
    });
  }
  return request;
}

// ---- views
// ------------------------------------------------------------------------------------------------------------------------------

const forkStepName = z.enum([
  'reserveParent',
  'prepareClones',
  'armParent',
  'forkPoint',
  'startClones',
  'commitFork',
  'fillImage',
  'releaseParent',
]);

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
  }),
);

export const forkPlanView = of<ForkPlan>(
  z.object({
    request: requestView,
    host: hostName,
    parent: text,
    memoryBytes: count,
    steps: list(z.object({ name: forkStepName, host: hostName, text, isInPause: z.boolean(), timeoutMs: count })),
    notes: list(text),
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

const forkReportView = of<ForkReport>(
  z.object({
    job: text,
    image: imageId,
    parent: text,
    parentPauseMs: count,
    isWarm: z.boolean(),
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

const ofAnyJob = {
  id: jobId,
  vm: vmName,
  source: hostName,
  state: z.enum(['queued', 'running', 'recovering', 'done', 'failed', 'cancelled', 'needsRecovery', 'lost']),
  isCommitted: z.boolean(),
  progress: z
    .object({
      pagesTotal: count,
      pagesDone: count,
      bytesDone: count,
      bytesPerS: count,
      secondsLeft: count.nullable(),
      faultCount: count,
    })
    .nullable(),
  error: z.unknown(),
  createdAt: text,
  updatedAt: text,
};

const migrationJobView = of<MigrationJobView>(
  z.object({
    kind: z.literal('migrate'),
    target: hostName,
    step: stepName.nullable(),
    report: reportView.nullable(),
    ...ofAnyJob,
  }),
);

const forkJobView = of<ForkJobView>(
  z.object({
    kind: z.literal('fork'),
    image: imageId.nullable(),
    cloneCount: count,
    waitsFor: jobId.nullable(),
    clones: list(text),
    step: forkStepName.nullable(),
    report: forkReportView.nullable(),
    ...ofAnyJob,
  }),
);

export const jobView: z.ZodType<JobView> = z.union([migrationJobView, forkJobView]);

export const imageView = of<ImageView>(
  z.object({
    id: imageId,
    host: hostName,
    state: z.enum(['capturing', 'filling', 'complete', 'failed']),
    parent: text,
    createdAt: text,
    memoryBytes: count,
    allocatedBytes: count,
    pageBytes: count,
    deviceStateBytes: count,
    pagesTotal: count,
    pagesDone: count,
    disks: list(text),
    clones: list(text),
  }),
);

/** What became of each of an image's clones when all of them were to be stopped. */
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
