import { execFile, spawn } from 'node:child_process';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { VmCgroups } from '../../src/agent/contain/cgroups.js';
import { openConsole } from '../../src/agent/vm/console.js';
import { endProcess, isAlive, type ProcessIdentity } from '../../src/kit/process.js';
import { guestImage } from '../hosts/guest.js';
import { expectOutput, VmHost, vmSpec } from '../hosts/vm-host.js';
import { QEMU_USERS } from '../support/qemu-user.js';

const run = promisify(execFile);

test('the console: past and present output to each reader, input to the guest', async () => {
  const host = await VmHost.start();
  await host.vms.run(
    vmSpec({
      ...guestImage(),
      memory: { size: '192M' },
      append: 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=16 vmg.restpct=75',
    }),
  );
  const { socket, log } = host.vms.serialPaths('vm');
  const open = () => openConsole({ socketPath: socket, logPath: log, backlogBytes: 65_536, isFollowing: true });
  const early = await open();
  await expectOutput(early, /VMG WORK/, 90_000);
  const logged = await readFile(log, 'utf8');
  const late = await open();
  const backlog = expectOutput(late, /VMG BOOT/, 30_000);
  expect(logged).toContain('VMG BOOT');
  await backlog;
  late.write('verify\n');
  expect(await expectOutput(late, /VERIFY pages \d+ bad \d+/, 60_000)).toContain('bad 0');
  const ended = new Promise((resolve) => early.once('close', resolve));
  early.resume();
  await host.vms.stop('vm', { isForced: false });
  await ended;
  late.destroy();
  const past = await openConsole({ socketPath: null, logPath: log, backlogBytes: 100, isFollowing: false });
  const chunks: Buffer[] = [];
  for await (const chunk of past) chunks.push(chunk as Buffer);
  expect(Buffer.concat(chunks)).toHaveLength(100);
  expect(await host.close()).toEqual([]);
});

test('a VM is in cgroups of its own, if this host has any, and they end with it', async () => {
  const host = await VmHost.start();
  const { pid } = await host.vms.run(vmSpec({}));
  const place = /\/vmigrate-A-[0-9a-f]{8}\/vm-vm$/m;
  const cgroups = await VmCgroups.open('unused', host.directory);
  await cgroups.close();
  const isExpected = cgroups.isUsable && QEMU_USERS !== null;
  expect(place.test(await readFile(`/proc/${pid}/cgroup`, 'utf8'))).toBe(isExpected);
  await host.vms.stop('vm', { isForced: true });
  expect(await host.close()).toEqual([]);
});

test('a tap on a bridge, in a network of its own', async () => {
  const script = `
    import { createTaps, listBridges, removeTaps, tapNames } from './src/agent/vm/network.ts';
    import { parseSpec } from './src/schemas/vm-spec.ts';
    import { execFileSync } from 'node:child_process';
    const ip = (...args: string[]) => execFileSync('ip', args, { encoding: 'utf8' });
    void (async () => {
      ip('link', 'add', 'br0', 'type', 'bridge');
      const spec = parseSpec({ name: 'vm', memory: { size: '64M' }, nics: [{ bridge: 'br0' }, {}] });
      const taps = tapNames('A', spec);
      await createTaps(spec, taps, 64055);
      const joined = ip('link', 'show', 'master', 'br0');
      // The tap already exists, as after a crash.
      await createTaps(spec, taps, null);
      await removeTaps(taps);
      await removeTaps(taps);
      const left = ip('-o', 'link', 'show').split('\\n').filter((line) => line.includes('vmg'));
      console.log(JSON.stringify({ bridges: await listBridges(), taps, joined, left }));
    })();
  `;
  const { stdout } = await run('unshare', ['--net', 'node_modules/.bin/tsx', '--eval', script]);
  const seen = JSON.parse(stdout) as {
    bridges: string[];
    taps: Record<string, string>;
    joined: string;
    left: string[];
  };
  expect(seen.bridges).toEqual(['br0']);
  expect(Object.keys(seen.taps)).toEqual(['net0']);
  expect(seen.taps['net0']).toMatch(/^vmg[0-9a-f]{12}$/);
  expect(seen.joined).toContain(seen.taps['net0']);
  expect(seen.left).toEqual([]);
});

test('QEMU is not disturbed by the end of the process that started it', async () => {
  const script = `
    import { startDetached } from './src/backends/qemu/start.ts';
    void (async () => {
      const directory = process.argv[1];
      const options = { outputPath: directory + '/out', directory, environment: { MARK: 'yes' } };
      const { identity } = await startDetached('/bin/sh', ['-c', 'echo $MARK; exec sleep 60'], options);
      console.log(JSON.stringify(identity));
      process.kill(process.pid, 'SIGKILL');
    })();
  `;
  const directory = await mkdtemp(join(tmpdir(), 'vmg-process-'));
  const child = spawn('node_modules/.bin/tsx', ['--eval', script, directory], { stdio: ['ignore', 'pipe', 'inherit'] });
  const output = await new Promise<Buffer>((resolve) => child.stdout.once('data', resolve));
  const identity = JSON.parse(output.toString()) as ProcessIdentity;
  await sleep(200);
  expect(await isAlive(identity)).toBe(true);
  expect(await isAlive({ ...identity, startTicks: '1' })).toBe(false);
  expect(await readFile(join(directory, 'out'), 'utf8')).toBe('yes\n');
  await endProcess(identity, 1000);
  expect(await isAlive(identity)).toBe(false);
  await rm(directory, { recursive: true });
});
