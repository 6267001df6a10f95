/**
 * Queries the capabilities of the installed QEMU and of the host's KVM. A daemon asks QEMU once, so an upgrade of QEMU
 * is noticed after a restart of the daemon.
 */

import { execFile } from 'node:child_process';
import { constants } from 'node:fs';
import { access, open, readFile } from 'node:fs/promises';
import { promisify } from 'node:util';
import { MigrationError } from '../../domain/errors.js';
import type { Accel, AccelChoice } from '../../domain/vm.js';

const run = promisify(execFile);
/** Only a program that hangs is given up. A host under load may take seconds to load QEMU. */
const ASK_TIMEOUT_MS = 30_000;

export interface InstalledQemu {
  readonly program: string;
  /** "7.2.22" */
  readonly version: string;
  readonly machines: readonly string[];
  /** "q35" → "pc-q35-7.2" */
  readonly aliases: Readonly<Record<string, string>>;
}

/** Throws UNSUPPORTED if the program is missing or does not answer. */
export async function askQemu(program: string): Promise<InstalledQemu> {
  try {
    const options = { timeout: ASK_TIMEOUT_MS };
    const text = (await run(program, ['--version'], options)).stdout;
    const version = /version (\d+(\.\d+)+)/.exec(text)?.[1];
    // At the time limit Node drops the output, and calls that a success if the program has just ended.
    if (version === undefined) throw new Error('it does not say which version it is');
    const { machines, aliases } = parseMachines((await run(program, ['-machine', 'help'], options)).stdout);
    if (machines.length === 0) throw new Error('it does not say which machine types it has');
    return { program, version, machines, aliases };
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new MigrationError('UNSUPPORTED', `${program} does not work: ${message}`, {
      cause: error,
      remedy: 'install qemu-system-x86',
    });
  }
}

export function parseMachines(help: string): { machines: string[]; aliases: Record<string, string> } {
  const machines: string[] = [];
  const aliases: Record<string, string> = {};
  for (const line of help.split('\n').slice(1)) {
    const name = /^(\S+)\s/.exec(line)?.[1];
    if (name === undefined) continue;
    machines.push(name);
    const real = /\(alias of ([^)\s]+)\)/.exec(line)?.[1];
    if (real !== undefined) aliases[name] = real;
  }
  return { machines, aliases };
}

/** Resolves an alias to the versioned name on this host. Throws UNSUPPORTED if this QEMU has no such machine. */
export function resolveMachine(qemu: InstalledQemu, machine: string): string {
  const resolved = qemu.aliases[machine] ?? machine;
  if (qemu.machines.includes(resolved)) return resolved;
  throw new MigrationError('UNSUPPORTED', `QEMU ${qemu.version} on this host has no machine type ${machine}`);
}

/**
 * True if the CPU has vmx or svm and /dev/kvm opens. The flag is needed, because a nested host without it can have a
 * /dev/kvm that creates VMs and then hangs ordinary kernels.
 */
export async function isKvmUsable(): Promise<boolean> {
  const flags = /^flags\s*:(.*)$/m.exec(await readFile('/proc/cpuinfo', 'utf8').catch(() => ''))?.[1] ?? '';
  if (!/\b(vmx|svm)\b/.test(flags)) return false;
  try {
    await access('/dev/kvm', constants.R_OK | constants.W_OK);
    await (await open('/dev/kvm', 'r+')).close();
    return true;
  } catch {
    return false;
  }
}

export async function resolveAccel(accel: AccelChoice): Promise<Accel> {
  if (accel === 'tcg') return 'tcg';
  const isUsable = await isKvmUsable();
  if (accel === 'kvm' && !isUsable) {
    throw new MigrationError('UNSUPPORTED', 'KVM cannot be used on this host', {
      remedy: 'set accel: tcg or accel: auto',
    });
  }
  return isUsable ? 'kvm' : 'tcg';
}
