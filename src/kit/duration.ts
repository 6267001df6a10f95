/** Durations as people write them: a whole number with s, m, h or d. */
const UNITS_MS: Readonly<Record<string, number>> = { s: 1_000, m: 60_000, h: 3_600_000, d: 86_400_000 };

/** Returns milliseconds, or NaN if the text is not a duration. */
export function parseDuration(text: string): number {
  const match = /^(\d{1,9})\s*([smhd])$/.exec(text.trim());
  if (match === null) return Number.NaN;
  return Number(match[1]) * (UNITS_MS[match[2] ?? ''] ?? Number.NaN);
}
