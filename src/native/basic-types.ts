/** What several parts of the native interface share. */
import type { DataSecurity } from '../domain/data-security.js';

/** The session that a data connection belongs to. The token itself never crosses it, but in the older hello. */
export interface Credentials {
  /** 32 hex digits */
  readonly session: string;
  /** 64 hex digits */
  readonly token: string;
  /**
   * Of a provider whose frames this library sends: what a connection asks for, or the least that a source session
   * takes. Absent: `integrity`.
   */
  readonly dataSecurity?: DataSecurity;
  /** Says the older hello, whose connections have no protection; of a source session: takes it too. */
  readonly isOldHello?: boolean;
}

export interface RegionFile {
  readonly path: string;
  readonly lengthBytes: bigint;
  readonly pageBytes: number;
  /**
   * QEMU maps the file copy-on-write (`share=off`), as a clone maps its image. Used by listenForVm, adoptVm, and the
   * source of openImageCapture if the parent is itself a clone: pages that it has written are read from its process.
   */
  readonly isPrivate?: boolean;
}

export interface NativeFailure {
  /** NATIVE_ERROR value */
  readonly code: number;
  readonly errno: number;
  readonly what: string;
}

/**
 * Numbers of clusters in the order in which clones have touched them first. As an argument it is a hint: numbers that
 * do not exist, or come again, do no harm.
 */
export type TouchOrder = Uint32Array;
