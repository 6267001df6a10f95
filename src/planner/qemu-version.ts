export interface QemuVersion {
  readonly major: number;
  readonly minor: number;
}

/**
 * Parses "7.2.22" or "7.2.22 (Debian 1:7.2+dfsg-7)". Returns null if the text does not begin with a version. The third
 * number does not count: stable updates do not change what migrates.
 */
export function parseQemuVersion(text: string): QemuVersion | null {
  const match = /^(\d{1,4})\.(\d{1,4})(?:\D|$)/.exec(text);
  return match === null ? null : { major: Number(match[1]), minor: Number(match[2]) };
}

export function isOlder(version: QemuVersion, than: QemuVersion): boolean {
  return version.major < than.major || (version.major === than.major && version.minor < than.minor);
}
