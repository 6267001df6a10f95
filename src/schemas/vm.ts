/** Schemas of the views of VMs. vm-spec.ts has their specs. */
import { z } from 'zod';
import type { VmView } from '../domain/vm.js';
import { count, of, text } from './of.js';
import { accel, hostName, vmName, vmState } from './words.js';

export const stopBody = z.strictObject({ force: z.boolean().default(false) }).nullish();

export const emptyBody = z.strictObject({}).nullish();

export const vmParams = z.strictObject({ name: vmName });

const openMove = { job: text, percent: count.nullable(), isStalled: z.boolean() };

export const vmView = of<VmView>(
  z.object({
    name: vmName,
    uuid: text,
    host: hostName,
    state: vmState,
    epoch: count,
    memoryBytes: count,
    pid: count.nullable(),
    machine: text,
    accel,
    job: text.nullable(),
    serialLog: text.nullable(),
    image: text.nullable(),
    exitCode: z.int().nullable(),
    exit: z
      .object({
        at: text,
        reason: text,
        code: z.int().nullable(),
        signal: text.nullable(),
        exitCode: z.int().nullable(),
      })
      .nullable(),
    identityIssue: text.nullable(),
    arriving: z.object({ ...openMove, source: text, incompleteSince: text.nullable() }).exactOptional(),
    leaving: z.object({ ...openMove, target: text }).exactOptional(),
  }),
);
