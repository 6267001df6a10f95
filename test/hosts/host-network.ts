/**
 * The network of a cluster of test hosts. There are two kinds: network namespaces (namespaces.ts) and, inside the bed,
 * RDMA hosts (bed-network.ts).
 */
export interface TestHost {
  readonly name: string;
  readonly address: string;
}

export interface HostNetwork<Host extends TestHost = TestHost> {
  readonly hosts: readonly Host[];
  /** Configuration of the daemons; their flags take precedence. */
  readonly daemonConfig?: Readonly<Record<string, unknown>>;
  /** Configuration of single hosts. Its keys replace those of `daemonConfig`. */
  readonly hostConfigs?: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
  /** How many daemons are started at the same time. Absent: some. */
  readonly startsAtOnce?: number;
  /** How long a daemon may take to answer after its start. Absent: a minute. */
  readonly daemonReadyMs?: number;
  host(name: string): Host;
  /** Returns the command line that runs `command` on that host. */
  commandOn(name: string, command: readonly string[]): readonly string[];
  /** Unplugs or plugs the host's management and data link. */
  setLink(name: string, isUp: boolean): Promise<void>;
  destroy(): Promise<void>;
}

export function findHost<Host extends TestHost>(hosts: readonly Host[], name: string): Host {
  const host = hosts.find((candidate) => candidate.name === name);
  if (!host) throw new Error(`no test host ${name}`);
  return host;
}
