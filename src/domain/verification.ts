/** Whether the target's memory was proven to be what the source's was, in the report of a move that asked for it. */
export interface MemoryVerification {
  /** False: something could not be compared, and `reason` says why. Then nothing is proven. */
  readonly isComplete: boolean;
  /** What has been compared, and was equal. */
  readonly chunks: number;
  readonly pages: number;
  readonly ms: number;
  readonly reason?: string;
}

/** A chunk that differs. */
export interface DifferentChunk {
  readonly region: string;
  readonly offsetBytes: number;
  readonly lengthBytes: number;
}

/** CONSTANTS.MEMORY_CHUNK_BYTES, MEMORY_CHUNKS_MAX and PAGE_TAG_BYTES of protocol/wire.ts. */
export const CHUNK_BYTES = 2 ** 21;
export const CHUNKS_PER_CALL_MAX = 64;
export const DIGEST_BYTES = 16;
