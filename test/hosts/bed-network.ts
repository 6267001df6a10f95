/**
 * The RDMA hosts of the bed as test hosts: A is 10.78.0.1, B is 10.78.0.2. All live in one network namespace
 * (test/bed/guest/bed-hosts says why, and how packets between them cross a wire all the same), so a command on a host
 * is an ordinary command.
 */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { findHost, type HostNetwork, type TestHost } from './host-network.js';

const run = promisify(execFile);
const NAMES = ['A', 'B', 'C', 'D'];

export interface BedHost extends TestHost {
  /** The switch's end of the host's cable; what is lost there is lost on the way to the host. */
  readonly switchPort: string;
}

export class BedNetwork implements HostNetwork<BedHost> {
  readonly hosts: readonly BedHost[];
  /** Emulated processors are some thirty times slower: a daemon that looks around first takes seconds to answer. */
  readonly daemonConfig = { limits: { callMsMax: 30_000, recoveryMsMax: 240_000 } };

  /** Other addresses: RDMA addresses of this machine, outside of the bed; then there are no cables to pull. */
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

  /** Loses so many of the packets that go to the host; 0 ends it. */
  async setLoss(name: string, percent: number): Promise<void> {
    const { switchPort } = this.host(name);
    if (percent === 0) await run('tc', ['qdisc', 'del', 'dev', switchPort, 'root']);
    else await run('tc', ['qdisc', 'replace', 'dev', switchPort, 'root', 'netem', 'loss', `${percent}%`]);
  }

  async destroy(): Promise<void> {
    // It goes with the bed.
  }
}
