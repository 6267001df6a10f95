import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { describe, expect, test } from 'vitest';
import { openConsole } from '../../../src/agent/vm/console.js';
import type { NicSpec } from '../../../src/domain/vm.js';
import { eventually } from '../../hosts/cluster.js';
import { agentInitrd, guestImage, parseIdentity } from '../../hosts/guest.js';
import { consoleOf, FORK, HandFork, heard } from '../../hosts/hand-fork.js';
import { qmpOf } from '../../hosts/qmp.js';
import { codeOf, VmHost, vmSpec } from '../../hosts/vm-host.js';

const run = promisify(execFile);
const CLONES = 4;
const SETTLE_MS = 120_000;

/** Repeats the command until the guest has answered. A serial line may lose input while nobody reads it. */
async function say(host: VmHost, name: string, words: string, answer: RegExp): Promise<RegExpExecArray> {
  const { socket, log } = host.vms.serialPaths(name);
  const console = await openConsole({ socketPath: socket, logPath: log, backlogBytes: 0, isFollowing: true });
  let text = '';
  console.on('data', (chunk: Buffer) => (text += chunk.toString()));
  const asking = setInterval(() => console.write(`\n${words}\n`), 3000);
  console.write(`${words}\n`);
  try {
    return await eventually(`${name} answers ${words}`, SETTLE_MS, () => answer.exec(text) ?? undefined);
  } finally {
    clearInterval(asking);
    console.destroy();
  }
}

test('clones have identities, random numbers and exit codes of their own, and the host’s time', async () => {
  const host = await VmHost.start();
  // The clock is years behind, as in an image that was saved long ago.
  const past = ['-rtc', 'base=2020-01-01T00:00:00'];
  const append = 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=16 vmg.restpct=75';
  const agent = { initrd: agentInitrd(), guestAgent: true };
  await host.vms.run(vmSpec({ ...guestImage(), ...agent, memory: { size: '192M' }, append, qemuArgs: past }));
  await heard(host, 'vm', /VMG WORK/);
  const [line] = await heard(host, 'vm', /VMG IDENTITY [^\n]*\n/);
  const parent = parseIdentity(line, 'IDENTITY')[0];
  expect(parent).toMatchObject({ index: '-', count: '-', name: 'vm', fork: '-' });
  expect(new Date(Number(parent?.['wall_ms'])).getUTCFullYear()).toBe(2020);

  const fork = await HandFork.make(host, host.vms.get('vm'), CLONES, 'none');
  await fork.run();
  const names = fork.clones.map(({ spec }) => spec.name);
  for (const name of names) await heard(host, name, /VMG FORK [^\n]*\n/);
  const forked = await Promise.all(names.map(async (name) => parseIdentity(await consoleOf(host, name), 'FORK')[0]));
  for (const [index, seen] of forked.entries()) {
    expect(seen).toMatchObject({ index: `${index}`, count: `${CLONES}`, name: names[index], fork: FORK });
    expect(seen?.['generation']).toBe(host.vms.get(names[index] ?? '').spec.vmGenerationId);
  }
  expect(new Set([parent?.['generation'], ...forked.map((seen) => seen?.['generation'])]).size).toBe(CLONES + 1);
  expect(new Set(forked.map((seen) => seen?.['after'])).size).toBe(CLONES);

  await eventually('the agents have set clocks and names', SETTLE_MS, () =>
    host.vms.list().every((vm) => vm.identityIssue === null) ? true : undefined,
  );
  for (const name of names) {
    const [line] = await say(host, name, 'identity', /VMG IDENTITY [^\n]*\n/);
    const seen = parseIdentity(line, 'IDENTITY')[0];
    expect(seen?.['host']).toBe(name);
    expect(Math.abs(Number(seen?.['wall_ms']) - Date.now())).toBeLessThan(600_000);
    const [verdict] = await say(host, name, 'verify', /VERIFY pages \d+ bad \d+/);
    expect(verdict).toContain('bad 0');
  }

  const view = (name: string) => host.vms.list().find((vm) => vm.name === name);
  const [first = '', second = '', third = ''] = names;
  await say(host, first, 'exit 7', /VMG EXIT code=7/);
  await expect.poll(() => view(first)).toMatchObject({ exitCode: 7, state: 'running', exit: null });
  await host.restart();
  await expect.poll(() => view(first)?.exitCode).toBe(7);
  for (const name of [first, second]) await (await consoleInput(host, name))('poweroff\n');
  process.kill(host.vms.get(third).pid, 'SIGKILL');
  const ended = { timeout: SETTLE_MS };
  await expect.poll(() => view(first)?.exit, ended).toMatchObject({ reason: 'guest-shutdown', exitCode: 7 });
  await expect.poll(() => view(second)?.exit, ended).toMatchObject({ reason: 'guest-shutdown', exitCode: 0 });
  await expect.poll(() => view(third)?.exit, ended).toMatchObject({ reason: 'killed', exitCode: null });
  await host.restart();
  expect(view(first)).toMatchObject({ state: 'stopped', exitCode: 7, exit: { exitCode: 7 } });
  await fork.remove();
  expect(await host.close()).toEqual([]);
}, 400_000);

