/** Computes the progress of a fork from its record and from the sessions that copy its pages. */

import type { ErrorJson } from '../../domain/errors.js';
import type { ForkProgress } from '../../engine/ports/fork.js';
import type { ImageRecord } from '../image/record.js';
import type { CaptureSession } from './capture-session.js';
import type { PrivateCopies } from './private-copies.js';
import type { ForkRecord } from './record.js';

export interface ProgressParts {
  readonly record: ForkRecord;
  readonly image: ImageRecord;
  /** True if the parent continues to run, so that its pages are copied. */
  readonly isCopied: boolean;
  readonly capture: CaptureSession | null;
  readonly copies: PrivateCopies | null;
  readonly failure: ErrorJson | null;
}

export function progressOf({ record, image, isCopied, capture, copies, failure }: ProgressParts): ForkProgress {
  const { sizeBytes, pageBytes } = image.spec.memory;
  const pagesTotal = sizeBytes / pageBytes;
  const isCapturing = isCopied && (capture?.snapshot.state ?? image.state) !== 'complete';
  const isCopying = isCapturing || (record.request.memory === 'private' && copies?.isComplete !== true);
  const { isWarm, clones, outcome } = record;
  return {
    state: failure !== null ? 'failed' : isCopying || record.state !== 'committed' ? 'filling' : 'complete',
    error: failure,
    pagesTotal: pagesTotal + (copies?.pagesTotal ?? 0),
    pagesDone: (isCapturing ? (capture?.pagesDone ?? 0) : pagesTotal) + (copies?.pagesDone ?? 0),
    pageBytes,
    counters: capture?.counters ?? {},
    committed: outcome === null ? null : { image: image.id, isWarm, clones, ...outcome },
  };
}
