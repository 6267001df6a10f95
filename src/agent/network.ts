/**
 * Tap devices for guests, joined to a bridge. They are made before QEMU starts and stay until the VM is removed, so that QEMU needs no right to
 * run programs. Names come from host, VM and NIC: the same VM on two hosts of one machine gets two names.
 */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { promisify } from 'node:util';
import type { NicSpec, VmSpec } from '../domain.js';
import { MigrationError } from '../errors.js';

const IP_PROGRAM = '/sbin/ip';
const IP_TIMEOUT_MS = 5_000;
const run = promisify(execFile);

/** 15 characters, the kernel's maximum. */
export function tapName(host: string, vm: string, nic: string): string {
  return `vmg${createHash('sha256').update(`${host}\0${vm}\0${nic}`).digest('hex').slice(0, 12)}`;
}

export function tapNames(host: string, spec: VmSpec): Record<string, string> {
  const taps = spec.nics.filter((nic) => nic.type === 'tap');
  return Object.fromEntries(taps.map((nic) => [nic.id, tapName(host, spec.name, nic.id)]));
}

/** All or none: what was made before a failure is removed again. */
export async function createTaps(spec: VmSpec, taps: Readonly<Record<string, string>>): Promise<void> {
  try {
    for (const nic of spec.nics) {
      const tap = taps[nic.id];
      if (tap !== undefined) await createTap(nic, tap);
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

export async function listBridges(): Promise<string[]> {
  return linkNames(['type', 'bridge']);
}

async function createTap(nic: NicSpec, tap: string): Promise<void> {
  const bridge = nic.bridge ?? '';
  if (!(await listBridges()).includes(bridge)) {
    throw new MigrationError('NOT_FOUND', `NIC ${nic.id}: this host has no bridge ${bridge}`, {
      remedy: `create it (ip link add ${bridge} type bridge) or name another in the VM's spec`,
    });
  }
  // One of an earlier run that was killed in between would make `add` fail.
  await removeTaps({ [nic.id]: tap });
  await ip(['tuntap', 'add', 'dev', tap, 'mode', 'tap'], `NIC ${nic.id}: no tap device`);
  try {
    await ip(['link', 'set', 'dev', tap, 'master', bridge, 'up'], `NIC ${nic.id}: ${tap} cannot join ${bridge}`);
  } catch (error) {
    await removeTaps({ [nic.id]: tap });
    throw error;
  }
}

/** From netlink, not /sys/class/net: that shows the network namespace of whoever mounted it. */
async function linkNames(filter: readonly string[]): Promise<string[]> {
  const links: unknown = JSON.parse((await ip(['-j', 'link', 'show', ...filter], 'no list of links')) || '[]');
  if (!Array.isArray(links)) return [];
  return links.map((link: { ifname?: unknown }) => link.ifname).filter((name) => typeof name === 'string');
}

async function ip(args: readonly string[], what: string): Promise<string> {
  try {
    return (await run(IP_PROGRAM, args, { timeout: IP_TIMEOUT_MS, maxBuffer: 16 * 1024 * 1024 })).stdout;
  } catch (error) {
    const { stderr, code } = error as { stderr?: string; code?: unknown };
    const reason = stderr?.trim() || (error instanceof Error ? error.message : String(error));
    const isRefused = /not permitted/i.test(reason);
    const isMissing = code === 'ENOENT';
    throw new MigrationError(
      isMissing ? 'UNSUPPORTED' : isRefused ? 'NOT_PERMITTED' : 'INTERNAL',
      `${what}: ip ${args.join(' ')}: ${reason}`,
      { cause: error, ...(isMissing ? { remedy: 'install iproute2' } : {}) },
    );
  }
}
