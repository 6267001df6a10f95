/** What several parts of the native interface share. */
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
