/** Merges of the disk of a VM that a real QEMU runs. The daemon dies, its disk is full, or QEMU does not answer. */
import { execFileSync } from 'node:child_process';
import { dirname } from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { resumeMerges, settleMerge } from '../../../../src/agent/fork/live-merge.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import type { VmSpec } from '../../../../src/domain/vm.js';
import { NAME, RunningVm } from '../../../support/running-vm.js';

/** Called before a directory is synced. */
const beforeSync = vi.hoisted(() => vi.fn<(path: string) => void>());
vi.mock(import('../../../../src/durable/durable-file.js'), async (original) => {
  const { syncDirectory, ...others } = await original();
  return { ...others, syncDirectory: (path) => (beforeSync(path), syncDirectory(path)) };
});

const IMAGE = '1'.repeat(16);
const BUSY = { code: 'VM_BUSY', message: expect.stringContaining('are being merged') };

let host: RunningVm;
let overlay: string;

/** The VM has been forked, and has written to its overlay since. */
beforeEach(async () => {
  host = new RunningVm();
  await host.start();
  await host.boot();
  overlay = await host.fork(IMAGE);
  await host.write('a');
});
afterEach(() => host.end());

async function expectOnBase(): Promise<void> {
  expect([await host.active(), host.recorded, host.has(overlay)]).toEqual([host.disk, host.disk, false]);
  expect([host.vm.state, host.vm.isMerging]).toEqual(['running', false]);
}

async function expectOnOverlay(): Promise<void> {
  expect([await host.active(), host.recorded, host.has(overlay)]).toEqual([overlay, overlay, true]);
  expect([host.vm.state, host.vm.isMerging]).toEqual(['running', false]);
  expect(await host.vm.process.disks.jobs()).toEqual([]);
}

/** What the guest writes now is on its disk when VM and image are gone. */
async function expectNothingLost(): Promise<void> {
  await host.write('z');
  await host.vms.stop(NAME, { isForced: true });
  if (host.context.images.has(IMAGE)) await host.images.remove(IMAGE);
  expect([host.read(), host.has(overlay)]).toEqual(['z', false]);
}

/** The merge makes no progress after its first megabytes. Resolves to a promise of its beginning. */
async function stalling(): Promise<{ readonly begun: Promise<void> }> {
  await host.write('a', 60);
  const begun = new Promise<void>((begin) => {
    host.intercept(async (command, args, send) => {
      const answer = await send(command === 'block-commit' ? { ...args, speed: 1 } : args);
      if (command === 'block-commit') begin();
      return answer;
    });
  });
  return { begun };
}

test('a merge puts the guest on the base, and the overlay is durably gone before it runs on', async () => {
  const run = host.vm.process.run.bind(host.vm.process);
  const events: string[] = [];
  const is = (): string => (host.has(overlay) ? 'there' : 'gone');
  Object.assign(host.vm.process, { run: () => (events.push(`run: ${is()}`), run()) });
  beforeSync.mockImplementation((path) => void (path === dirname(overlay) && events.push(`sync: ${is()}`)));
  expect((await host.images.remove(IMAGE)).mergedDisks).toEqual([overlay]);
  expect(events.slice(0, 2)).toEqual(['sync: gone', 'run: gone']);
  await expectOnBase();
  await expectNothingLost();
});

test('the guest stays paused until the record can be written, and nobody can resume it', async () => {
  const mend = host.refuseRecords(({ spec }) => spec?.disks[0]?.path === host.disk);
  await expect(host.images.remove(IMAGE)).rejects.toMatchObject({ code: 'NO_SPACE' });
  expect(await host.active()).toBe(host.disk);
  expect([host.vm.state, host.vm.isMerging]).toEqual(['paused', true]);
  await expect(host.vms.resume(NAME)).rejects.toMatchObject(BUSY);
  await expect(host.images.remove(IMAGE)).rejects.toMatchObject(BUSY);
  mend();
  await expect.poll(() => host.vm.isMerging).toBe(false);
  await expectOnBase();
  await expectNothingLost();
});

