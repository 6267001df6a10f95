/** How two hosts compare the memory of a move: in chunks (CONSTANTS.MEMORY_CHUNK_BYTES), under a key of that move. */
export interface ChunkRequest {
  /** 64 hex digits. */
  readonly key: string;
  readonly region: number;
  readonly first: number;
  readonly count: number;
}

/** The tags that a target session takes of each page before the VM can see it. */
export interface ArrivalTags {
  /** 64 hex digits. */
  readonly key: string;
  /** A file for each region. */
  readonly paths: readonly string[];
}

/** A region that has arrived, as far as its tags need it. */
export interface TaggedRegion {
  readonly tagPath: string;
  readonly lengthBytes: bigint;
  readonly pageBytes: number;
}
