/**
 * How the image of an idle guest gets to eight other hosts over links that limit it: each fan-out in turn, and one host
 * alone. What the links have carried is counted at their ports, so it includes headers, calls and digests.
 */
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Fanout } from '../../src/domain/fanout.js';
import type { ForkReport } from '../../src/domain/fork.js';
import { checkClones } from '../../test/hosts/clone-check.js';
import { Guest } from '../../test/hosts/guest.js';
import { ManyHosts } from '../../test/hosts/many-hosts.js';

export const SPREAD = { hosts: 8, racks: 2, memoryMiB: 192, touchMiB: 96, mbitPerS: 100 } as const;

export interface SpreadKind {
  readonly name: string;
  readonly fanout: Fanout;
  readonly hostCount: number;
  /** Of the datagrams of a multicast, at each host. */
  readonly lossPercent: number;
  /** It takes two minutes, and varies little. */
  readonly isFirstRoundOnly?: true;
}

export const SPREAD_KINDS = [
  { name: 'unicast, one host', fanout: 'unicast', hostCount: 1, lossPercent: 0 },
  { name: 'unicast', fanout: 'unicast', hostCount: SPREAD.hosts, lossPercent: 0, isFirstRoundOnly: true },
  { name: 'multicast', fanout: 'multicast', hostCount: SPREAD.hosts, lossPercent: 0 },
  { name: 'multicast, 10 % lost', fanout: 'multicast', hostCount: SPREAD.hosts, lossPercent: 10 },
  { name: 'tree', fanout: 'tree', hostCount: SPREAD.hosts, lossPercent: 0 },
] as const satisfies readonly SpreadKind[];

export interface SpreadTrial {
  /** From the go until every host has all pages, and has checked them. */
  readonly fillMs: number;
  readonly imageBytes: number;
  /** Bytes at ports, during the whole fork. */
  readonly rootSentBytes: number;
  readonly maxUplinkBytes: number;
  readonly bytes: ForkReport['bytes'];
  readonly maxLoss: number;
  readonly badPages: number;
}

export class SpreadSide {
  #forks = 0;

  private constructor(
    private readonly hosts: ManyHosts,
    private readonly guest: Guest,
    private readonly topologyPath: string,
  ) {}

  static async start(): Promise<SpreadSide> {
    const hosts = await ManyHosts.create({ count: SPREAD.hosts + 1, rackCount: SPREAD.racks, memoryBudget: '2G' });
    try {
      const { memoryMiB, touchMiB } = SPREAD;
      // It writes its memory once, and then waits.
      const workload = 'idle';
      const guest = await Guest.start(hosts.cluster, hosts.root, { name: 'idle', memoryMiB, touchMiB, workload });
      for (const host of hosts.names) await hosts.setRate(host, SPREAD.mbitPerS);
      const racks = hosts.cluster.network.racks.map((rack) => rack.map(({ name }) => name));
      const lines = racks.map((names, rack) => `SwitchName=rack${rack + 1} Nodes=${names.join(',')}`);
      const topologyPath = join(hosts.cluster.directory, 'topology.conf');
      await writeFile(topologyPath, `${[...lines, 'SwitchName=core Switches=rack[1-2]'].join('\n')}\n`);
      return new SpreadSide(hosts, guest, topologyPath);
    } catch (error) {
      await hosts.destroy();
      throw error;
    }
  }

  async run({ fanout, hostCount, lossPercent }: SpreadKind): Promise<SpreadTrial> {
    const { network } = this.hosts.cluster;
    // One host alone is in the other rack, as most of the eight are.
    const chosen = hostCount === 1 ? this.hosts.names.slice(-1) : this.hosts.others;
    for (const host of chosen) await this.hosts.setLoss(host, lossPercent, 'multicast');
    const racks = network.racks.map((_, index) => index + 1);
    const uplinks = async (): Promise<number[]> =>
      (await Promise.all(racks.map((rack) => network.uplinkBytes(rack)))).flatMap(({ inBytes, outBytes }) => [
        inBytes,
        outBytes,
      ]);
    const before = { root: await network.sentBytes(this.hosts.root), uplinks: await uplinks() };
    const report = await this.hosts.fork(
      this.guest.name,
      ...['--clones', `${chosen.length}`, '--hosts', chosen.join(','), '--tcp', '--network', 'none'],
      ...['--name', `spread${this.#forks++}`, '--fanout', fanout, '--topology', this.topologyPath],
    );
    const after = { root: await network.sentBytes(this.hosts.root), uplinks: await uplinks() };
    for (const host of chosen) await this.hosts.setLoss(host, 0);
    const { badPages } = await checkClones(this.hosts.cluster, report.clones);
    await this.hosts.clear();
    if (report.clones.length !== chosen.length)
      throw new Error(`clones are missing: ${JSON.stringify(report.failures)}`);
    return {
      fillMs: report.phases.find(({ name }) => name === 'fillImage')?.ms ?? Number.NaN,
      imageBytes: report.bytes.copied,
      rootSentBytes: after.root - before.root,
      maxUplinkBytes: Math.max(...after.uplinks.map((bytes, index) => bytes - (before.uplinks[index] ?? 0))),
      bytes: report.bytes,
      maxLoss: Math.max(0, ...Object.values(report.fanout?.lossPerHost ?? {})),
      badPages,
    };
  }

  stop(): Promise<void> {
    return this.hosts.destroy();
  }
}
