import type { Cluster } from './cluster.js';

/** MAC addresses that answer for an address on the guests' network. */
export async function answering(cluster: Cluster, address: string): Promise<string[]> {
  const client = cluster.network.clientNamespace;
  const ping = ['arping', '-c', '2', '-w', '3', '-I', 'eth0', address];
  const { stdout } = await cluster.inNamespace(client, 'busybox', ...ping);
  return [...new Set([...stdout.matchAll(/\[([0-9a-f:]{17})\]/g)].map(([, mac = '']) => mac))];
}
