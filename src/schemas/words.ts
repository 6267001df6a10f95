/** Schemas of single values: names, ids, and the lists of the domain. All other schemas are built of them. */

import { z } from 'zod';
import { DATA_SECURITIES } from '../domain/data-security.js';
import {
  CLONE_DISKS,
  CLONE_MEMORIES,
  CLONE_NETWORKS,
  FORK_STEPS,
  IMAGE_FETCHES,
  PARENT_MODES,
  PLACEMENTS,
} from '../domain/fork.js';
import { IMAGE_STATES } from '../domain/image.js';
import { JOB_STATES } from '../domain/job.js';
import { MIGRATION_MODES, MIGRATION_STEPS } from '../domain/migration.js';
import { TRANSPORT_CHOICES, TRANSPORTS } from '../domain/transport.js';
import { ACCEL_CHOICES, ACCELS, DISK_FORMATS, VM_STATES } from '../domain/vm.js';

export const vmName = z
  .string()
  .min(1)
  .max(64)
  .regex(/^[A-Za-z0-9][A-Za-z0-9._-]*$/, 'is not a VM name');

export const hostName = z
  .string()
  .min(1)
  .max(48)
  .regex(/^[A-Za-z0-9][A-Za-z0-9._-]*$/, 'is not a host name');

export const jobId = z
  .string()
  .min(1)
  .max(64)
  .regex(/^[A-Za-z0-9-]+$/, 'is not a job id');

export const exitCode = z.int().min(0).max(255);

/** 128 bits in hexadecimal. */
export const sessionId = z.string().regex(/^[0-9a-f]{32}$/, 'is not a session id');

/** Tells two starts of a VM of one name apart. */
export const incarnationId = z.string().regex(/^[0-9a-f]{32}$/, 'is not the id of a start');

export const sessionToken = z.string().regex(/^[0-9a-f]{64}$/, 'is not a session token');
export const accel = z.enum(ACCELS);
export const accelChoice = z.enum(ACCEL_CHOICES);
export const diskFormat = z.enum(DISK_FORMATS);
export const transport = z.enum(TRANSPORTS);
export const transportChoice = z.enum(TRANSPORT_CHOICES);
export const migrationMode = z.enum(MIGRATION_MODES);
export const vmState = z.enum(VM_STATES);
export const migrationStep = z.enum(MIGRATION_STEPS);

export const imageId = z.string().regex(/^[0-9a-f]{16}$/, 'is not an image id');
export const parentMode = z.enum(PARENT_MODES);
export const cloneMemory = z.enum(CLONE_MEMORIES);
export const cloneNetwork = z.enum(CLONE_NETWORKS);
export const cloneDisks = z.enum(CLONE_DISKS);
export const placement = z.enum(PLACEMENTS);
export const imageFetchMode = z.enum(IMAGE_FETCHES);
export const forkStep = z.enum(FORK_STEPS);
export const jobState = z.enum(JOB_STATES);
export const imageState = z.enum(IMAGE_STATES);

export const dataSecurity = z.enum(DATA_SECURITIES);