test('a late attempt to end one merge leaves the next one alone', async () => {
  const isBase = ({ spec }: { spec?: VmSpec }): boolean => spec?.disks[0]?.path === host.disk;
  let mend = host.refuseRecords(isBase);
  await expect(host.images.remove(IMAGE)).rejects.toMatchObject({ code: 'NO_SPACE' });
  const { process } = host.vm;
  const connected = process.connected.bind(process);
  let arrive = (): void => undefined;
  const late = new Promise<void>((resolve) => {
    arrive = resolve;
  });
  Object.assign(process, { connected: () => late });
  const attempt = settleMerge(host.context, host.vm);
  Object.assign(process, { connected });
  mend();
  await expect.poll(() => host.vm.isMerging).toBe(false);
  await host.images.remove(IMAGE);

  const second = await host.fork('2'.repeat(16));
  await host.write('b');
  mend = host.refuseRecords(isBase);
  await expect(host.images.remove('2'.repeat(16))).rejects.toMatchObject({ code: 'NO_SPACE' });
  arrive();
  await attempt;
  expect([host.vm.state, host.vm.isMerging, host.has(second)]).toEqual(['paused', true, true]);
  mend();
  await expect.poll(() => host.vm.isMerging).toBe(false);
  await expectOnBase();
});

test('a VM that is ended while its record cannot be written loses nothing', async () => {
  const mend = host.refuseRecords(({ spec }) => spec?.disks[0]?.path === host.disk);
  await expect(host.images.remove(IMAGE)).rejects.toMatchObject({ code: 'NO_SPACE' });
  await host.vms.stop(NAME, { isForced: true });
  mend();
  await expect.poll(() => host.vm.isMerging).toBe(false);
  await host.images.remove(IMAGE);
  expect([host.read(), host.has(overlay)]).toEqual(['a', false]);
});

test.each([
  ['has switched', true],
  ['has not switched', false],
])('QEMU does not answer the order to switch, and %s', async (_, isObeyed) => {
  host.intercept(async (command, args, send) => {
    if (command !== 'job-complete') return send(args);
    if (isObeyed) await send(args);
    throw new MigrationError('TIMEOUT', 'QEMU did not answer');
  });
  await expect(host.images.remove(IMAGE)).rejects.toMatchObject({ code: 'TIMEOUT' });
  await (isObeyed ? expectOnBase() : expectOnOverlay());
  await expectNothingLost();
});

test.each([
  ['before the record says so', false],
  ['before the overlay is removed', true],
])('the daemon dies when the disk has switched, %s', async (_, isRecorded) => {
  host.dieAtSwitch(isRecorded);
  await expect(host.images.remove(IMAGE)).rejects.toThrow('the daemon has died');
  await host.restart();
  expect([host.vm.state, host.vm.isMerging]).toEqual(['paused', true]);
  await expect(host.vms.resume(NAME)).rejects.toMatchObject(BUSY);
  await resumeMerges(host.context);
  await expectOnBase();
  await expectNothingLost();
});

test('the VM ends before the next daemon has removed an overlay whose disk has switched', async () => {
  host.dieAtSwitch(true);
  await expect(host.images.remove(IMAGE)).rejects.toThrow('the daemon has died');
  const { pid } = host.vm;
  await host.restart();
  process.kill(pid, 'SIGKILL');
  await expect.poll(() => host.vm.state).toBe('stopped');
  await resumeMerges(host.context);
  expect([host.vm.isMerging, host.has(overlay), host.read()]).toEqual([false, false, 'a']);
});

test('an overlay between others is removed by the next daemon, if QEMU has merged it', async () => {
  const top = await host.fork('2'.repeat(16));
  await host.context.images.delete('2'.repeat(16));
  // The daemon dies when QEMU has merged it.
  const merge = host.vm.process.disks.merge.bind(host.vm.process.disks);
  Object.assign(host.vm.process.disks, {
    merge: async (...args: Parameters<typeof merge>) => {
      await merge(...args);
      throw new Error('the daemon has died');
    },
    release: () => Promise.reject(new Error('the daemon has died')),
  });
  await expect(host.images.remove(IMAGE)).rejects.toThrow('the daemon has died');
  expect(host.has(overlay)).toBe(true);
  await host.restart();
  await resumeMerges(host.context);
  expect([await host.active(), host.recorded, host.has(overlay)]).toEqual([top, top, false]);
  expect(host.read(top)).toBe('a');
});

