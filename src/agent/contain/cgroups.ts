/**
 * A cgroup for each contained VM, below the daemon's own: of cgroup v2, and of the v1 hierarchy that counts processes.
 * Where threads are counted, it bounds them, and whoever wants to freeze, weigh or end a VM finds all of it there.
 */
import { createHash } from 'node:crypto';
import { mkdir, readFile, rmdir, writeFile } from 'node:fs/promises';
import { join, relative } from 'node:path';

/** QEMU has a thread for each vCPU and up to 64 for each queue of requests. */
const THREADS_MAX = 4096;
const CONTROLLER = 'pids';

interface Mount {
  readonly path: string;
  /** The cgroup that is mounted there. */
  readonly root: string;
  readonly isV2: boolean;
  readonly controllers: readonly string[];
}

export class VmCgroups {
  /** The directories of the daemon's own cgroups. Empty if this host has none that the daemon may use. */
  readonly #parents: readonly string[];

  private constructor(parents: readonly string[]) {
    this.#parents = parents;
  }

  /** `stateDir` tells daemons of one name on one machine apart. */
  static async open(host: string, stateDir: string): Promise<VmCgroups> {
    const own = await ownCgroups().catch(() => []);
    const name = `vmigrate-${host}-${createHash('sha256').update(stateDir).digest('hex').slice(0, 8)}`;
    const parents: string[] = [];
    for (const { path, isV2 } of own) {
      const parent = join(path, name);
      const isMade = await make(parent);
      if (!isMade) continue;
      // No controller is switched on for the daemon's own cgroup: that would change what may be below it. If somebody
      // has done so already, for a service with delegation, the cgroups of VMs may have it too.
      if (isV2) await set(parent, 'cgroup.subtree_control', `+${CONTROLLER}`);
      if (isV2 && (await typeOf(parent)) !== 'domain') continue;
      parents.push(parent);
    }
    return new VmCgroups(parents);
  }

  get isUsable(): boolean {
    return this.#parents.length > 0;
  }

  /** Returns the directories of the VM's cgroups, which are made if they are missing. */
  async make(vm: string): Promise<readonly string[]> {
    const made: string[] = [];
    for (const parent of this.#parents) {
      const path = join(parent, nameOf(vm));
      // The last VM of an earlier manager may have taken the parent with it.
      if (!(await make(parent)) || !(await make(path))) continue;
      await set(path, 'pids.max', String(THREADS_MAX));
      made.push(path);
    }
    return made;
  }

  /** One with a process in it stays. Idempotent. */
  async remove(vm: string): Promise<void> {
    for (const parent of this.#parents) await rmdir(join(parent, nameOf(vm))).catch(() => undefined);
  }

  /** Removes what no VM has a cgroup in any more. */
  async close(): Promise<void> {
    for (const parent of this.#parents) await rmdir(parent).catch(() => undefined);
  }
}

/** The kernel has files beside the cgroups, whose names a VM may have. */
function nameOf(vm: string): string {
  return `vm-${vm}`;
}

async function make(path: string): Promise<boolean> {
  return mkdir(path, { mode: 0o755 }).then(
    () => true,
    (error: NodeJS.ErrnoException) => error.code === 'EEXIST',
  );
}

/** Of cgroup v2. Only a domain takes whole processes. */
async function typeOf(path: string): Promise<string> {
  return (await readFile(join(path, 'cgroup.type'), 'utf8').catch(() => '')).trim();
}

async function set(directory: string, name: string, value: string): Promise<void> {
  await writeFile(join(directory, name), value).catch(() => undefined);
}

async function ownCgroups(): Promise<{ path: string; isV2: boolean }[]> {
  const mounts = (await readFile('/proc/self/mountinfo', 'utf8')).split('\n').flatMap(mountIn);
  const found: { path: string; isV2: boolean }[] = [];
  for (const line of (await readFile('/proc/self/cgroup', 'utf8')).split('\n')) {
    const [, controllers = '', own] = /^\d+:([^:]*):(\/.*)$/.exec(line) ?? [];
    if (own === undefined) continue;
    const isV2 = controllers === '';
    if (!isV2 && !controllers.split(',').includes(CONTROLLER)) continue;
    const mount = mounts.find((each) => each.isV2 === isV2 && (isV2 || each.controllers.includes(CONTROLLER)));
    if (mount === undefined) continue;
    const below = relative(mount.root, own);
    // A cgroup outside what is mounted cannot be reached.
    if (!below.startsWith('..')) found.push({ path: join(mount.path, below), isV2 });
  }
  return found;
}

/** A line of mountinfo: ID PARENT DEVICE ROOT PATH OPTIONS [FIELDS] - TYPE SOURCE OPTIONS. */
function mountIn(line: string): Mount[] {
  const [head = '', tail = ''] = line.split(' - ');
  const [, , , root = '', path = ''] = head.split(' ');
  const [type = '', , options = ''] = tail.split(' ');
  if (type !== 'cgroup' && type !== 'cgroup2') return [];
  return [{ path, root, isV2: type === 'cgroup2', controllers: options.split(',') }];
}
