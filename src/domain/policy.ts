/**
 * What a host lets users name in a VM who are not its administrators. All of it reaches beyond the VM: a path is opened
 * by QEMU, a device or an argument may name one, a bridge leads to a network. By default nothing is allowed. The
 * daemon's configuration allows it, under `security.allow`.
 */
import { MigrationError } from './errors.js';
import type { DiskFormat, VmSpec } from './vm.js';

export interface HostPolicy {
  /** Directories, whose files may be kernels, initial ramdisks and disks, and to which images may be saved. */
  readonly paths: readonly string[];
  /** Bridges that a VM may be connected to. */
  readonly bridges: readonly string[];
  /** Entries of `devices`. "NAME,*" allows the device with any properties, some of which name files. */
  readonly devices: readonly string[];
  /** Single entries of `qemuArgs`. */
  readonly qemuArgs: readonly string[];
}

export type PolicyKey = keyof HostPolicy;

/** An entry that allows everything of its kind. */
export const ANYTHING = '*';

export const NOTHING_ALLOWED: HostPolicy = { paths: [], bridges: [], devices: [], qemuArgs: [] };

export const EVERYTHING_ALLOWED: HostPolicy = {
  ...{ paths: [ANYTHING], bridges: [ANYTHING], devices: [ANYTHING], qemuArgs: [ANYTHING] },
};

/** Something that a policy does not allow: where the spec names it, and the key of the policy that would allow it. */
export interface Forbidden {
  readonly what: string;
  readonly value: string;
  readonly key: PolicyKey;
}

/**
 * Returns what the policy does not allow of a spec, by its words alone: a path must lie in an allowed directory as it
 * is written. What is behind the paths is another question (src/agent/policy/policy.ts).
 */
export function forbiddenIn(spec: NamingSpec, policy: HostPolicy): Forbidden[] {
  const found: Forbidden[] = [];
  const look = (key: PolicyKey, what: string, value: string, isAllowed: boolean): void => {
    if (!isAllowed) found.push({ what, value, key });
  };
  for (const { what, path } of filesIn(spec)) {
    // QEMU takes the initial ramdisk of some kernels for a list.
    const isOne = what !== 'initrd' || !path.includes(',');
    look('paths', what, path, isOne && allowsPath(policy, path));
  }
  for (const { id, bridge } of spec.nics)
    if (bridge !== undefined) look('bridges', `nic ${id}`, bridge, allows(policy.bridges, bridge));
  for (const device of spec.devices) look('devices', 'devices', device, allowsDevice(policy.devices, device));
  for (const argument of spec.qemuArgs) look('qemuArgs', 'qemuArgs', argument, allows(policy.qemuArgs, argument));
  return found;
}

/** The part of a spec that a policy is about. */
export type NamingSpec = Pick<VmSpec, 'kernel' | 'initrd' | 'disks' | 'nics' | 'devices' | 'qemuArgs'>;

export interface NamedFile {
  readonly what: string;
  readonly path: string;
  /** Null: it is no disk. */
  readonly format: DiskFormat | null;
}

/**
 * The files that a spec names. A disk counts also if the spec says that another host serves it, because a stranger can
 * say that of any path, and QEMU opens the path.
 */
export function filesIn({ kernel, initrd, disks }: Pick<VmSpec, 'kernel' | 'initrd' | 'disks'>): NamedFile[] {
  return [
    ...(kernel === undefined ? [] : [{ what: 'kernel', path: kernel, format: null }]),
    ...(initrd === undefined ? [] : [{ what: 'initrd', path: initrd, format: null }]),
    ...disks.map(({ id, path, format }) => ({ what: `disk ${id}`, path, format })),
  ];
}

/** The path must be absolute. One with ".." is not allowed, because a symbolic link decides where that leads. */
export function allowsPath({ paths }: HostPolicy, path: string): boolean {
  if (!path.startsWith('/') || path.split('/').includes('..')) return false;
  return paths.some((allowed) => {
    if (allowed === ANYTHING) return true;
    const directory = allowed.endsWith('/') ? allowed : `${allowed}/`;
    return path.startsWith(directory);
  });
}

/** Throws NOT_PERMITTED, naming all that is forbidden and what would allow it, if there is any. `who` wanted it. */
export function refuseForbidden(forbidden: readonly Forbidden[], who: string, host: string): void {
  if (forbidden.length === 0) return;
  throw new MigrationError('NOT_PERMITTED', `host ${host} does not allow ${who} ${describeForbidden(forbidden)}`, {
    remedy: `let an administrator do it, or ${remedyFor(forbidden, host)}`,
    details: { forbidden },
  });
}

/** The same for what comes from another host, whatever the role of the user there who wants it. */
export function refuseForbiddenToPeers(forbidden: readonly Forbidden[], peer: string, host: string): void {
  if (forbidden.length === 0) return;
  const what = `the policy of host ${host} does not allow what host ${peer} brings: ${describeForbidden(forbidden)}`;
  throw new MigrationError('NOT_PERMITTED', what, { remedy: remedyFor(forbidden, host), details: { forbidden } });
}

export function describeForbidden(forbidden: readonly Forbidden[]): string {
  return forbidden.map(({ what, value }) => `${what} ${JSON.stringify(value)}`).join('; ');
}

/** Says which keys of the configuration would allow it. */
export function remedyFor(forbidden: readonly Forbidden[], host: string): string {
  const keys = [...new Set(forbidden.map(({ key }) => `security.allow.${key}`))];
  return `allow it in the configuration of ${host}, under ${keys.join(' and ')}`;
}

function allows(list: readonly string[], value: string): boolean {
  return list.includes(value) || list.includes(ANYTHING);
}

function allowsDevice(list: readonly string[], device: string): boolean {
  if (allows(list, device)) return true;
  const [name = '', ...properties] = device.split(',');
  // A second driver replaces the first, and what begins with a brace is JSON.
  const isOther = device.startsWith('{') || properties.some((property) => /^\s*driver\s*=/.test(property));
  return !isOther && list.includes(`${name},*`);
}
