/**
 * Test hosts as network namespaces with their own addresses. Veth pairs connect them through a bridge in another
 * namespace, which is the switch. The machine's own network is not changed. Names contain a random part, so that
 * several clusters can exist at once.
 *
 *   host A: eth0 10.83.0.1 ──┐ switch: br0 ┌── eth0 10.83.0.2 : host B          management and data
 *           br-guest ────────┘         br1 └────────── br-guest                 network of the guests (optional)
 *                                       └── client: eth0 10.84.0.250            client that connects to a guest
 */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { findHost, type HostNetwork, type TestHost } from './host-network.js';

const run = promisify(execFile);

export interface NamespaceHost extends TestHost {
  readonly namespace: string;
  /** The switch's end of the host's management link, where netem and cuts are applied. */
  readonly switchPort: string;
}

export interface NamespaceOptions {
  readonly id: string;
  readonly hosts: readonly string[];
  readonly hasGuestNetwork: boolean;
  /** So many switches share the hosts, in order, and are connected by a switch above. Absent: one switch for all. */
  readonly rackCount?: number;
  readonly daemonConfig?: Readonly<Record<string, unknown>>;
  readonly hostConfigs?: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
}

async function ip(...args: string[]): Promise<string> {
  const { stdout } = await run('ip', args, { timeout: 60_000 });
  return stdout;
}

async function tc(...args: string[]): Promise<void> {
  await run('tc', args, { timeout: 60_000 });
}

/** The default of the daemon's configuration. */
const MULTICAST_PORT = 7403;
/** The table of nftables in which a host loses packets. */
const LOSS_TABLE = ['netdev', 'loss'];

export class Namespaces implements HostNetwork<NamespaceHost> {
  readonly hosts: readonly NamespaceHost[];
  readonly daemonConfig: Readonly<Record<string, unknown>>;
  readonly hostConfigs: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
  readonly switchNamespace: string;
  readonly clientNamespace: string;
  readonly guestSubnet = '10.84.0';
  private readonly created: string[] = [];

  private constructor(private readonly options: NamespaceOptions) {
    // The tests must not depend on the free memory of this machine.
    this.daemonConfig = {
      pool: { memoryAvailableBytesMin: 0, memoryStallPercentMax: 100 },
      ...options.daemonConfig,
    };
    this.hostConfigs = options.hostConfigs ?? {};
    this.switchNamespace = `vmg-${options.id}-sw`;
    this.clientNamespace = `vmg-${options.id}-client`;
    this.hosts = options.hosts.map((name, index) => ({
      name,
      namespace: `vmg-${options.id}-${name.toLowerCase()}`,
      address: `10.83.0.${index + 1}`,
      switchPort: `m${index + 1}`,
    }));
  }

  static async create(options: NamespaceOptions): Promise<Namespaces> {
    const namespaces = new Namespaces(options);
    try {
      await namespaces.build();
    } catch (error) {
      await namespaces.destroy();
      throw error;
    }
    return namespaces;
  }

  private async add(namespace: string): Promise<void> {
    await ip('netns', 'add', namespace);
    this.created.push(namespace);
    await ip('-n', namespace, 'link', 'set', 'lo', 'up');
  }

  private async build(): Promise<void> {
    const { switchNamespace: sw } = this;
    await this.add(sw);
    for (const bridge of ['br0', 'br1']) {
      await ip('-n', sw, 'link', 'add', bridge, 'type', 'bridge');
      await ip('-n', sw, 'link', 'set', bridge, 'up');
    }
    const { rackCount = 0 } = this.options;
    for (let rack = 1; rack <= rackCount; rack++) await this.addRack(rack);
    for (const [index, host] of this.hosts.entries()) {
      await this.add(host.namespace);
      await this.link(host.namespace, 'eth0', `m${index + 1}`, this.bridgeOf(index));
      await ip('-n', host.namespace, 'addr', 'add', `${host.address}/24`, 'dev', 'eth0');
      if (!this.options.hasGuestNetwork) continue;
      await ip('-n', host.namespace, 'link', 'add', 'br-guest', 'type', 'bridge');
      await ip('-n', host.namespace, 'link', 'set', 'br-guest', 'up');
      await this.link(host.namespace, 'guest0', `g${index + 1}`, 'br1');
      await ip('-n', host.namespace, 'link', 'set', 'guest0', 'master', 'br-guest');
    }
    if (this.options.hasGuestNetwork) {
      await this.add(this.clientNamespace);
      await this.link(this.clientNamespace, 'eth0', 'c1', 'br1');
      await ip('-n', this.clientNamespace, 'addr', 'add', `${this.guestSubnet}.250/24`, 'dev', 'eth0');
    }
  }

  /** The racks in order, each with its hosts. */
  get racks(): readonly (readonly NamespaceHost[])[] {
    const { rackCount = 1 } = this.options;
    const inRack = Math.ceil(this.hosts.length / rackCount);
    return Array.from({ length: rackCount }, (_, rack) => this.hosts.slice(rack * inRack, (rack + 1) * inRack));
  }

  private bridgeOf(index: number): string {
    if (this.options.rackCount === undefined) return 'br0';
    return `rack${this.racks.findIndex((rack) => rack.some(({ name }) => name === this.hosts[index]?.name)) + 1}`;
  }

