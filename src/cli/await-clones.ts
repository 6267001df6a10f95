/**
 * `vfork --wait`: waits until every clone has reported an exit code or has ended, then returns how each one ended. The
 * daemon lists an ended clone until somebody stops it, so no end is missed.
 */
import { createWriteStream } from 'node:fs';
import { join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { type ApiClient, DaemonUnreachable } from '../api/client.js';
import { MigrationError } from '../domain/errors.js';
import type { CloneReport } from '../domain/fork.js';
import type { VmView } from '../domain/vm.js';
import { makeDirectories } from '../kit/directory.js';
import type { CloneEnd } from './render-fork.js';

const POLL_MS = 250;
/** How long the daemon may be unreachable. A restarted daemon finds its VMs again. */
const AWAY_MS_MAX = 60_000;

export async function awaitClones(
  api: ApiClient,
  clones: readonly CloneReport[],
  logDirectory: string | null,
): Promise<CloneEnd[]> {
  // A folder that cannot be made is told before the wait, which may be long.
  if (logDirectory !== null) await makeFolder(logDirectory);
  const vms = await untilEnded(api, new Set(clones.map(({ name }) => name)));
  const ends: CloneEnd[] = [];
  for (const { name, index } of clones) {
    const vm = vms.get(name);
    const log =
      vm === undefined || logDirectory === null ? (vm?.serialLog ?? null) : await saveLog(api, name, logDirectory);
    ends.push({ name, index, ...endOf(vm), log });
  }
  return ends;
}

async function makeFolder(path: string): Promise<void> {
  await makeDirectories(resolve(path), 0o755).catch((cause: unknown) => {
    throw new MigrationError('USAGE', `${path} cannot be made for the logs; the clones run on: vmctl ps`, { cause });
  });
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

/** If a clone is no longer listed, somebody else has stopped and removed it. */
function endOf(vm: VmView | undefined): Pick<CloneEnd, 'exitCode' | 'reason'> {
  if (vm === undefined) return { exitCode: null, reason: 'removed' };
  if (vm.exit !== null) return { exitCode: vm.exit.exitCode ?? vm.exitCode, reason: vm.exit.reason };
  return { exitCode: vm.exitCode, reason: 'its word' };
}

/**
 * Saves the serial log as it is now, and returns its path. A clone that has reported its exit code may end soon, or may
 * keep running.
 */
async function saveLog(api: ApiClient, name: string, directory: string): Promise<string | null> {
  const path = resolve(join(directory, `${name}.log`));
  try {
    const line = await api.serialLog(name);
    line.end();
    await pipeline(line, createWriteStream(path));
    return path;
  } catch (error) {
    // Somebody else has stopped and removed the clone. All exit codes and the logs of the other clones remain.
    if (error instanceof MigrationError && error.code === 'NOT_FOUND') return null;
    throw error;
  }
}
