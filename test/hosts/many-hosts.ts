/**
 * Hosts for forks over many of them: one daemon each in a network namespace of its own, on one switch. Each host has
 * its own state, memory directory, budget of memory and link. The first is the root of the forks: the parent runs
 * there.
 */
import { readdir, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { ForkReport } from '../../src/domain/fork.js';
import type { ImageView } from '../../src/domain/image.js';
import type { VmView } from '../../src/domain/vm.js';
import { Cluster, eventually } from './cluster.js';
import { Parking } from './parking.js';
import { inTurns } from './turns.js';

const NAMES = ['A', 'B', 'C', 'D', 'E', 'F', 'G', 'H', 'I'];
const USUAL_COUNT = 8;
const CALLS_AT_ONCE = 4;
const GONE_MS = 60_000;
const STATE_FOLDERS = ['vms', 'images', 'forks'];

export interface ManyHostsOptions {
  readonly count?: number;
  /** So many switches share the hosts. Absent: one. */
  readonly rackCount?: number;
  /** `memory.budget` of each daemon, for example 2G. */
  readonly memoryBudget: string;
  readonly daemonConfig?: Readonly<Record<string, unknown>>;
  readonly hostConfigs?: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
  /** Points at which a test may park one of the daemons. */
  readonly parkingPoints?: readonly string[];
}

/** The root keeps the records of some forks that are over, for their coordinator. */
async function isFinished(path: string): Promise<boolean> {
  if (!path.endsWith('.json')) return false;
  return (await readFile(path, 'utf8').catch(() => '')).includes('"isFinished": true');
}

export class ManyHosts {
  readonly names: readonly string[];
  readonly root: string;
  /** Parks only the daemons that `restart` has started as `isParkable`. */
  readonly parking: Parking;

  private constructor(
    readonly cluster: Cluster,
    points: readonly string[],
  ) {
    this.names = cluster.network.hosts.map(({ name }) => name);
    this.root = this.names[0] ?? '';
    this.parking = new Parking(cluster.directory, points);
  }

  static async create(options: ManyHostsOptions): Promise<ManyHosts> {
    const {
      count = USUAL_COUNT,
      rackCount,
      memoryBudget,
      daemonConfig = {},
      hostConfigs = {},
      parkingPoints = [],
    } = options;
    const cluster = await Cluster.create({
      hosts: NAMES.slice(0, count),
      ...(rackCount === undefined ? {} : { rackCount }),
      daemonConfig: { memory: { budget: memoryBudget }, ...daemonConfig },
      hostConfigs,
    });
    return new ManyHosts(cluster, parkingPoints);
  }

  get others(): readonly string[] {
    return this.names.slice(1);
  }

  /** Ends the daemon as `kill -9` does. Its QEMUs run on. */
  kill(host: string): Promise<void> {
    return this.cluster.stopDaemon(host);
  }

  async restart(host: string, { isParkable = false } = {}): Promise<void> {
    await this.kill(host);
    await this.cluster.startDaemon(host, isParkable ? this.parking.environment : {});
    await this.cluster.expectAcquaintance(host);
  }

  cutOff(host: string): Promise<void> {
    return this.cluster.network.setLink(host, false);
  }

  connectAgain(host: string): Promise<void> {
    return this.cluster.network.setLink(host, true);
  }

  setRate(host: string, mbitPerS: number | null): Promise<void> {
    return this.cluster.network.setRate(host, mbitPerS);
  }

  setLoss(host: string, percent: number, of: 'all' | 'multicast' = 'all'): Promise<void> {
    return this.cluster.network.setLoss(host, percent, of);
  }

  setMtu(host: string, bytes: number): Promise<void> {
    return this.cluster.network.setMtu(host, bytes);
  }

  lostPackets(host: string): Promise<number> {
    return this.cluster.network.lostPackets(host);
  }

  vms(host: string): Promise<VmView[]> {
    return this.cluster.api(host).get('/v1/vms');
  }

  images(host: string): Promise<ImageView[]> {
    return this.cluster.api(host).get('/v1/images');
  }

  fork(vm: string, ...args: string[]): Promise<ForkReport> {
    return this.cluster.json(this.root, 'vfork', vm, ...args);
  }

  /** Ends all clones of all hosts and removes their images. */
  async clear(): Promise<void> {
    await inTurns(this.names, CALLS_AT_ONCE, async (host) => {
      const api = this.cluster.api(host);
      // The first call stops a clone, the second removes it.
      for (let n = 0; n < 2; n++) {
        const clones = (await this.vms(host)).filter(({ image }) => image !== null);
        await inTurns(clones, CALLS_AT_ONCE, ({ name }) =>
          api.post(`/v1/vms/${name}/stop`, { force: true }).catch(() => undefined),
        );
      }
    });
    // The host that serves an image to others is the last to remove it.
    for (const host of [...this.others, this.root])
      for (const { id } of await this.images(host)) await this.cluster.vmctl(host, 'image', 'rm', id);
  }

  /** Waits until no fork has left anything on any host. The VMs in `kept` are those of the root. */
  async expectNothingLeft(...kept: readonly string[]): Promise<void> {
    for (const host of this.names) {
      const wanted = host === this.root ? [...kept].sort() : [];
      let found = '';
      await eventually(`${host} has only ${wanted.join(', ') || 'nothing'}`, GONE_MS, async () => {
        const traces = await this.#traces(host);
        found = JSON.stringify(traces);
        return found === JSON.stringify({ vms: wanted, files: [], qemus: wanted.length }) ? true : undefined;
      }).catch((error: Error) => {
        throw new Error(`${error.message}; found ${found}`);
      });
    }
  }

  async #traces(host: string): Promise<{ vms: string[]; files: string[]; qemus: number }> {
    const vms = (await this.vms(host)).map(({ name }) => name).sort();
    const folders = [
      join(this.cluster.ramDirectory(host), '.images'),
      ...STATE_FOLDERS.map((folder) => join(this.cluster.hostDirectory(host), 'state', folder)),
    ];
    const files: string[] = [];
    for (const folder of folders) {
      // The last file takes its folder with it, also between two looks.
      const names = await readdir(folder).catch(() => []);
      for (const name of names.filter((other) => !vms.includes(other)))
        if (!(await isFinished(join(folder, name)))) files.push(join(folder, name));
    }
    return { vms, files, qemus: (await this.cluster.qemuPids(host)).length };
  }

  destroy(): Promise<void> {
    return this.cluster.destroy();
  }
}
