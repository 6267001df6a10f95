/**
 * The RDMA hosts of the bed as test hosts: A is 10.78.0.1, B is 10.78.0.2. All are in one network namespace, so a
 * command on a host is an ordinary command. test/bed/guest/bed-hosts says why, and how packets between them still cross
 * a wire.
 */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { findHost, type HostNetwork, type TestHost } from './host-network.js';

const run = promisify(execFile);
const NAMES = ['A', 'B', 'C', 'D'];

export interface BedHost extends TestHost {
  /** The switch's end of the host's cable. Packets lost there are lost on the way to the host. */
  readonly switchPort: string;
}

export class BedNetwork implements HostNetwork<BedHost> {
  readonly hosts: readonly BedHost[];
  /** Emulated processors are about thirty times slower, so the first inventory of a daemon takes seconds. */
  readonly daemonConfig = {
    limits: { callMsMax: 30_000, recoveryMsMax: 240_000 },
    // So slow that a host still hears most of it if its daemon takes its seat seconds after the others.
    multicast: { bandwidth: '1M' },
  };

  readonly startsAtOnce = 1;
  readonly daemonReadyMs = 180_000;

  /** `addresses` are RDMA addresses of this machine, outside the bed; then no cable can be pulled. */
  constructor(count: number, addresses?: readonly string[]) {
    this.hosts = NAMES.slice(0, count).map((name, index) => ({
      name,
      address: addresses?.[index] ?? `10.78.0.${index + 1}`,
      switchPort: `p${index + 1}`,
    }));
  }

  host(name: string): BedHost {
    return findHost(this.hosts, name);
  }

  commandOn(_name: string, command: readonly string[]): readonly string[] {
    return command;
  }

  async setLink(name: string, isUp: boolean): Promise<void> {
    await run('ip', ['link', 'set', this.host(name).switchPort, isUp ? 'up' : 'down']);
  }

  /** Drops this share of the packets to the host; 0 drops none. */
  async setLoss(name: string, percent: number): Promise<void> {
    const { switchPort } = this.host(name);
    if (percent === 0) await run('tc', ['qdisc', 'del', 'dev', switchPort, 'root']);
    else await run('tc', ['qdisc', 'replace', 'dev', switchPort, 'root', 'netem', 'loss', `${percent}%`]);
  }

  /** Lets a host receive so much at most, without a loss; until the next setLoss of 0. */
  async setRate(name: string, mbitPerS: number): Promise<void> {
    const rate = ['netem', 'rate', `${mbitPerS}mbit`, 'limit', '10000'];
    await run('tc', ['qdisc', 'replace', 'dev', this.host(name).switchPort, 'root', ...rate]);
  }

  async destroy(): Promise<void> {
    // The network ends with the bed.
  }
}
