import { z } from 'zod';
import { ERROR_CODES, type ErrorCode, type ErrorJson } from '../domain/errors.js';
import { of } from './of.js';

export const errorJson = of<ErrorJson>(
  z.object({
    code: z.enum(Object.keys(ERROR_CODES) as [ErrorCode, ...ErrorCode[]]),
    message: z.string(),
    remedy: z.string().optional(),
    step: z.string().optional(),
    session: z.string().optional(),
    isRetryable: z.boolean().optional(),
    details: z.unknown().optional(),
    cause: z.object({ code: z.string().optional(), message: z.string() }).optional(),
  }),
);
