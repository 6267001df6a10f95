/**
 * Forks a guest with a NIC into two clones, in the network namespace of this process, and prints the state of their
 * network as JSON.
 *
 *   fork-network.ts fresh | isolated
 */
import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { readlink } from 'node:fs/promises';
import { connect } from 'node:net';
import { promisify } from 'node:util';
import { eventually } from './cluster.js';
import { guestImage, parseIdentity } from './guest.js';
import { consoleOf, HandFork, heard } from './hand-fork.js';
import { VmHost, vmSpec } from './vm-host.js';

const run = promisify(execFile);
const STREAM_PORT = 7000;
const ANSWER_MS = 60_000;

async function main(network: 'fresh' | 'isolated'): Promise<void> {
  for (const line of [
    'link set lo up',
    'link add br0 type bridge',
    'addr add 10.9.0.100/24 dev br0',
    'link set br0 up',
  ]) {
    await run('ip', line.split(' '));
  }
  const host = await VmHost.start();
  const append = 'console=ttyS0 quiet vmg.workload=stream vmg.mb=8 vmg.ip=10.9.0.1/24';
  await host.vms.run(vmSpec({ ...guestImage(), memory: { size: '160M' }, nics: [{ bridge: 'br0' }], append }));
  await heard(host, 'vm', /VMG WORK/);
  const parent = host.vms.get('vm');
  const fork = await HandFork.make(host, parent, 2, network);
  await fork.run();
  const names = fork.clones.map(({ spec }) => spec.name);
  for (const name of names) await heard(host, name, /VMG FORK [^\n]*\n/);
  // The next daemon does what is still pending when the daemon ends.
  await host.restart();
  await eventually('the clones have their NICs', ANSWER_MS, () =>
    host.vms.list().every((vm) => vm.identityIssue === null) ? true : undefined,
  );
  const clones = [];
  for (const [index, name] of names.entries()) {
    const { spec, pid } = host.vms.get(name);
    if (network === 'fresh') await heard(host, name, new RegExp(`VMG NET eth0 .*mac=${spec.nics[0]?.mac ?? ''}`));
    const inside = ['--net', `--target=${pid}`, 'ip', '-j', 'link', 'show', 'master', 'br0'];
    clones.push({
      nic: spec.nics[0],
      forked: parseIdentity(await consoleOf(host, name), 'FORK')[0],
      answers: network === 'fresh' && (await answers(`10.9.0.${index + 2}`)),
      namespace: await readlink(`/proc/${pid}/ns/net`),
      taps: (JSON.parse((await run('nsenter', inside)).stdout) as unknown[]).length,
    });
  }
  const own = await readlink('/proc/self/ns/net');
  await fork.remove();
  const left = await host.close();
  console.log(JSON.stringify({ parent: parent.spec.nics[0], clones, own, left }));
}

/** Returns whether the address accepts a connection. It waits, because a guest needs a moment to set it up. */
function answers(address: string): Promise<boolean> {
  return eventually(`${address} answers`, ANSWER_MS, async () => {
    const socket = connect({ host: address, port: STREAM_PORT, timeout: 2000 });
    try {
      await Promise.race([
        once(socket, 'connect'),
        once(socket, 'timeout').then(() => Promise.reject(new Error('late'))),
      ]);
      return true;
    } catch {
      return undefined;
    } finally {
      socket.destroy();
    }
  });
}

await main(process.argv[2] === 'isolated' ? 'isolated' : 'fresh');
