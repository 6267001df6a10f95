import type { VmExit } from './vm.js';

/**
 * What happens to a VM on one host.
 *
 * found: a new daemon has taken it up · started: it runs here for the first time, as a new VM or a clone · paused,
 * resumed: its vCPUs stand still, or run again · stopped: QEMU has ended; `exit` says how, for example by a panic ·
 * arriving: a job prepares its move to this host · arrived: it runs here, and its memory may still be missing ·
 * complete: all of its memory is here · leaving: a job moves it away · stayed: that job has ended without moving it ·
 * left: it runs on the other host, which may still fetch its memory from here · gone: nothing of it is left here
 */
export const VM_EVENT_KINDS = [
  'found',
  'started',
  'paused',
  'resumed',
  'stopped',
  'arriving',
  'arrived',
  'complete',
  'leaving',
  'stayed',
  'left',
  'gone',
] as const;
export type VmEventKind = (typeof VM_EVENT_KINDS)[number];

export interface VmEvent {
  /** Grows by one with each event of a daemon's life; the part before the dash is another one in its next life. */
  readonly id: string;
  readonly at: string;
  readonly kind: VmEventKind;
  readonly vm: string;
  readonly uuid: string;
  readonly host: string;
  /** The job that moves the VM. */
  readonly job: string | null;
  /** The host from which, or to which, the VM moves. */
  readonly peer: string | null;
  /** Set for `stopped`. */
  readonly exit: VmExit | null;
}
