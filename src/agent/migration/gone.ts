/** Sessions whose QEMU has ended: what the coordinator is told, until it has heard it and ends the session. */
import { MigrationError } from '../../domain/errors.js';
import type { VmExit } from '../../domain/vm.js';
import type { SessionProgress } from '../../engine/ports/session.js';
import { endedOf } from './ended-vm.js';
import type { TargetRecord } from './session-store.js';

/** A session of an earlier daemon whose QEMU is not there any more. */
export interface GoneSession {
  readonly record: TargetRecord;
  readonly hasRun: boolean;
  /** Null if the VM has been removed since, so that nobody knows how it ended. */
  readonly exit: VmExit | null;
}

/** Builds the error of a session whose QEMU has ended. `details` tell the coordinator the reason. */
export function goneError(vm: string, host: string, exit: VmExit | null): MigrationError {
  const isForced = exit?.reason === 'stopped';
  const message = isForced ? `${vm} was stopped by force on ${host}` : `the QEMU of ${vm} has ended`;
  return new MigrationError('QEMU_GONE', message, exit === null ? {} : { details: { reason: exit.reason } });
}

export function goneProgress({ record, hasRun, exit }: GoneSession, host: string): SessionProgress {
  const { name, memory } = record.spec;
  const pagesTotal = memory.sizeBytes / memory.pageBytes;
  const isComplete = record.state === 'complete';
  return {
    state: isComplete ? 'complete' : 'gone',
    hasRun,
    error: isComplete ? null : goneError(name, host, exit).toJSON(),
    pagesTotal,
    pagesPresent: isComplete ? pagesTotal : 0,
    pageBytes: memory.pageBytes,
    counters: {},
    ...endedOf(exit),
  };
}
