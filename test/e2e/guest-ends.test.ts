/** Ends of guests and of disks, with real QEMUs: the power button, a power-off in the middle of a move, a full disk. */
import { execFileSync } from 'node:child_process';
import { closeSync, openSync, writeSync } from 'node:fs';
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { readRecord } from '../../src/agent/vm/record.js';
import { stopForUser } from '../../src/agent/vm/user-stop.js';
import { GuestAgent } from '../../src/backends/qemu/guest-agent.js';
import type { JobView } from '../../src/domain/job.js';
import type { VmEvent } from '../../src/domain/vm-event.js';
import { DirectoryLock } from '../../src/durable/directory-lock.js';
import { Reserve } from '../../src/durable/reserve.js';
import { loadNativeBinding } from '../../src/native/binding.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { agentInitrd, Guest } from '../hosts/guest.js';
import { codeOf, VmHost, vmSpec } from '../hosts/vm-host.js';
import { socketDirectoryIn } from '../support/qemu-user.js';

const MOVE_MS = 60_000;

it('a full state disk refuses new VMs, keeps none from ending, and no daemon from starting', async () => {
  const host = await VmHost.start();
  const directory = join(host.directory, 'small');
  await mkdir(directory);
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', directory]);
  const reserve = Reserve.of(directory);
  const fillers: string[] = [];
  const fill = () => {
    fillers.push(join(directory, `filler-${fillers.length}`));
    const file = openSync(fillers.at(-1) ?? '', 'w');
    try {
      for (;;) writeSync(file, Buffer.alloc(4096));
    } catch (error) {
      expect(error).toMatchObject({ code: 'ENOSPC' });
    } finally {
      closeSync(file);
    }
  };
  const vms = host.manager(directory);
  try {
    expect(await reserve.restore()).toBe(true);
    await vms.start();
    for (const name of ['one', 'two']) await vms.run(vmSpec({ name }));
    fill();
    expect(await codeOf(vms.run(vmSpec({ name: 'three' })))).toBe('NO_SPACE');
    const lock = await DirectoryLock.take(directory, (descriptor) => loadNativeBinding().lockFile(descriptor));
    await lock.giveBack();
    expect(await stopForUser(vms, 'one', { isForced: false, gracefulMs: 0 })).toMatchObject({ how: 'ended' });
    // Nothing is left of the reserve either.
    fill();
    await vms.stop('two', { isForced: false });
    expect(vms.list()).toMatchObject([{ name: 'two', state: 'stopped', exit: { reason: 'stopped' } }]);
    expect(await readRecord(vms.directoryOf('two'))).toMatchObject({ state: 'running' });
    expect(await codeOf(vms.run(vmSpec({ name: 'three' })))).toBe('NO_SPACE');
    for (const filler of fillers) await rm(filler);
    await expect
      .poll(() => readRecord(vms.directoryOf('two')), { timeout: 10_000 })
      .toMatchObject({ state: 'stopped', process: null });
    expect(await vms.run(vmSpec({ name: 'three' }))).toMatchObject({ state: 'running' });
    expect(await reserve.restore()).toBe(true);
  } finally {
    for (const filler of fillers) await rm(filler, { force: true });
    for (const vm of vms.all()) await vms.destroy(vm.spec.name);
    await vms.close();
    reserve.close();
    execFileSync('umount', [directory]);
    expect(await host.close()).toEqual([]);
  }
});

let cluster: Cluster;
beforeAll(async () => {
  cluster = await Cluster.create();
});
afterAll(() => cluster?.destroy());

/** Runs a command in the guest by its agent, while it is on B. The answer may not come any more. */
async function tellGuest(name: string, ...command: string[]): Promise<void> {
  const agent = await GuestAgent.connect(
    join(socketDirectoryIn(join(cluster.hostDirectory('B'), `state/vms/${name}`)), 'agent.sock'),
    MOVE_MS,
  );
  await agent.execute('guest-exec', { path: '/bin/busybox', arg: command }).catch(() => undefined);
  agent.close();
}

