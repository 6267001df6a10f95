/** Schemas of bearer tokens. */
import { z } from 'zod';
import { USER_ROLES } from '../domain/caller.js';
import type { TokenView } from '../domain/token.js';

const DAY_MS = 86_400_000;
const EXPIRES_IN_MS_MAX = 3650 * DAY_MS;

export const tokenName = z
  .string()
  .min(1)
  .max(48)
  .regex(/^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$/, 'must be letters, digits, ".", "_" and "-"');

export const tokenBody = z.strictObject({
  name: tokenName,
  role: z.enum(USER_ROLES),
  expiresInMs: z.int().min(1_000).max(EXPIRES_IN_MS_MAX),
});
export type TokenBody = z.input<typeof tokenBody>;

/** A name or an id. */
export const tokenParams = z.strictObject({ name: tokenName });

const view = z.object({
  id: z.string(),
  name: z.string(),
  role: z.enum(USER_ROLES),
  createdAt: z.string(),
  expiresAt: z.string(),
  createdBy: z.string(),
});
export const tokenView: z.ZodType<TokenView> = view;

/** The only answer that has the secret. */
export const newToken = view.extend({ token: z.string() });

export const callerView = z.object({
  host: z.string(),
  name: z.string(),
  role: z.enum([...USER_ROLES, 'host']),
  from: z.string(),
});
export type CallerView = z.output<typeof callerView>;
