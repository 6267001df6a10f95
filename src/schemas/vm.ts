/** Schemas of the views of VMs. vm-spec.ts has their specs. */
import { z } from 'zod';
import type { VmView } from '../domain/vm.js';
import { count, list, of, text } from './of.js';
import { accel, hostName, vmName, vmState } from './words.js';

export const stopBody = z.strictObject({ force: z.boolean().default(false) }).nullish();

/** `forceName`: the host to which a VM of this name last belonged need not answer. */
export const runQuery = z.strictObject({ forceName: z.stringbool().default(false) });

export const emptyBody = z.strictObject({}).nullish();

export const vmParams = z.strictObject({ name: vmName });

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
    warnings: list(text).exactOptional(),
  }),
);
