/** The schema of errors in JSON, with their chain of causes. */
import { z } from 'zod';
import { CAUSES_MAX, type CauseJson, ERROR_CODES, type ErrorCode, type ErrorJson } from '../domain/errors.js';
import { of } from './of.js';

const errorCode = z.enum(Object.keys(ERROR_CODES) as [ErrorCode, ...ErrorCode[]]);
const ofAnyCause = {
  message: z.string(),
  remedy: z.string().optional(),
  step: z.string().optional(),
  session: z.string().optional(),
  isRetryable: z.boolean().optional(),
  details: z.unknown().optional(),
};

/**
 * Returns the schema of a cause with at most `levels` causes below it. The depth is fixed, so that a peer's JSON cannot
 * decide how deep the parser goes.
 */
function causeJson(levels: number): z.ZodType<CauseJson> {
  const own = { code: errorCode.optional(), name: z.string().optional(), ...ofAnyCause };
  if (levels === 0) return of<CauseJson>(z.object(own));
  return of<CauseJson>(z.object({ ...own, cause: causeJson(levels - 1).optional() }));
}

export const errorJson = of<ErrorJson>(
  z.object({ code: errorCode, ...ofAnyCause, cause: causeJson(CAUSES_MAX - 1).optional() }),
).meta({ id: 'Error', description: 'What failed, and the chain of its causes.' });
