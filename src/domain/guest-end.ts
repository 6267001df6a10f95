/** How a guest has ended by itself. Its QEMU ends then, and nobody is to blame. */
export interface GuestEnd {
  /** `guest-shutdown`: it has powered itself off · `guest-reset`: a clone has rebooted · `panicked` */
  readonly reason: string;
  /** What it wrote to its exit port, 0 if it powered off without writing one, else null. */
  readonly exitCode: number | null;
}

const PANICS: ReadonlySet<string> = new Set(['guest-panic', 'panicked']);
const GUEST_ENDS: ReadonlySet<string> = new Set(['guest-shutdown', 'guest-reset', ...PANICS]);

export function isPanic(reason: string): boolean {
  return PANICS.has(reason);
}

/** True if `reason`, a VM's exit reason, says that its guest has ended by itself. */
export function isGuestEnd(reason: string): boolean {
  return GUEST_ENDS.has(reason);
}

/** Returns the end in words: "the guest of web has shut down (exit code 0)". */
export function guestEndText(vm: string, { reason, exitCode }: GuestEnd): string {
  const hows: Readonly<Record<string, string>> = {
    'guest-shutdown': 'has shut down',
    'guest-reset': 'has restarted, which ends a clone',
  };
  return `the guest of ${vm} ${hows[reason] ?? 'has panicked'}${exitCode === null ? '' : ` (exit code ${exitCode})`}`;
}
