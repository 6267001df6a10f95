/** The disks of a fork that is undone, with a real QEMU: what the parent has written is never lost or misplaced. */
import { execFileSync } from 'node:child_process';
import { copyFileSync, renameSync } from 'node:fs';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { mergeOffline } from '../../../../src/agent/fork/overlay-merge.js';
import { ParentDisks } from '../../../../src/agent/fork/parent-disks.js';
import type { ForkRecord } from '../../../../src/agent/fork/record.js';
import { undoFork } from '../../../../src/agent/fork/undo.js';
import { NAME, RunningVm } from '../../../support/running-vm.js';

const [FIRST, FORK] = ['1'.repeat(16), '2'.repeat(16)];

let host: RunningVm;
beforeEach(async () => {
  host = new RunningVm();
  await host.start();
  await host.boot();
});
afterEach(() => host.end());

/** Undoes the fork as the daemon does that finds it. */
function undo(change: Partial<ForkRecord> = {}): Promise<void> {
  const request = {
    ...{ fork: FORK, job: 'job-1', vm: NAME, image: null, cloneCount: 1, namePrefix: null, parentMode: 'continue' },
    ...{ memory: 'shared', network: 'none', disks: 'overlay', isPartialAllowed: false },
  };
  const record = {
    ...{ version: 1, request, state: 'prepared', image: FORK, isWarm: false, clones: [], outcome: null, failure: null },
    ...change,
  };
  return undoFork(host.context, record as ForkRecord);
}

const onThe = async (file: string): Promise<void> => {
  expect([await host.active(), host.recorded]).toEqual([file, file]);
  expect([host.vm.state, host.vm.isMerging]).toEqual(['running', false]);
};

test.each([
  ['does not say so', false],
  ['says so', true],
])('the second fork of a VM is undone into the file of the first; the record %s', async (_, isRecorded) => {
  const first = await host.fork(FIRST);
  await host.write('a');
  const second = await host.fork(FORK, { isRecorded });
  await host.write('b');
  await host.restart();
  await undo();
  await onThe(first);
  expect([host.read(first), host.read(), host.has(second)]).toEqual(['b', '', false]);
  expect(host.context.images.has(FORK)).toBe(false);
});

test('a second fork is undone after the first one has been merged', async () => {
  await host.fork(FIRST);
  await host.write('a');
  expect((await host.images.remove(FIRST)).mergedDisks).toHaveLength(1);
  await host.fork(FIRST);
  const second = await host.fork(FORK);
  await host.write('b');
  await host.images.remove(FIRST);
  await host.restart();
  await undo();
  await onThe(host.disk);
  expect([host.read(), host.has(second)]).toEqual(['b', false]);
});

test('a fork that has not come to its fork point leaves no overlay', async () => {
  await host.makeImage(FORK);
  await new ParentDisks(host.context, host.vm, FORK).prepare('continue');
  const [overlay] = host.context.images.get(FORK).overlays;
  expect(host.has(overlay!.path)).toBe(true);
  await host.restart();
  await undo();
  await onThe(host.disk);
  expect(host.has(overlay!.path)).toBe(false);
});

test.each([
  ['before the record says so', false],
  ['before the overlay is removed', true],
])('the daemon dies when the disk has switched, %s: the parent runs on without the overlay', async (_, isRecorded) => {
  const overlay = await host.fork(FORK);
  await host.write('b');
  host.dieAtSwitch(isRecorded);
  await expect(undo()).rejects.toThrow('the daemon has died');
  await host.restart();
  const { process } = host.vm;
  for (const name of ['run', 'cancelAndRun'] as const) {
    const run = process[name].bind(process);
    const checked = () => (expect(host.has(overlay), 'the overlay is there').toBe(false), run());
    Object.assign(process, { [name]: checked });
  }
  await undo();
  await onThe(host.disk);
  expect([host.read(), host.context.images.has(FORK)]).toEqual(['b', false]);
});

test('an undo whose switch cannot be recorded is repeated; the parent does not run in between', async () => {
  const overlay = await host.fork(FORK);
  await host.write('b');
  const disks = new ParentDisks(host.context, host.vm, FORK);
  const mend = host.refuseRecords(({ spec }) => spec?.disks[0]?.path === host.disk);
  await expect(disks.undo()).rejects.toMatchObject({ code: 'NO_SPACE' });
  expect([await host.active(), host.vm.state, host.has(overlay)]).toEqual([host.disk, 'paused', true]);
  await expect(undo()).rejects.toMatchObject({ code: 'NO_SPACE' });
  expect(host.vm.state).toBe('paused');
  mend();
  await undo();
  await onThe(host.disk);
  expect([host.read(), host.has(overlay)]).toEqual(['b', false]);
});

