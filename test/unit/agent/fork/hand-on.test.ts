/** To whom the removal of an image leaves an overlay that is not merged, and what becomes of it there. A real QEMU. */
import { afterEach, beforeEach, expect, test } from 'vitest';
import { ParentDisks } from '../../../../src/agent/fork/parent-disks.js';
import type { VmSpec } from '../../../../src/domain/vm.js';
import { NAME, RunningVm } from '../../../support/running-vm.js';

const [OLD, NEW] = ['1'.repeat(16), '2'.repeat(16)];

let host: RunningVm;
let first: string;

/** The VM has been forked, and has written to its overlay since. */
beforeEach(async () => {
  host = new RunningVm();
  await host.start();
  await host.boot();
  first = await host.fork(OLD);
  await host.write('a');
});
afterEach(() => host.end());

const overlaysOf = (id: string): string[] => host.context.images.get(id).overlays.map(({ path }) => path);

test('an image that waits in the pool is left nothing, because it may be deleted at any time', async () => {
  await host.makeImage(NEW);
  await host.context.images.update(NEW, { state: 'capturing' });
  expect((await host.images.remove(OLD)).mergedDisks).toEqual([first]);
  expect([overlaysOf(NEW), host.recorded, host.has(first), host.read()]).toEqual([[], host.disk, false, 'a']);
});

test('a fork in progress keeps what it is left when it prepares the disks again, and so does its undo', async () => {
  await host.makeImage(NEW);
  await host.context.images.update(NEW, { state: 'capturing' });
  const disks = new ParentDisks(host.context, host.vm, NEW);
  await disks.prepare('continue');
  const [second] = overlaysOf(NEW);
  expect((await host.images.remove(OLD)).mergedDisks).toEqual([]);
  await disks.prepare('continue');
  expect(overlaysOf(NEW)).toEqual([first, second]);
  const disk = { id: 'd0', path: host.disk, format: 'raw', isReadOnly: false } as const;
  const other: Pick<VmSpec, 'name' | 'disks'> = { name: 'other', disks: [disk] };
  await expect(host.images.refuseWritesToImages(other)).rejects.toMatchObject({ code: 'CONFLICT' });

  await host.vm.process.pause();
  await disks.snapshot();
  await disks.settle();
  await host.vm.process.run();
  expect([await host.active(), host.recorded]).toEqual([second, second]);
  await host.write('b');
  await disks.undo();
  expect([await host.active(), host.recorded, host.read()]).toEqual([host.disk, host.disk, 'b']);
  expect([host.has(first), host.has(second!)]).toEqual([false, false]);
});

test('the overlay below that of a fork in progress stays although their VM has ended', async () => {
  const second = await host.fork(NEW);
  await host.context.images.update(NEW, { state: 'capturing' });
  await host.write('b');
  await host.vms.stop(NAME, { isForced: true });
  expect((await host.images.remove(OLD)).mergedDisks).toEqual([]);
  expect(overlaysOf(NEW)).toEqual([first, second]);
  await new ParentDisks(host.context, host.vm, NEW).undo();
  expect([host.read(), host.has(first), host.has(second)]).toEqual(['b', false, false]);
});
