/**
 * Schemas of questions to all hosts that a host knows. A host that does not answer, or whose build does not know the
 * question, is named in the answer.
 */
import { z } from 'zod';
import { CLONES_MAX } from '../domain/fork.js';
import { errorJson } from './error.js';
import { imageView, removalView } from './image.js';
import { list, text } from './of.js';
import { vmView } from './vm.js';
import { hostName, vmName } from './words.js';

/** `allHosts`: ask the other hosts too. */
export const hostsQuery = z.strictObject({ allHosts: z.stringbool().default(false) });

/** UNSUPPORTED: the host runs an earlier build. */
const unanswered = list(z.object({ host: hostName, error: errorJson }));

export const imagesOnHosts = z.object({ images: list(imageView), unanswered });
export const vmsOnHosts = z.object({ vms: list(vmView), unanswered });
export const clonesOnHosts = z.object({ clones: list(vmView), unanswered });

/** Absent: this host. */
export const fetchBody = z.strictObject({ host: hostName.optional() }).nullish();

/** VMs to end, wherever they are. A VM of the same name with another UUID is left alone. */
export const stopClonesBody = z.strictObject({
  clones: z.array(z.strictObject({ name: vmName, uuid: z.string().max(64) })).max(CLONES_MAX),
  force: z.boolean().default(false),
});

export const stoppedOnHosts = z.object({
  stopped: list(text),
  failures: list(z.object({ name: text, host: hostName, error: errorJson })),
  unanswered,
});

export const removedOnHosts = z.object({
  removals: list(z.object({ host: hostName, removal: removalView })),
  failures: list(z.object({ host: hostName, error: errorJson })),
  unanswered,
});

/** Absent: the kept output of a VM of this host. */
export const serialQuery = z.strictObject({ host: hostName.optional() });

export type Unanswered = z.output<typeof unanswered>;
export type ImagesOnHosts = z.output<typeof imagesOnHosts>;
export type VmsOnHosts = z.output<typeof vmsOnHosts>;
export type ClonesOnHosts = z.output<typeof clonesOnHosts>;
export type StoppedOnHosts = z.output<typeof stoppedOnHosts>;
export type RemovedOnHosts = z.output<typeof removedOnHosts>;