test('a parent that ends before its undone disk has switched loses nothing', async () => {
  const overlay = await host.fork(FORK, { isRecorded: false });
  await host.write('b');
  host.intercept((command, args, send) =>
    command === 'block-commit' ? Promise.reject(new Error('the daemon has died')) : send(args),
  );
  Object.assign(host.vm.process.disks, { abandonMerges: () => Promise.reject(new Error('the daemon has died')) });
  await expect(undo()).rejects.toThrow('the daemon has died');
  const { pid } = host.vm;
  await host.restart();
  process.kill(pid, 'SIGKILL');
  await expect.poll(() => host.vm.state).toBe('stopped');
  await undo();
  expect([host.read(), host.has(overlay)]).toEqual(['b', false]);
});

test('of a parent that was removed, the overlay is merged', async () => {
  const overlay = await host.fork(FORK);
  await host.write('b');
  for (const _ of ['ended', 'removed']) await host.vms.stop(NAME, { isForced: true });
  await undo();
  expect([host.read(), host.has(overlay), host.context.images.has(FORK)]).toEqual(['b', false, false]);
});

test('an overlay that comes back in a crash of the machine is not merged over newer content', async () => {
  const overlay = await host.fork(FORK);
  await host.write('b');
  const saved = `${overlay}.saved`;
  let isOff = false;
  host.intercept(async (command, args, send) => {
    if (command === 'job-complete') copyFileSync(overlay, saved);
    if (command === 'blockdev-del' && !isOff) {
      // The parent runs on its base, and the mark of the merge is still there.
      await host.write('c');
      isOff = true;
    }
    if (isOff) throw new Error('the power is off');
    return send(args);
  });
  await expect(undo()).rejects.toThrow('the power is off');
  const { pid } = host.vm;
  await host.restart();
  process.kill(pid, 'SIGKILL');
  await expect.poll(() => host.vm.state).toBe('stopped');
  renameSync(saved, overlay);
  await undo();
  expect([host.read(), host.has(overlay), host.vm.isMerging]).toEqual(['c', false, false]);
  expect([host.recorded, host.context.images.has(FORK)]).toEqual([host.disk, false]);
});

test.each([
  ['an undo', false],
  ['the removal of the image', true],
])('%s keeps the overlay of an ended parent while a file below it is missing', async (_, isRemoval) => {
  const overlay = await host.fork(FORK);
  await host.write('b');
  await host.vms.stop(NAME, { isForced: true });
  const work = (): Promise<unknown> => (isRemoval ? host.images.remove(FORK) : undo());
  const elsewhere = `${host.disk}.unmounted`;
  renameSync(host.disk, elsewhere);
  await expect(work()).rejects.toThrow('No such file');
  expect([host.has(overlay), host.context.images.has(FORK)]).toEqual([true, true]);
  renameSync(elsewhere, host.disk);
  await work();
  expect([host.read(), host.has(overlay), host.context.images.has(FORK)]).toEqual(['b', false, false]);
});

test('an overlay is not taken for missing if its file system does not say', async () => {
  const base = { id: 'd0', path: host.disk, format: 'raw' } as const;
  const overlay = { id: 'd0', path: `${host.disk}/overlay`, format: 'qcow2', vm: NAME, base } as const;
  await expect(mergeOffline(host.vms.backend.diskFiles, overlay)).rejects.toMatchObject({ code: 'ENOTDIR' });
});

test.each([
  ['another UUID', false],
  ['the UUID of the parent', true],
])('a new VM with the name of the parent and %s is left alone', async (_, isSameUuid) => {
  const { uuid } = host.vm.spec;
  const incarnation = (await host.context.registry.owner(NAME))!.incarnation!;
  const overlay = await host.fork(FORK);
  await host.write('b');
  for (const _ of ['ended', 'removed']) await host.vms.stop(NAME, { isForced: true });
  const other = `${host.directory}/other`;
  execFileSync('qemu-img', ['create', '-q', '-f', 'raw', other, '64M']);
  const disks = [{ id: 'd0', path: other, format: 'raw' }];
  await host.boot({ disks, ...(isSameUuid ? { uuid } : {}) });
  await host.vms.pause(NAME);
  await undo(isSameUuid ? { incarnation } : {});
  expect([host.read(), host.has(overlay), host.context.images.has(FORK)]).toEqual(['b', false, false]);
  expect([host.vm.state, host.vm.isMerging]).toEqual(['paused', false]);
  expect(host.recorded).toBe(other);
});

test('the overlay of a parent that has moved is kept for its new host', async () => {
  const overlay = await host.fork(FORK);
  await host.write('b');
  const { registry } = host.context;
  const { epoch } = (await registry.owner(NAME))!;
  await registry.swapOwner(NAME, epoch, { vm: NAME, owner: 'B', epoch: epoch + 1, session: null });
  await host.vms.pause(NAME).catch(() => undefined);
  await host.vms.setState(NAME, 'departed');
  await undo();
  expect([host.has(overlay), host.read(overlay), host.read()]).toEqual([true, 'b', '']);
  expect(host.context.images.get(FORK).state).toBe('unloaded');
  expect(host.vm.state).toBe('departed');
});
