/**
 * Tap devices for guests, joined to a bridge. They are made before QEMU starts and stay until the VM is removed, so
 * QEMU needs no right to run programs. A tap's name derives from host, VM and NIC, so the same VM on two hosts of one
 * machine gets two names.
 *
 * A VM with isolated NICs runs in a network namespace of its own. The namespace has no name and ends with its QEMU, so
 * it needs no cleanup. QEMU makes the taps in the namespace itself. The bridges are made after QEMU's start, while the
 * guest does not run yet.
 */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { promisify } from 'node:util';
import type { Command } from '../../backends/backend.js';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { limitOfError } from '../../domain/limits.js';
import type { NicSpec, VmSpec } from '../../domain/vm.js';

const IP_PROGRAM = '/sbin/ip';
const ENV_PROGRAM = '/usr/bin/env';
const UNSHARE_PROGRAM = '/usr/bin/unshare';
const NSENTER_PROGRAM = '/usr/bin/nsenter';
const IP_TIMEOUT_MS = 5_000;
const run = promisify(execFile);

/** Returns a name of 15 characters, the kernel's maximum. */
export function tapName(host: string, vm: string, nic: string): string {
  return `vmg${createHash('sha256').update(`${host}\0${vm}\0${nic}`).digest('hex').slice(0, 12)}`;
}

export function tapNames(host: string, spec: VmSpec): Record<string, string> {
  const taps = spec.nics.filter((nic) => nic.type !== 'none');
  return Object.fromEntries(taps.map((nic) => [nic.id, tapName(host, spec.name, nic.id)]));
}

export function isIsolated(spec: VmSpec): boolean {
  return spec.nics.some((nic) => nic.type === 'isolated');
}

/**
 * Returns the command that starts QEMU in the VM's own namespace, if the VM has isolated NICs. `env` sets the variables
 * for QEMU alone, because the first program that loads the preload uses it up.
 */
export function inNamespace(spec: VmSpec, command: Command): Command {
  if (!isIsolated(spec)) return command;
  const variables = Object.entries(command.environment).map(([name, value]) => `${name}=${value}`);
  const args = ['--net', '--', ENV_PROGRAM, ...variables, command.program, ...command.args];
  return { program: UNSHARE_PROGRAM, args, environment: {} };
}

/**
 * Makes all taps, or removes them again after a failure. If the VM has isolated NICs, its other NICs are not connected
 * to anything. A process of the user `uid` may attach to them; null: only one of the daemon's user.
 */
export async function createTaps(
  spec: VmSpec,
  taps: Readonly<Record<string, string>>,
  uid: number | null,
): Promise<void> {
  if (isIsolated(spec)) return;
  try {
    for (const nic of spec.nics) {
      const tap = taps[nic.id];
      if (tap !== undefined) await createTap(nic, tap, uid);
    }
  } catch (error) {
    await removeTaps(taps);
    throw error;
  }
}

/** Idempotent. */
export async function removeTaps(taps: Readonly<Record<string, string>>): Promise<void> {
  for (const tap of Object.values(taps)) {
    if (!(await linkNames([])).includes(tap)) continue;
    await ip(['link', 'delete', 'dev', tap], `tap ${tap} cannot be removed`);
  }
}

/** Makes the bridges in the namespace of a VM with isolated NICs, and joins the taps that QEMU has made. Idempotent. */
export async function joinIsolated(spec: VmSpec, taps: Readonly<Record<string, string>>, pid: number): Promise<void> {
  if (!isIsolated(spec)) return;
  const inside = (args: readonly string[], what: string) => ip(args, what, pid);
  for (const nic of spec.nics) {
    const tap = taps[nic.id];
    if (nic.type !== 'isolated' || nic.bridge === undefined || tap === undefined) continue;
    if (!(await linkNames([], pid)).includes(nic.bridge)) {
      await inside(
        ['link', 'add', nic.bridge, 'type', 'bridge'],
        `NIC ${nic.id}: cannot create ${nic.bridge} in the VM's namespace`,
      );
    }
    await inside(['link', 'set', 'dev', nic.bridge, 'up'], `NIC ${nic.id}: cannot set ${nic.bridge} up`);
    await inside(
      ['link', 'set', 'dev', tap, 'master', nic.bridge, 'up'],
      `NIC ${nic.id}: ${tap} cannot join ${nic.bridge}`,
    );
  }
}

/** Joins a tap to its bridge. The tap of an unplugged NIC exists before, without a bridge. */
export async function joinBridge(nic: NicSpec, tap: string): Promise<void> {
  const bridge = nic.bridge ?? '';
  await ip(['link', 'set', 'dev', tap, 'master', bridge, 'up'], `NIC ${nic.id}: ${tap} cannot join ${bridge}`);
}

export async function listBridges(): Promise<string[]> {
  return linkNames(['type', 'bridge']);
}

async function createTap(nic: NicSpec, tap: string, uid: number | null): Promise<void> {
  const { bridge } = nic;
  if (bridge !== undefined && !(await listBridges()).includes(bridge)) {
    throw new MigrationError('NOT_FOUND', `NIC ${nic.id}: this host has no bridge ${bridge}`, {
      remedy: `create it (ip link add ${bridge} type bridge), or set another bridge in the VM's spec`,
    });
  }
  // A tap left by a start that was killed would make `add` fail.
  await removeTaps({ [nic.id]: tap });
  const owner = uid === null ? [] : ['user', String(uid)];
  await ip(['tuntap', 'add', 'dev', tap, 'mode', 'tap', ...owner], `NIC ${nic.id}: cannot create tap ${tap}`);
  if (bridge === undefined) return;
  try {
    await joinBridge(nic, tap);
  } catch (error) {
    await removeTaps({ [nic.id]: tap });
    throw error;
  }
}

/** Asks netlink, because /sys/class/net shows the network namespace of the process that mounted it. */
async function linkNames(filter: readonly string[], pid?: number): Promise<string[]> {
  const links: unknown = JSON.parse(
    (await ip(['-j', 'link', 'show', ...filter], 'cannot list the links', pid)) || '[]',
  );
  if (!Array.isArray(links)) return [];
  return links.map((link: { ifname?: unknown }) => link.ifname).filter((name) => typeof name === 'string');
}

/** Runs `ip`. If `pid` is given, it runs in the network namespace of that process. */
async function ip(args: readonly string[], what: string, pid?: number): Promise<string> {
  const [program, ...line] =
    pid === undefined ? [IP_PROGRAM, ...args] : [NSENTER_PROGRAM, `--net=/proc/${pid}/ns/net`, IP_PROGRAM, ...args];
  try {
    return (await run(program, line, { timeout: IP_TIMEOUT_MS, maxBuffer: 16 * 1024 * 1024 })).stdout;
  } catch (error) {
    const { stderr, code } = error as { stderr?: string; code?: unknown };
    const reason = stderr?.trim() || (error instanceof Error ? error.message : String(error));
    const isRefused = /not permitted/i.test(reason);
    const isMissing = code === 'ENOENT';
    if (limitOfError(error) !== null) throw toMigrationError(error);
    throw new MigrationError(
      isMissing ? 'UNSUPPORTED' : isRefused ? 'NOT_PERMITTED' : 'INTERNAL',
      `${what}: ip ${args.join(' ')}: ${reason}`,
      { cause: error, ...(isMissing ? { remedy: 'install iproute2' } : {}) },
    );
  }
}
