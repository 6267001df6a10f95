/** Sizes as people write them: a number of bytes, or a whole number with K, M, G or T (powers of 1024). */
const UNITS: Readonly<Record<string, number>> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };

/** Returns the size in bytes, or NaN if the text is not a size. */
export function parseSize(text: string): number {
  const match = /^(\d{1,15})\s*([KMGT]?)(i?B)?$/i.exec(text.trim());
  if (match === null) return Number.NaN;
  return Number(match[1]) * (UNITS[(match[2] ?? '').toUpperCase()] ?? Number.NaN);
}
