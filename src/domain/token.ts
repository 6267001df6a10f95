import type { UserRole } from './caller.js';

/** A bearer token as it is shown: everything but the secret. */
export interface TokenView {
  readonly id: string;
  readonly name: string;
  readonly role: UserRole;
  /** ISO times. */
  readonly createdAt: string;
  readonly expiresAt: string;
  /** The name of the caller who made it. */
  readonly createdBy: string;
}