/** Moves the guest to B so slowly that it ends by this command before its pages are there. Returns the ended job. */
async function endWhileMoving(name: string, ...command: string[]): Promise<JobView> {
  const { id } = await cluster.json<JobView>('A', 'vmigrate', name, 'B', '--bandwidth', '2', '--detach');
  const job = () => cluster.json<JobView>('A', 'vmctl', 'job', id);
  await eventually('pages come', MOVE_MS, async () => ((await job()).step === 'drain' ? true : undefined));
  await tellGuest(name, ...command);
  return eventually('the job has ended', MOVE_MS, async () => {
    const view = await job();
    return view.state === 'running' || view.state === 'recovering' ? undefined : view;
  });
}

it('a guest that ends while its pages still come ends the move as done, on both hosts', async () => {
  const options = { memoryMiB: 192, touchMiB: 96, restPercent: 80 };
  const extra = { guestAgent: true, initrd: agentInitrd(), devices: ['pvpanic'] };
  const [guest, frail] = await Promise.all(
    ['w', 'frail'].map((name) => Guest.start(cluster, 'A', { name, ...options, extra })),
  );
  const ended = await endWhileMoving('w', 'poweroff', '-f');
  expect(ended).toMatchObject({ state: 'done', error: null });
  expect(ended.report).toMatchObject({ guestEnd: { reason: 'guest-shutdown', exitCode: 0 } });
  expect(await guest?.view('A')).toBeUndefined();
  expect(await guest?.view('B')).toMatchObject({ state: 'stopped', exit: { reason: 'guest-shutdown', exitCode: 0 } });
  expect((await cluster.must(cluster.vmctl('B', 'ps'))).stdout).toContain('stopped: guest-shutdown (0)');
  expect((await cluster.must(cluster.vmctl('B', 'logs', 'w'))).stdout).toContain('VMG WORK');
  expect((await cluster.must(cluster.vmctl('B', 'stop', 'w'))).stdout).toContain('it had ended before (exit code 0)');

  const panicked = await endWhileMoving('frail', 'sh', '-c', 'echo c >/proc/sysrq-trigger');
  expect(panicked).toMatchObject({ state: 'done', error: null });
  expect(panicked.report).toMatchObject({ guestEnd: { reason: 'panicked', exitCode: null } });
  expect(await frail?.view('A')).toBeUndefined();
  expect(await frail?.view('B')).toMatchObject({ state: 'stopped', exit: { reason: 'panicked', exitCode: null } });
  const happened = async (host: string) => {
    const events = await cluster.json<VmEvent[]>(host, 'vmctl', 'events');
    return events.filter(({ vm }) => vm === 'frail').map(({ kind, peer, exit }) => [kind, peer ?? exit?.reason]);
  };
  expect(await happened('A')).toEqual([
    ['started', undefined],
    ['leaving', 'B'],
    ['left', 'B'],
    ['gone', undefined],
  ]);
  expect(await happened('B')).toEqual([
    ['arriving', 'A'],
    ['arrived', 'A'],
    ['stopped', 'panicked'],
  ]);
  for (const { id } of [ended, panicked]) {
    expect(await cluster.json<JobView>('B', 'vmctl', 'job', id)).toMatchObject({ state: 'done', error: null });
  }
});

it('the power button shuts a guest down that listens to it, and a deaf one is ended after the time limit', async () => {
  const [keen, deaf] = await Promise.all([
    Guest.start(cluster, 'A', { name: 'keen', memoryMiB: 96, touchMiB: 8, restPercent: 80, hasButton: true }),
    Guest.start(cluster, 'A', { name: 'deaf', memoryMiB: 16, touchMiB: 4, image: 'nano' }),
  ]);
  expect(await keen.serialLog('A')).toContain('VMG BUTTON ready');
  const shutDown = await cluster.must(cluster.vmctl('A', 'stop', 'keen'));
  expect(shutDown.stdout).toBe('stopped keen: the guest has shut down (exit code 0)\n');
  await cluster.must(cluster.vmctl('A', 'reset', 'deaf'));
  await eventually('it boots again', MOVE_MS, async () =>
    (await deaf.serialLog('A')).split('VMG BOOT').length === 3 ? true : undefined,
  );
  const { stdout } = await cluster.must(cluster.vmctl('A', 'stop', '--timeout', '1', 'deaf'));
  expect(stdout).toBe('stopped deaf: the guest did not react to its power button within 1 s, so it was ended\n');
  expect(await cluster.qemuPids('A')).toEqual([]);
});
