/** Schemas of the views of VMs. vm-spec.ts has their specs. */
import { z } from 'zod';
import { STOP_WAYS, type StopResult, type VmView } from '../domain/vm.js';
import { count, list, of, text } from './of.js';
import { accel, hostName, vmName, vmState } from './words.js';

const STOP_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS_MAX = 3_600_000;

export const stopBody = z
  .strictObject({
    /** Kill QEMU at once, even if the VM belongs to a job. */
    force: z.boolean().default(false),
    /** How long the guest may take to react to its power button. 0: it is not pressed. */
    timeoutMs: z.int().min(0).max(STOP_TIMEOUT_MS_MAX).default(STOP_TIMEOUT_MS),
  })
  .nullish()
  .transform((body) => body ?? { force: false, timeoutMs: STOP_TIMEOUT_MS });

/** Clones of an image end at once: nobody presses as many power buttons. */
export const stopImageBody = z
  .strictObject({
    force: z.boolean().default(false),
    /** End those on the other hosts too. */
    allHosts: z.boolean().default(false),
  })
  .nullish();

export const stopView = of<StopResult>(
  z.object({ name: vmName, how: z.enum(STOP_WAYS), exitCode: z.int().nullable(), reason: text.nullable() }),
);

/** `forceName`: the host to which a VM of this name last belonged need not answer. */
export const runQuery = z.strictObject({ forceName: z.stringbool().default(false) });

export const emptyBody = z.strictObject({}).nullish();

export const vmParams = z.strictObject({ name: vmName });

export const vmExit = z.object({
  at: text,
  reason: text,
  code: z.int().nullable(),
  signal: text.nullable(),
  exitCode: z.int().nullable(),
});

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
    exit: vmExit.nullable(),
    identityIssue: text.nullable(),
    warnings: list(text).exactOptional(),
    notice: text.exactOptional(),
    damage: text.exactOptional(),
    arriving: z.object({ ...openMove, source: text, incompleteSince: text.nullable() }).exactOptional(),
    leaving: z.object({ ...openMove, target: text }).exactOptional(),
  }),
);
