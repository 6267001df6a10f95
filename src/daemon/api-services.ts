/**
 * What the API needs of the daemon's parts (src/api/contract/ports.ts): translations of one call into another, and what
 * a user's call is checked for before it reaches a part.
 */
import { constants, openSync, writeSync } from 'node:fs';
import type { Logger } from 'pino';
import type { LocalAgent } from '../agent/agent.js';
import { refuseUnusableFiles } from '../agent/inventory/spec-files.js';
import { forbiddenOnHost, refuseForbiddenPath } from '../agent/policy/policy.js';
import { openConsole } from '../agent/vm/console.js';
import type { VmManager } from '../agent/vm/vms.js';
import type { ApiAudit, ApiImages, ApiPolicy, ApiPool, ApiVms } from '../api/contract/ports.js';
import type { DiskFiles } from '../backends/disk-files.js';
import type { DaemonConfig } from '../config.js';
import { MigrationError } from '../domain/errors.js';
import { refuseForbidden } from '../domain/policy.js';
import type { VmSpec } from '../domain/vm.js';
import { LogLimit } from '../kit/log-limit.js';

const STDERR = 2;
/** In a second: many more than the calls of a fork with all of its hosts. */
const HOST_LINES_MAX = 200;

export function apiPolicy({ name: host, security }: DaemonConfig, diskFiles: DiskFiles): ApiPolicy {
  const policy = security.allow;
  return {
    async refuseSpec(spec, caller) {
      if (caller?.role === 'admin') return;
      refuseForbidden(await forbiddenOnHost(spec, policy, diskFiles), caller?.name ?? 'a stranger', host);
    },
    async refusePath(path, caller) {
      if (caller?.role === 'admin') return;
      await refuseForbiddenPath(path, { policy, who: caller?.name ?? 'a stranger', host });
    },
  };
}

/**
 * The audit log is kept at every log level. Each line is written before the caller hears of the result. A line that
 * cannot be written goes to the daemon's log, with the reason. Throws SPEC_INVALID if the file cannot be opened.
 */
export function auditLog({ name: host, security }: DaemonConfig, log: Logger): ApiAudit {
  const descriptor = security.auditLog === undefined ? STDERR : openAuditLog(security.auditLog);
  const strangers = new LogLimit();
  const ofHost = new Map<string, LogLimit>();
  const failures = new LogLimit();
  const write = (entry: object): void => {
    const line = `${JSON.stringify({ time: new Date().toISOString(), host, part: 'audit', ...entry })}\n`;
    try {
      writeSync(descriptor, line);
    } catch (err) {
      failures.log((omitted) => log.error({ err, ...entry, ...omitted }, 'a line of the audit log cannot be written'));
    }
  };
  /** Each host has a limit of its own, so that none hides the lines of another. */
  const limitOf = (who: string): LogLimit | null => {
    if (!who.startsWith('host/')) return null;
    const limit = ofHost.get(who) ?? new LogLimit(HOST_LINES_MAX);
    ofHost.set(who, limit);
    return limit;
  };
  return {
    note(entry) {
      // Strangers, and hosts that have been taken over, make lines without end: somebody answers for each user.
      const limit = entry.who === 'unknown' ? strangers : limitOf(entry.who);
      if (limit === null) write(entry);
      else limit.log((omitted) => write({ ...entry, ...omitted }));
    },
  };
}

function openAuditLog(path: string): number {
  try {
    // Without O_NONBLOCK a FIFO would hold up the start of the daemon.
    const { O_WRONLY, O_APPEND, O_CREAT, O_NOCTTY, O_NONBLOCK } = constants;
    return openSync(path, O_WRONLY | O_APPEND | O_CREAT | O_NOCTTY | O_NONBLOCK, 0o600);
  } catch (cause) {
    throw new MigrationError('SPEC_INVALID', `the audit log ${path} cannot be opened`, {
      remedy: 'make its directory, or name another file under security.auditLog',
      cause,
    });
  }
}

export function apiImages(agent: LocalAgent): ApiImages {
  return {
    list: () => agent.images.list(),
    find: (id) => agent.images.find(id),
    remove: (id, options) => agent.images.remove(id, options),
    prune: (options) => agent.images.prune(options),
    save: (id, path, options) => agent.images.save(id, path, options),
    load: (path, options) => agent.images.load(path, options),
    flatten: (vm) => agent.images.flatten(vm),
  };
}

export function apiPool(agent: LocalAgent): ApiPool {
  return {
    list: () => agent.pool.list(),
    warm: (request) => agent.pool.warm(request),
    drain: (vm) => agent.pool.drain(vm),
  };
}

export function apiVms(vms: VmManager, agent: LocalAgent): ApiVms {
  const { userVms } = agent;
  return {
    async run(spec, { isNameForced } = { isNameForced: false }) {
      await refuseUnusableFiles(vms.backend.diskFiles, spec);
      await agent.images.refuseWritesToImages(spec);
      return agent.names.guard(spec, isNameForced, async ({ epochMin, warnings }) => {
        const view = await vms.run(spec, { epochMin });
        const all = [...warnings, ...bootWarnings(vms, spec)];
        return all.length === 0 ? view : { ...view, warnings: all };
      });
    },
    list: () => userVms.list(),
    find: (name) => userVms.find(name),
    locate: (name) => userVms.located(name, () => userVms.find(name)),
    pause: (name) => userVms.located(name, () => vms.pause(name)),
    resume: (name) =>
      userVms.located(name, async () => {
        await agent.names.refuseIfElsewhere(name, vms.get(name).spec.uuid);
        await vms.resume(name);
      }),
    reset: (name) => userVms.located(name, () => vms.reset(name)),
    stop: (name, options) => userVms.stop(name, options),
    openConsole(name, options) {
      const { socket, log } = vms.serialPaths(name);
      const kept = () => vms.get(name).process.outputKept();
      const isFollowing = options.isFollowing && vms.get(name).state !== 'stopped';
      return openConsole({ ...options, isFollowing, socketPath: isFollowing ? socket : null, logPath: log, kept });
    },
  };
}

function bootWarnings({ backend }: VmManager, spec: VmSpec): string[] {
  if (backend.devicesIn(spec).hasBootSource) return [];
  return [`${spec.name} has nothing to boot from: its spec names neither kernel nor disks`];
}
