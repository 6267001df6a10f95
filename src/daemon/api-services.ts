/**
 * What the API needs of the daemon's parts (src/api/contract/ports.ts): translations of one call into another, and what
 * a user's call is checked for before it reaches a part.
 */
import { openSync } from 'node:fs';
import { pino } from 'pino';
import type { LocalAgent } from '../agent/agent.js';
import { forbiddenOnHost, refuseForbiddenPath } from '../agent/inventory/policy.js';
import { refuseUnusableFiles } from '../agent/inventory/spec-files.js';
import { openConsole } from '../agent/vm/console.js';
import type { VmManager } from '../agent/vm/vms.js';
import type { ApiAudit, ApiImages, ApiPolicy, ApiPool, ApiVms } from '../api/contract/ports.js';
import type { DiskFiles } from '../backends/disk-files.js';
import type { DaemonConfig } from '../config.js';
import { refuseForbidden } from '../domain/policy.js';
import type { VmSpec } from '../domain/vm.js';
import { LogLimit } from '../kit/log-limit.js';

const STDERR = 2;

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

/** The audit log is kept at every log level. */
export function auditLog({ name: host, security }: DaemonConfig): ApiAudit {
  const { auditLog: path } = security;
  const options = { level: 'info', timestamp: pino.stdTimeFunctions.isoTime, base: { host, part: 'audit' } };
  // Each line is written before the next call is answered.
  const own = pino(options, pino.destination(path === undefined ? STDERR : openSync(path, 'a', 0o600)));
  const limit = new LogLimit();
  return {
    note(entry) {
      const write = (omitted: object) => own.info({ ...entry, ...omitted }, 'audit');
      // Only strangers can make lines without end: whoever is known by name is answered for by somebody.
      if (entry.who === 'unknown') limit.log(write);
      else write({});
    },
  };
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