async function consoleInput(host: VmHost, name: string): Promise<(words: string) => Promise<void>> {
  const { socket, log } = host.vms.serialPaths(name);
  const console = await openConsole({ socketPath: socket, logPath: log, backlogBytes: 0, isFollowing: true });
  console.resume();
  return (words) =>
    new Promise((resolve, reject) => console.write(words, (error) => (error ? reject(error) : resolve())));
}

interface CloneNetworkFacts {
  readonly nic: NicSpec;
  readonly forked: Record<string, string>;
  readonly answers: boolean;
  readonly namespace: string;
  /** The taps that have joined their bridge. */
  readonly taps: number;
}

interface NetworkFacts {
  readonly parent: NicSpec;
  readonly clones: readonly CloneNetworkFacts[];
  readonly own: string;
  readonly left: readonly string[];
}

describe('the network of clones', () => {
  const forkIn = async (network: string): Promise<NetworkFacts> => {
    const command = ['--net', 'node_modules/.bin/tsx', 'test/hosts/fork-network.ts', network];
    return JSON.parse((await run('unshare', command, { timeout: 300_000 })).stdout) as NetworkFacts;
  };

  test('fresh: each answers at an address of its own, also when the daemon has been restarted in between', async () => {
    const { parent, clones, own, left } = await forkIn('fresh');
    expect(new Set([parent.mac, ...clones.map(({ nic }) => nic.mac)]).size).toBe(3);
    for (const clone of clones) expect(clone).toMatchObject({ nic: { type: 'tap', bridge: 'br0' }, answers: true });
    for (const clone of clones) expect(clone.namespace).toBe(own);
    expect(left).toEqual([]);
  }, 320_000);

  test('isolated: each keeps its parent’s address, in a namespace that nobody else is in', async () => {
    const { parent, clones, own, left } = await forkIn('isolated');
    expect(new Set([own, ...clones.map(({ namespace }) => namespace)]).size).toBe(3);
    for (const { nic, taps, forked } of clones) {
      expect(nic).toEqual({ ...parent, type: 'isolated' });
      expect(taps).toBe(1);
      expect(forked['macs']).toBe(`eth0=${parent.mac}`);
    }
    expect(left).toEqual([]);
  }, 320_000);

  test('a guest that does not let go of its parent’s NIC is told of, and keeps running', async () => {
    const host = await VmHost.start();
    // The guest has no operating system, so nothing answers a request to unplug.
    await host.vms.run(vmSpec({ nics: [{}] }));
    const vm = host.vms.get('vm');
    const nics = vm.spec.nics.map((nic) => ({ ...nic, mac: '56:00:00:00:00:01' }));
    const replacing = vm.process.replaceNics({
      spec: vm.spec,
      nics,
      onPresent: async () => undefined,
      unplugTimeoutMs: 300,
    });
    expect(await codeOf(replacing)).toBe('TIMEOUT');
    expect(await qmpOf(vm).execute('query-status')).toMatchObject({ running: true });
    expect(await host.close()).toEqual([]);
  });
});