test('a VM can be paused and resumed while its overlay is merged', async () => {
  const { begun } = await stalling();
  const removal = host.images.remove(IMAGE).catch((error: unknown) => error);
  await begun;
  await host.vms.pause(NAME);
  await host.vms.resume(NAME);
  expect([host.vm.state, host.vm.isMerging]).toEqual(['running', true]);
  await host.vms.stop(NAME, { isForced: true });
  await removal;
  await expect.poll(() => host.vm.isMerging).toBe(false);
});

test('a VM that its user has paused stays paused on its base', async () => {
  await host.vms.pause(NAME);
  expect((await host.images.remove(IMAGE)).mergedDisks).toEqual([overlay]);
  expect([await host.active(), host.recorded, host.vm.state]).toEqual([host.disk, host.disk, 'paused']);
  await host.vms.resume(NAME);
  await expectNothingLost();
});

test('a merge of an ended VM that fails leaves it as it was', async () => {
  await host.vms.stop(NAME, { isForced: true });
  const { diskFiles } = host.vms.backend;
  await host.context.images.delete(IMAGE);
  const commitOverlay = diskFiles.commitOverlay.bind(diskFiles);
  Object.assign(diskFiles, { commitOverlay: () => Promise.reject(new MigrationError('NO_SPACE', 'no room')) });
  await expect(host.images.flatten(NAME)).rejects.toMatchObject({ code: 'NO_SPACE' });
  expect([host.vm.isMerging, host.recorded, host.has(overlay)]).toEqual([false, overlay, true]);
  Object.assign(diskFiles, { commitOverlay });
  expect((await host.images.flatten(NAME)).mergedDisks).toEqual([overlay]);
  expect([host.read(), host.recorded, host.has(overlay)]).toEqual(['a', host.disk, false]);
});

test('a merge without progress is given up', async () => {
  const { begun } = await stalling();
  const { disks } = host.vm.process;
  Object.assign(disks, { stalledMs: 200 });
  const removal = host.images.remove(IMAGE);
  await begun;
  await expect(removal).rejects.toMatchObject({ code: 'TIMEOUT', message: expect.stringContaining('no progress') });
  await expectOnOverlay();
  await expectNothingLost();
});

test('the daemon ends during a merge: the next one ends the job of QEMU', async () => {
  const { begun } = await stalling();
  const removal = host.images.remove(IMAGE).catch((error: unknown) => error);
  await begun;
  await host.restart();
  expect(await removal).toMatchObject({ code: 'QEMU_GONE' });
  expect(host.vm.isMerging).toBe(true);
  await resumeMerges(host.context);
  await expectOnOverlay();
  expect((await host.images.remove(IMAGE)).mergedDisks).toEqual([overlay]);
  await expectOnBase();
});

test('the mark of a merge that is over goes as soon as the record can be written', async () => {
  const mend = host.refuseRecords(({ isMerging }) => isMerging === false);
  expect((await host.images.remove(IMAGE)).mergedDisks).toEqual([overlay]);
  expect(host.vm.isMerging).toBe(true);
  mend();
  await expect.poll(() => host.vm.isMerging).toBe(false);
  await expectOnBase();
});

test('flattening merges files to which QEMU has given names of its own', async () => {
  await host.vms.stop(NAME, { isForced: true });
  await host.vms.stop(NAME, { isForced: true });
  await host.context.images.delete(IMAGE);
  const top = `${host.disk}.${'3'.repeat(16)}`;
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', overlay, '-F', 'qcow2', top]);
  await host.boot({ disks: [{ id: 'd0', path: top, format: 'qcow2' }] });
  expect((await host.images.flatten(NAME)).mergedDisks).toEqual([top, overlay]);
  expect(await host.vm.process.disks.isOpen(top)).toBe(false);
  await expectOnBase();
  await expectNothingLost();
});

test('the overlay of a VM that was removed is merged although another VM has its name', async () => {
  for (const _ of ['ended', 'removed']) await host.vms.stop(NAME, { isForced: true });
  const other = `${host.directory}/other`;
  execFileSync('qemu-img', ['create', '-q', '-f', 'raw', other, '64M']);
  await host.boot({ disks: [{ id: 'd0', path: other, format: 'raw' }] });
  expect((await host.images.remove(IMAGE)).mergedDisks).toEqual([overlay]);
  expect([host.read(), host.has(overlay), host.recorded]).toEqual(['a', false, other]);
});
