/** Schemas of the views of jobs of both kinds. */
import { z } from 'zod';
import type { ForkJobView, JobView, MigrationJobView } from '../domain/job.js';
import { HOST_FILL_STATES } from '../domain/progress.js';
import { forkReportView } from './fork.js';
import { reportView } from './migration.js';
import { count, list, of, text } from './of.js';
import { forkStep, hostName, imageId, jobId, jobState, migrationStep, vmName } from './words.js';

export const jobParams = z.strictObject({ id: jobId });

const ofAnyJob = {
  id: jobId,
  vm: vmName,
  source: hostName,
  state: jobState,
  isCommitted: z.boolean(),
  progress: z
    .object({
      pagesTotal: count,
      pagesDone: count,
      bytesDone: count,
      bytesPerS: count,
      secondsLeft: count.nullable(),
      faultCount: count,
      hosts: list(
        z.object({
          host: hostName,
          pagesTotal: count,
          pagesDone: count,
          bytesDone: count,
          state: z.enum(HOST_FILL_STATES),
        }),
      ).exactOptional(),
    })
    .nullable(),
  error: z.unknown(),
  createdAt: text,
  updatedAt: text,
  coordinator: hostName.exactOptional(),
};

const migrationJobView = of<MigrationJobView>(
  z.object({
    kind: z.literal('migrate'),
    target: hostName,
    step: migrationStep.nullable(),
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
    step: forkStep.nullable(),
    report: forkReportView.nullable(),
    ...ofAnyJob,
  }),
);

export const jobView: z.ZodType<JobView> = z.union([migrationJobView, forkJobView]);
