/**
 * `vfork --wait`: until every clone has said its exit code or has ended, then how. A clone that has ended stays listed
 * until somebody stops it, so nothing is missed.
 */
import { createWriteStream } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { type ApiClient, DaemonUnreachable } from '../api/client.js';
import { MigrationError } from '../domain/errors.js';
import type { CloneReport } from '../domain/fork.js';
import type { VmView } from '../domain/vm.js';
import type { CloneEnd } from './render-fork.js';

const POLL_MS = 250;
/** A daemon that restarts finds its VMs again. */
const AWAY_MS_MAX = 60_000;

export async function awaitClones(
  api: ApiClient,
  clones: readonly CloneReport[],
  logDirectory: string | null,
): Promise<CloneEnd[]> {
  const vms = await untilEnded(api, new Set(clones.map(({ name }) => name)));
  if (logDirectory !== null) await mkdir(logDirectory, { recursive: true });
  const ends: CloneEnd[] = [];
  for (const { name, index } of clones) {
    const vm = vms.get(name);
    const log =
      vm === undefined || logDirectory === null ? (vm?.serialLog ?? null) : await keep(api, name, logDirectory);
    ends.push({ name, index, ...endOf(vm), log });
  }
  return ends;
}

async function untilEnded(api: ApiClient, names: ReadonlySet<string>): Promise<Map<string, VmView>> {
  let awayAtMs: number | null = null;
  for (;;) {
    try {
      const vms = (await api.get<VmView[]>('/v1/vms')).filter(({ name }) => names.has(name));
      awayAtMs = null;
      if (vms.every(({ state, exitCode }) => state === 'stopped' || exitCode !== null))
        return new Map(vms.map((vm) => [vm.name, vm]));
    } catch (error) {
      awayAtMs ??= performance.now();
      if (!(error instanceof DaemonUnreachable) || performance.now() - awayAtMs > AWAY_MS_MAX) throw error;
    }
    await new Promise((wake) => setTimeout(wake, POLL_MS));
  }
}

/** One that is not listed any more was stopped and forgotten by somebody else. */
function endOf(vm: VmView | undefined): Pick<CloneEnd, 'exitCode' | 'reason'> {
  if (vm === undefined) return { exitCode: null, reason: 'removed' };
  if (vm.exit !== null) return { exitCode: vm.exit.exitCode ?? vm.exitCode, reason: vm.exit.reason };
  return { exitCode: vm.exitCode, reason: 'its word' };
}

/** As far as it goes: a clone that has said its code may be about to end, or may run on. */
async function keep(api: ApiClient, name: string, directory: string): Promise<string | null> {
  const path = resolve(join(directory, `${name}.log`));
  try {
    const line = await api.serialLog(name);
    line.end();
    await pipeline(line, createWriteStream(path));
    return path;
  } catch (error) {
    // Stopped and forgotten by somebody else meanwhile. The others' logs and all codes are there.
    if (error instanceof MigrationError && error.code === 'NOT_FOUND') return null;
    throw error;
  }
}
