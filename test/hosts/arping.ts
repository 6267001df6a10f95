import { type Cluster, eventually } from './cluster.js';

const ANSWER_MS = 120_000;

/** Returns the MAC addresses that answer for an IP address on the guests' network within 3 s. */
export async function answering(cluster: Cluster, address: string): Promise<string[]> {
  const client = cluster.network.clientNamespace;
  const ping = ['arping', '-c', '2', '-w', '3', '-I', 'eth0', address];
  const { stdout } = await cluster.inNamespace(client, 'busybox', ...ping);
  return [...new Set([...stdout.matchAll(/\[([0-9a-f:]{17})\]/g)].map(([, mac = '']) => mac))];
}

/** Like `answering`, but waits for an answer, because a guest needs some time to set up a new NIC. */
export async function answersAt(cluster: Cluster, address: string): Promise<string[]> {
  return eventually(`${address} answers`, ANSWER_MS, async () => {
    const macs = await answering(cluster, address);
    return macs.length > 0 ? macs : undefined;
  });
}
