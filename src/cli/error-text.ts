/** An error as a person reads it: what failed, why, level by level, and what to do about it. No text comes twice. */
import type { CauseJson, ErrorJson } from '../domain/errors.js';
import type { Refusal } from '../domain/refusal.js';
import { plain, refusalText } from './render.js';

/** ENOENT, and not ERR_INVALID_ARG_TYPE: Node's own say nothing to a person. */
const ERRNO_NAME = /^E[A-Z0-9]+$/;

export function errorText(program: string, error: ErrorJson): string {
  const refusals =
    error.code === 'PREFLIGHT_REFUSED' && Array.isArray(error.details) ? (error.details as Refusal[]) : [];
  const [head = '', ...because] = levelLines(error);
  return `${program}: ${head}\n${refusalText(refusals)}${becauseText(because)}${remedyText(error)}`;
}

/** The same where what failed has been said already, in a table or a list. */
export function reasonText(error: ErrorJson): string {
  return `${becauseText(levelLines(error))}${remedyText(error)}`;
}

function becauseText(lines: readonly string[]): string {
  return lines.map((line) => `  because: ${line}\n`).join('');
}

function remedyText(error: ErrorJson): string {
  return remediesOf(error)
    .map((remedy) => `  → ${remedy}\n`)
    .join('');
}

/** One line for each level that has something to say of its own, with its code. */
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

/** The cause's first, the command's own last: that is the order in which they help. */
function remediesOf(error: ErrorJson): string[] {
  const remedies = chainOf(error).flatMap(({ remedy }) => (remedy === undefined ? [] : [plain(remedy)]));
  return [...new Set(remedies.reverse())];
}

function chainOf(error: ErrorJson): CauseJson[] {
  const chain: CauseJson[] = [];
  for (let level: CauseJson | undefined = error; level !== undefined; level = level.cause) chain.push(level);
  return chain;
}

/** Without the message of the cause at its end, which gets a line to itself. */
function ownText({ message, cause, name }: CauseJson): string {
  const text = message === '' ? (name ?? 'no reason') : message;
  const tail = cause === undefined || cause.message === '' ? null : `: ${cause.message}`;
  return tail !== null && text.endsWith(tail) && text.length > tail.length ? text.slice(0, -tail.length) : text;
}

/** Ours, or that of the system. */
function codeOf({ code, details }: CauseJson): string | null {
  if (code !== undefined) return code;
  const { code: systemCode } = (details ?? {}) as { code?: unknown };
  return typeof systemCode === 'string' && ERRNO_NAME.test(systemCode) ? systemCode : null;
}
