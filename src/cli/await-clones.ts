/**
 * `vfork --wait`: waits until every clone has reported an exit code or has ended, then returns how each one ended. A
 * daemon lists an ended clone until somebody stops it, so no end is missed.
 */
import { createWriteStream } from 'node:fs';
import { join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { type ApiClient, DaemonUnreachable } from '../api/client.js';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import type { CloneReport } from '../domain/fork.js';
import type { VmView } from '../domain/vm.js';
import { makeDirectories } from '../kit/directory.js';
import type { VmsOnHosts } from '../schemas/all-hosts.js';
import { levelLines } from './error-text.js';
import { plain } from './render.js';
import type { CloneEnd } from './render-fork.js';

const POLL_MS = 250;
const POLL_HOSTS_MS = 1_000;
/** How long the daemon may be unreachable, and another host silent. A restarted daemon finds its VMs again. */
const AWAY_MS_MAX = 60_000;

type Clone = Pick<CloneReport, 'name' | 'index' | 'uuid' | 'host'>;

export interface HostCloneEnd extends CloneEnd {
  /** Where the clone was seen last. */
  readonly host: string;
}

export async function awaitClones(
  api: ApiClient,
  clones: readonly Clone[],
  logDirectory: string | null,
): Promise<HostCloneEnd[]> {
  // A folder that cannot be made is told before the wait, which may be long.
  if (logDirectory !== null) await makeFolder(logDirectory);
  const { found, isSpread } = await untilEnded(api, clones);
  const ends: HostCloneEnd[] = [];
  for (const { clone, host, vm, reason } of found) {
    const { name, index } = clone;
    const place = (vm?.serialLog ?? null) === null ? null : isSpread ? `${host}:${vm?.serialLog}` : vm?.serialLog;
    const log = vm === null || logDirectory === null ? place : await saveLog(api, vm, logDirectory);
    ends.push({ name, index, host, ...(vm === null ? { exitCode: null, reason } : endOf(vm)), log: log ?? null });
  }
  return ends;
}

async function makeFolder(path: string): Promise<void> {
  await makeDirectories(resolve(path), 0o755).catch((cause: unknown) => {
    throw new MigrationError('USAGE', `${path} cannot be made for the logs; the clones run on: vmctl ps`, { cause });
  });
}

/** As long as this daemon has all clones, no other host is asked. */
async function untilEnded(api: ApiClient, clones: readonly Clone[]): Promise<{ found: Found[]; isSpread: boolean }> {
  const watch = new CloneWatch(clones, AWAY_MS_MAX);
  let isSpread = new Set(clones.map(({ host }) => host)).size > 1;
  let awayAtMs: number | null = null;
  for (;;) {
    try {
      const here = isSpread ? null : await api.get<VmView[]>('/v1/vms');
      if (here !== null && !watch.areAllIn(here)) isSpread = true;
      const known = isSpread ? await api.get<VmsOnHosts>('/v1/vms?allHosts=true') : { vms: here ?? [], unanswered: [] };
      awayAtMs = null;
      const found = watch.take(known, performance.now());
      if (found !== null) return { found, isSpread };
    } catch (error) {
      awayAtMs ??= performance.now();
      if (!(error instanceof DaemonUnreachable) || performance.now() - awayAtMs > AWAY_MS_MAX) throw error;
    }
    await new Promise((wake) => setTimeout(wake, isSpread ? POLL_HOSTS_MS : POLL_MS));
  }
}

/** What has become of a clone. `vm` is null if nobody lists it, for the reason that is given. */
export interface Found {
  readonly clone: Clone;
  readonly host: string;
  readonly vm: VmView | null;
  readonly reason: string;
}

/**
 * Follows clones by name and UUID over all hosts. A clone that has moved is listed on its new host, and until the move
 * is over on both.
 */
export class CloneWatch {
  readonly #clones: readonly Clone[];
  readonly #silentMsMax: number;
  readonly #silentSinceMs = new Map<string, number>();
  /** Where each clone was seen last. */
  readonly #hosts: Map<string, string>;
  /** The latest view of each clone that is over. Its host may fall silent before the others are over. */
  readonly #over = new Map<string, VmView>();

  constructor(clones: readonly Clone[], silentMsMax: number) {
    this.#clones = clones;
    this.#silentMsMax = silentMsMax;
    this.#hosts = new Map(clones.map(({ name, host }) => [name, host]));
  }

  /** True if all clones are among these VMs, and none is on its way to or from another host. */
  areAllIn(vms: readonly VmView[]): boolean {
    const views = byName(vms);
    return this.#clones.every((clone) => {
      const view = newestOf(views, clone);
      return view !== undefined && !isOnTheWay(view);
    });
  }

  /** Takes the answers of the hosts. Returns what has become of the clones when none is waited for any more. */
  take({ vms, unanswered }: VmsOnHosts, nowMs: number): Found[] | null {
    const { silent, lost } = this.#silence(unanswered, nowMs);
    const views = byName(vms);
    const found = this.#clones.map((clone) => this.#find(clone, newestOf(views, clone), silent, lost));
    return found.every((one) => one !== null) ? found : null;
  }

  /** Returns the hosts that are waited for, and those that have been silent for too long. */
  #silence(unanswered: VmsOnHosts['unanswered'], nowMs: number): { silent: string[]; lost: string[] } {
    // A host of an earlier build will never say.
    const hosts = unanswered.flatMap(({ host, error }) => (error.code === 'UNSUPPORTED' ? [] : [host]));
    for (const host of this.#silentSinceMs.keys()) if (!hosts.includes(host)) this.#silentSinceMs.delete(host);
    const isLost = (host: string): boolean => {
      const sinceMs = this.#silentSinceMs.get(host) ?? nowMs;
      this.#silentSinceMs.set(host, sinceMs);
      return nowMs - sinceMs > this.#silentMsMax;
    };
    const lost = hosts.filter(isLost);
    return { silent: hosts.filter((host) => !lost.includes(host)), lost };
  }

  /** Null: the clone is waited for. */
  #find(clone: Clone, view: VmView | undefined, silent: readonly string[], lost: readonly string[]): Found | null {
    const { name } = clone;
    if (view !== undefined) {
      this.#hosts.set(name, view.host);
      const isLeft = isOnTheWay(view) && lost.includes(view.leaving?.target ?? view.arriving?.source ?? '');
      // A clone whose memory is damaged never goes on.
      const isOver = view.state === 'stopped' || view.exitCode !== null || view.damage !== undefined;
      if (isOver) this.#over.set(name, view);
      else if (!isLeft) return null;
    }
    const host = this.#hosts.get(name) ?? clone.host;
    const vm = this.#over.get(name) ?? null;
    if (vm !== null) return { clone, host, vm, reason: '' };
    if (silent.length > 0 && view === undefined) return null;
    const others = lost.filter((other) => other !== host).join(', ');
    if (lost.includes(host)) return { clone, host, vm, reason: `unknown: ${host} does not answer` };
    return { clone, host, vm, reason: others === '' ? 'removed' : `unknown: no answer from ${others}` };
  }
}

