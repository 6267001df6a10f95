/** What disturbs a multicast from outside: a stranger in its group, and a host whose processors are busy elsewhere. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { eventually } from './cluster.js';
import type { ManyHosts } from './many-hosts.js';

const STRANGER = fileURLToPath(new URL('stranger.ts', import.meta.url));
const READY_MS = 60_000;
const STOPPED_MS = 400;
const RUNNING_MS = 200;

/** Returns what ends the stranger, and says how many datagrams it has sent. */
export async function sendAsStranger(
  { cluster }: ManyHosts,
  host: string,
  { group, port }: { readonly group: string; readonly port: number },
): Promise<() => Promise<number>> {
  const { network } = cluster;
  const program = [process.execPath, '--import', 'tsx', STRANGER, group, `${port}`, network.host(host).address];
  const [command = '', ...words] = network.commandOn(host, program);
  const stranger = spawn(command, words, { stdio: ['pipe', 'pipe', 'inherit'] });
  let output = '';
  stranger.stdout.on('data', (data: Buffer) => (output += data.toString()));
  await eventually('the stranger is in the group', READY_MS, () => (output.includes('ready') ? true : undefined));
  return async () => {
    const ended = once(stranger, 'exit');
    stranger.stdin.end();
    await ended;
    return Number(/sent (\d+)/.exec(output)?.[1]);
  };
}

/** Stops the daemon of a host for most of the time. Returns what ends that. */
export function starve({ cluster }: ManyHosts, host: string): () => Promise<void> {
  const pid = cluster.daemonPid(host);
  const over = new AbortController();
  const starving = (async () => {
    while (!over.signal.aborted) {
      process.kill(pid, 'SIGSTOP');
      await sleep(STOPPED_MS, undefined, { signal: over.signal }).catch(() => undefined);
      process.kill(pid, 'SIGCONT');
      await sleep(RUNNING_MS, undefined, { signal: over.signal }).catch(() => undefined);
    }
  })();
  return async () => {
    over.abort();
    await starving;
  };
}
