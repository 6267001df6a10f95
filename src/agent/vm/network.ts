/**
 * Tap devices for guests, joined to a bridge. They are made before QEMU starts and stay until the VM is removed, so
 * that QEMU needs no right to run programs. Names come from host, VM and NIC: the same VM on two hosts of one machine
 * gets two names.
 *
 * A VM with isolated NICs runs in a network namespace of its own, which has no name and ends with its QEMU: nothing can
 * be left of it. QEMU makes the taps in there itself; the bridges come after its start, while its guest does not run
 * yet.
 */
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { promisify } from 'node:util';
import type { Command } from '../../backends/backend.js';
import { MigrationError } from '../../domain/errors.js';
import type { NicSpec, VmSpec } from '../../domain/vm.js';

const IP_PROGRAM = '/sbin/ip';
const ENV_PROGRAM = '/usr/bin/env';
const UNSHARE_PROGRAM = '/usr/bin/unshare';
const NSENTER_PROGRAM = '/usr/bin/nsenter';
const IP_TIMEOUT_MS = 5_000;
const run = promisify(execFile);

/** 15 characters, the kernel's maximum. */
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
 * How to start the QEMU of such a VM. The environment is for QEMU alone: the preload is lost on the first program that
 * loads it.
 */
export function inItsNetwork(spec: VmSpec, command: Command): Command {
  if (!isIsolated(spec)) return command;
  const variables = Object.entries(command.environment).map(([name, value]) => `${name}=${value}`);
  const args = ['--net', '--', ENV_PROGRAM, ...variables, command.program, ...command.args];
  return { program: UNSHARE_PROGRAM, args, environment: {} };
}

/**
 * All or none: what was made before a failure is removed again. In a VM with isolated NICs the others are connected to
 * nothing.
 */
export async function createTaps(spec: VmSpec, taps: Readonly<Record<string, string>>): Promise<void> {
  if (isIsolated(spec)) return;
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

/** In the network namespace of a VM with isolated NICs: its bridges, with the taps that QEMU has made. Idempotent. */
export async function joinIsolated(spec: VmSpec, taps: Readonly<Record<string, string>>, pid: number): Promise<void> {
  if (!isIsolated(spec)) return;
  const inside = (args: readonly string[], what: string) => ip(args, what, pid);
  for (const nic of spec.nics) {
    const tap = taps[nic.id];
    if (nic.type !== 'isolated' || nic.bridge === undefined || tap === undefined) continue;
    if (!(await linkNames([], pid)).includes(nic.bridge)) {
      await inside(
        ['link', 'add', nic.bridge, 'type', 'bridge'],
        `NIC ${nic.id}: no bridge ${nic.bridge} in its namespace`,
      );
    }
    await inside(['link', 'set', 'dev', nic.bridge, 'up'], `NIC ${nic.id}: ${nic.bridge} does not come up`);
    await inside(
      ['link', 'set', 'dev', tap, 'master', nic.bridge, 'up'],
      `NIC ${nic.id}: ${tap} cannot join ${nic.bridge}`,
    );
  }
}

/** The bridge is there and the tap joins it: what an unplugged NIC's tap waits for. */
export async function joinBridge(nic: NicSpec, tap: string): Promise<void> {
  const bridge = nic.bridge ?? '';
  await ip(['link', 'set', 'dev', tap, 'master', bridge, 'up'], `NIC ${nic.id}: ${tap} cannot join ${bridge}`);
}

export async function listBridges(): Promise<string[]> {
  return linkNames(['type', 'bridge']);
}

async function createTap(nic: NicSpec, tap: string): Promise<void> {
  const { bridge } = nic;
  if (bridge !== undefined && !(await listBridges()).includes(bridge)) {
    throw new MigrationError('NOT_FOUND', `NIC ${nic.id}: this host has no bridge ${bridge}`, {
      remedy: `create it (ip link add ${bridge} type bridge) or name another in the VM's spec`,
    });
  }
  // One of an earlier run that was killed in between would make `add` fail.
  await removeTaps({ [nic.id]: tap });
  await ip(['tuntap', 'add', 'dev', tap, 'mode', 'tap'], `NIC ${nic.id}: no tap device`);
  if (bridge === undefined) return;
  try {
    await joinBridge(nic, tap);
  } catch (error) {
    await removeTaps({ [nic.id]: tap });
    throw error;
  }
}

/** From netlink, not /sys/class/net: that shows the network namespace of whoever mounted it. */
async function linkNames(filter: readonly string[], pid?: number): Promise<string[]> {
  const links: unknown = JSON.parse((await ip(['-j', 'link', 'show', ...filter], 'no list of links', pid)) || '[]');
  if (!Array.isArray(links)) return [];
  return links.map((link: { ifname?: unknown }) => link.ifname).filter((name) => typeof name === 'string');
}

/** With `pid` in the network namespace of that process. */
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
    throw new MigrationError(
      isMissing ? 'UNSUPPORTED' : isRefused ? 'NOT_PERMITTED' : 'INTERNAL',
      `${what}: ip ${args.join(' ')}: ${reason}`,
      { cause: error, ...(isMissing ? { remedy: 'install iproute2' } : {}) },
    );
  }
}