function byName(vms: readonly VmView[]): Map<string, VmView[]> {
  const views = new Map<string, VmView[]>();
  for (const vm of vms) views.set(vm.name, [...(views.get(vm.name) ?? []), vm]);
  return views;
}

/** Returns the view of the host that runs the clone, or has run it last: that with the newest epoch. */
function newestOf(views: ReadonlyMap<string, readonly VmView[]>, { name, uuid }: Clone): VmView | undefined {
  // A VM whose record cannot be read may have no UUID.
  const own = (views.get(name) ?? []).filter((vm) => vm.uuid === uuid || vm.uuid === '');
  const settled = own.filter((vm) => !isOnTheWay(vm));
  return [...(settled.length > 0 ? settled : own)].sort((a, b) => b.epoch - a.epoch)[0];
}

function isOnTheWay({ state }: VmView): boolean {
  return state === 'departed' || state === 'incoming';
}

function endOf({ exit, exitCode, damage }: VmView): Pick<CloneEnd, 'exitCode' | 'reason'> {
  if (exit !== null) return { exitCode: exit.exitCode ?? exitCode, reason: exit.reason };
  return { exitCode, reason: exitCode === null && damage !== undefined ? 'damaged' : 'its word' };
}

/**
 * Saves the serial log as it is now, and returns its path. A clone that has reported its exit code may end soon, or may
 * keep running.
 */
async function saveLog(api: ApiClient, { name, host }: VmView, directory: string): Promise<string | null> {
  const path = resolve(join(directory, `${name}.log`));
  try {
    await pipeline(await api.serialLogOn(host, name), createWriteStream(path));
    return path;
  } catch (thrown) {
    const error = toMigrationError(thrown);
    if (error instanceof DaemonUnreachable || !OF_OTHERS.has(error.code)) throw error;
    // Somebody else has removed the clone, or its host has gone: all exit codes and the other logs remain.
    const why = levelLines(error.toJSON()).join(': ');
    if (error.code !== 'NOT_FOUND') process.stderr.write(`warning: ${plain(`log of ${name} on ${host}: ${why}`)}\n`);
    return null;
  }
}

const OF_OTHERS: ReadonlySet<string> = new Set([
  ...['NOT_FOUND', 'UNREACHABLE', 'TIMEOUT', 'DISCONNECTED', 'PEER_PROTOCOL', 'UNAUTHENTICATED'],
]);
