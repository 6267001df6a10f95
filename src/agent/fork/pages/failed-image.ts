/** How a host says that an image of it can never be complete. */
import { MigrationError } from '../../../domain/errors.js';

const FAILED = { imageState: 'failed' } as const;

/** The error of an image that can never be complete. `isFinal` knows it, also when it comes from another host. */
export function failedImage(image: string, host: string, cause?: unknown): MigrationError {
  const reason = cause instanceof Error ? `: ${cause.message}` : '';
  return new MigrationError('CONFLICT', `image ${image} on ${host} has failed${reason}`, { details: FAILED });
}

/** The reason in the exit of clones that end because the root is no peer any more (decision/removed-root.ts). */
export const ROOT_REMOVED = 'root-removed';

/** The error of an image whose missing pages can never come for that reason. `isFinal` knows it. */
export function rootRemoved(image: string, host: string): MigrationError {
  const message = `image ${image} lacks pages that only ${host} has, and ${host} is not among the peers of this host`;
  return new MigrationError('NOT_FOUND', message, { details: { ...FAILED, exitReason: ROOT_REMOVED } });
}

/** The reason in the exit of clones that end for this failure of their image. */
export function exitReasonOf({ details }: { readonly details?: unknown }): string {
  const { exitReason } = (details ?? {}) as { exitReason?: unknown };
  return exitReason === ROOT_REMOVED ? ROOT_REMOVED : 'stopped';
}

/** The host that has the image says that it can never be complete. Any other error may pass. */
export function isFinal({ details }: MigrationError): boolean {
  return (details as Partial<typeof FAILED> | null | undefined)?.imageState === FAILED.imageState;
}
