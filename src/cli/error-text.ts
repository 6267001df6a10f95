/** Formats an error for a person: what failed, each cause with its code, and the remedies. No text is repeated. */
import type { CauseJson, ErrorJson } from '../domain/errors.js';
import type { Refusal } from '../domain/refusal.js';
import { plain, refusalText } from './render.js';

/** Matches system codes such as ENOENT, but not Node's own such as ERR_INVALID_ARG_TYPE, which help no user. */
const ERRNO_NAME = /^E[A-Z0-9]+$/;

export function errorText(program: string, error: ErrorJson): string {
  const refusals =
    error.code === 'PREFLIGHT_REFUSED' && Array.isArray(error.details) ? (error.details as Refusal[]) : [];
  const [head = '', ...because] = levelLines({ ...error, message: withoutReasons(error.message, refusals) });
  return `${program}: ${head}\n${refusalText(refusals)}${becauseText(because)}${remedyText(error)}`;
}

/** The message joins all reasons for callers of the API. A person gets them below, each with its remedy. */
function withoutReasons(message: string, [first]: readonly Refusal[]): string {
  const at = first === undefined ? -1 : message.indexOf(first.reason);
  return at > 0 ? message.slice(0, at).replace(/[:\s]+$/, '') : message;
}

/** Formats causes and remedies only, for use below a table or list that already names the failure. */
export function reasonText(error: ErrorJson): string {
  return `${becauseText(levelLines(error))}${remedyText(error)}`;
}

function becauseText(lines: readonly string[]): string {
  return lines.map((line) => `  because: ${line}\n`).join('');
}

/** Formats the remedies only. */
export function remedyText(error: ErrorJson): string {
  return remediesOf(error)
    .map((remedy) => `  → ${remedy}\n`)
    .join('');
}

/** Returns one line, with its code, for each level of the chain that adds something. */
export function levelLines(error: ErrorJson): string[] {
  const lines = new Map<string, string[]>();
  for (const level of chainOf(error)) {
    const text = plain(ownText(level));
    const codes = lines.get(text) ?? [];
    const code = codeOf(level);
    if (code !== null && !codes.includes(code)) codes.push(code);
    lines.set(text, codes);
  }
  return [...lines].map(([text, codes]) => {
    const unsaid = codes.filter((code) => !text.includes(code));
    return unsaid.length === 0 ? text : `${text} (${unsaid.join(', ')})`;
  });
}

/** Returns the remedies in the order in which they help: the deepest cause's first, the command's own last. */
function remediesOf(error: ErrorJson): string[] {
  const remedies = chainOf(error).flatMap(({ remedy }) => (remedy === undefined ? [] : [plain(remedy)]));
  return [...new Set(remedies.reverse())];
}

function chainOf(error: ErrorJson): CauseJson[] {
  const chain: CauseJson[] = [];
  for (let level: CauseJson | undefined = error; level !== undefined; level = level.cause) chain.push(level);
  return chain;
}

/** Returns the message without the cause's message at its end, because the cause gets a line of its own. */
function ownText({ message, cause, name }: CauseJson): string {
  const text = message === '' ? (name ?? 'no reason given') : message;
  const tail = cause === undefined || cause.message === '' ? null : `: ${cause.message}`;
  return tail !== null && text.endsWith(tail) && text.length > tail.length ? text.slice(0, -tail.length) : text;
}

/** Returns the project's error code, or else the system's (ENOENT). */
function codeOf({ code, details }: CauseJson): string | null {
  if (code !== undefined) return code;
  const { code: systemCode } = (details ?? {}) as { code?: unknown };
  return typeof systemCode === 'string' && ERRNO_NAME.test(systemCode) ? systemCode : null;
}
