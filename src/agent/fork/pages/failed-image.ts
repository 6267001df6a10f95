/** How a host says that an image of it can never be complete. */
import { MigrationError } from '../../../domain/errors.js';

const FAILED = { imageState: 'failed' } as const;

/** The error of an image that can never be complete. `isFinal` knows it, also when it comes from another host. */
export function failedImage(image: string, host: string, cause?: unknown): MigrationError {
  const reason = cause instanceof Error ? `: ${cause.message}` : '';
  return new MigrationError('CONFLICT', `image ${image} on ${host} has failed${reason}`, { details: FAILED });
}

/** The host that has the image says that it can never be complete. Any other error may pass. */
export function isFinal({ details }: MigrationError): boolean {
  return (details as Partial<typeof FAILED> | null | undefined)?.imageState === FAILED.imageState;
}
