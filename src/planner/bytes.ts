export function describeBytes(bytes: number): string {
  const units = ['bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'] as const;
  let value = bytes;
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${Number.isInteger(value) ? value : value.toFixed(1)} ${units[unit] ?? 'bytes'}`;
}

const MIB = 1024 * 1024;

/** What is needed: at least as much as `bytes`. A host may have sent no number. */
export function neededMib(bytes: number): string {
  return Number.isFinite(bytes) ? `${Math.ceil(bytes / MIB)} MiB` : 'nothing';
}

/** What there is: at most as much as `bytes`. */
export function availableMib(bytes: number): string {
  return Number.isFinite(bytes) ? `${Math.max(0, Math.floor(bytes / MIB))} MiB` : 'nothing';
}
