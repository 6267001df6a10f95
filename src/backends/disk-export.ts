/** Disks of one image, served read-only by a process of their own to whoever connects. */
import type { Duplex } from 'node:stream';
import type { DiskSpec } from '../domain/vm.js';

export interface ExportOrder {
  /** The socket that the process makes. Its directory is private. */
  readonly socketPath: string;
  readonly disks: readonly Pick<DiskSpec, 'id' | 'path' | 'format'>[];
  /**
   * False: a VM may still write to the files, and what is read may be of any moment. True: nobody writes to them any
   * more; the process refuses a file of which it can tell that somebody does.
   */
  readonly isFixed: boolean;
}

/**
 * A connection reads any of the disks, which it names itself, as the guest sees them: without their format and with
 * what their backing files have.
 */
export interface DiskExport {
  /** Throws QEMU_GONE if the process has ended. */
  connect(): Promise<Duplex>;
  /** Resolves when the process has ended. It never rejects. */
  readonly exited: Promise<unknown>;
  /** Kills the process: all its connections end, and its socket is gone. Idempotent. */
  end(): Promise<void>;
}

export interface DiskExports {
  /** Returns why this host cannot serve disks, or null. */
  problem(): Promise<string | null>;
  /** Resolves when the process serves. Throws UNSUPPORTED if its program is missing, QEMU_FAILED if it ends. */
  serve(order: ExportOrder): Promise<DiskExport>;
  /** Ends what an earlier daemon has left at this socket. */
  endLeftover(socketPath: string): Promise<void>;
  /** The name under which `diskFiles` finds a served disk, of format raw, at a socket that leads to an export. */
  pathOf(socketPath: string, disk: string): string;
}