  /** A bridge below br0. `down` is the end of its uplink on br0, `up` the one on its own side. */
  private async addRack(rack: number): Promise<void> {
    const sw = this.switchNamespace;
    await ip('-n', sw, 'link', 'add', `rack${rack}`, 'type', 'bridge');
    await ip('-n', sw, 'link', 'add', `down${rack}`, 'type', 'veth', 'peer', 'name', `up${rack}`);
    for (const [port, bridge] of [
      [`down${rack}`, 'br0'],
      [`up${rack}`, `rack${rack}`],
    ] as const) {
      await ip('-n', sw, 'link', 'set', port, 'master', bridge);
      await ip('-n', sw, 'link', 'set', port, 'up');
    }
    await ip('-n', sw, 'link', 'set', `rack${rack}`, 'up');
  }

  /** Bytes that have come into a rack, and that have left it, over its uplink. Racks count from 1. */
  async uplinkBytes(rack: number): Promise<{ readonly inBytes: number; readonly outBytes: number }> {
    const { rx, tx } = await this.linkBytes(this.switchNamespace, `up${rack}`);
    return { inBytes: rx, outBytes: tx };
  }

  /** Bytes that a host has sent over its management and data link. */
  async sentBytes(name: string): Promise<number> {
    return (await this.linkBytes(this.host(name).namespace, 'eth0')).tx;
  }

  private async linkBytes(namespace: string, device: string): Promise<{ rx: number; tx: number }> {
    const [link] = JSON.parse(await ip('-n', namespace, '-j', '-s', 'link', 'show', 'dev', device)) as [
      { stats64: { rx: { bytes: number }; tx: { bytes: number } } },
    ];
    return { rx: link.stats64.rx.bytes, tx: link.stats64.tx.bytes };
  }

  /** Creates a veth pair: `inner` is inside the namespace, `port` is on the switch's bridge. */
  private async link(namespace: string, inner: string, port: string, bridge: string): Promise<void> {
    await ip(
      '-n',
      this.switchNamespace,
      'link',
      'add',
      port,
      'type',
      'veth',
      'peer',
      'name',
      inner,
      'netns',
      namespace,
    );
    await ip('-n', this.switchNamespace, 'link', 'set', port, 'master', bridge);
    await ip('-n', this.switchNamespace, 'link', 'set', port, 'up');
    await ip('-n', namespace, 'link', 'set', inner, 'up');
  }

  host(name: string): NamespaceHost {
    return findHost(this.hosts, name);
  }

  commandOn(name: string, command: readonly string[]): readonly string[] {
    return ['ip', 'netns', 'exec', this.host(name).namespace, ...command];
  }

  /** Unplugs or plugs the host's management and data link. */
  async setLink(name: string, isUp: boolean): Promise<void> {
    await ip('-n', this.switchNamespace, 'link', 'set', this.host(name).switchPort, isUp ? 'up' : 'down');
  }

  /** Limits the host's management and data link in both directions; null removes the limit. */
  async setRate(name: string, mbitPerS: number | null): Promise<void> {
    const { namespace, switchPort } = this.host(name);
    for (const [where, device] of [
      [this.switchNamespace, switchPort],
      [namespace, 'eth0'],
    ] as const) {
      await tc('-n', where, 'qdisc', 'del', 'dev', device, 'root').catch(() => undefined);
      if (mbitPerS === null) continue;
      const limit = ['rate', `${mbitPerS}mbit`, 'burst', '64kb', 'latency', '50ms'];
      await tc('-n', where, 'qdisc', 'add', 'dev', device, 'root', 'tbf', ...limit);
    }
  }

  /** The largest packet on the host's management and data link. */
  async setMtu(name: string, bytes: number): Promise<void> {
    const { namespace, switchPort } = this.host(name);
    await ip('-n', namespace, 'link', 'set', 'eth0', 'mtu', `${bytes}`);
    await ip('-n', this.switchNamespace, 'link', 'set', switchPort, 'mtu', `${bytes}`);
  }

  /**
   * Drops this share of the packets that arrive over the host's management and data link; 0 drops none. `multicast`:
   * only those of multicasts of images.
   */
  async setLoss(name: string, percent: number, of: 'all' | 'multicast' = 'all'): Promise<void> {
    await this.nft(name, 'delete', 'table', ...LOSS_TABLE).catch(() => undefined);
    if (percent === 0) return;
    await this.nft(name, 'add', 'table', ...LOSS_TABLE);
    await this.nft(name, 'add', 'chain', ...LOSS_TABLE, 'in', '{ type filter hook ingress device eth0 priority 0; }');
    const share = percent === 100 ? [] : ['numgen', 'random', 'mod', '100', '<', `${percent}`];
    const which = of === 'all' ? [] : ['udp', 'dport', `${MULTICAST_PORT}`];
    await this.nft(name, 'add', 'rule', ...LOSS_TABLE, 'in', ...which, ...share, 'counter', 'drop');
  }

  /** How many packets the host has lost since `setLoss`. */
  async lostPackets(name: string): Promise<number> {
    const { stdout } = await this.nft(name, 'list', 'table', ...LOSS_TABLE);
    return Number(/counter packets (\d+)/.exec(stdout)?.[1]);
  }

  private nft(name: string, ...args: string[]): Promise<{ stdout: string }> {
    const [command = '', ...words] = this.commandOn(name, ['nft', ...args]);
    return run(command, words, { timeout: 60_000 });
  }

  async destroy(): Promise<void> {
    for (const namespace of this.created.splice(0).reverse())
      await ip('netns', 'del', namespace).catch(() => undefined);
  }
}
