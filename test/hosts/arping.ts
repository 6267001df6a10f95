import { type Cluster, eventually } from './cluster.js';

const ANSWER_MS = 120_000;

/** MAC addresses that answer for an address on the guests' network within 3 s. */
export async function answering(cluster: Cluster, address: string): Promise<string[]> {
  const client = cluster.network.clientNamespace;
  const ping = ['arping', '-c', '2', '-w', '3', '-I', 'eth0', address];
  const { stdout } = await cluster.inNamespace(client, 'busybox', ...ping);
  return [...new Set([...stdout.matchAll(/\[([0-9a-f:]{17})\]/g)].map(([, mac = '']) => mac))];
}

/** As `answering`, but waits until somebody does: a guest sets up a NIC that it is given in its own time. */
export async function answersAt(cluster: Cluster, address: string): Promise<string[]> {
  return eventually(`${address} answers`, ANSWER_MS, async () => {
    const macs = await answering(cluster, address);
    return macs.length > 0 ? macs : undefined;
  });
}
