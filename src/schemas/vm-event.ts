/** The schema of events of VMs. */
import { z } from 'zod';
import { VM_EVENT_KINDS, type VmEvent } from '../domain/vm-event.js';
import { of, text } from './of.js';
import { vmExit } from './vm.js';
import { hostName, vmName } from './words.js';

export const vmEvent = of<VmEvent>(
  z.object({
    id: text,
    at: text,
    kind: z.enum(VM_EVENT_KINDS),
    vm: vmName,
    uuid: text,
    host: hostName,
    job: text.nullable(),
    peer: text.nullable(),
    exit: vmExit.nullable(),
  }),
);

/** `after`: the id of the last event that the caller has seen. */
export const eventsQuery = z.strictObject({ after: z.string().max(64).optional() });
