/** The chain of files below a disk that is forked again and again, and what flattens it. Real files, real qemu-img. */
import { afterEach, beforeEach, expect, test } from 'vitest';
import { flattenVm } from '../../../../src/agent/fork/flatten.js';
import { isOverlayOf } from '../../../../src/agent/fork/overlay-merge.js';
import { longChains } from '../../../../src/agent/fork/parent-disks.js';
import { NO_OTHER_HOSTS } from '../../../../src/agent/image/layer-holders.js';
import type { RecordAmendment } from '../../../../src/agent/vm/record.js';
import type { ManagedVm } from '../../../../src/agent/vm/vms.js';
import type { VmDisks } from '../../../../src/backends/vm-disks.js';
import { ID, ImageScene, img } from '../../../support/image-scene.js';

let scene: ImageScene;
beforeEach(() => {
  scene = new ImageScene();
});
afterEach(() => scene.end());

const idOf = (index: number): string => String(index).padStart(16, '0');

/** Puts so many overlays on the disk, which itself consists of two files. Returns the top. */
async function stack(count: number): Promise<string> {
  let top = scene.disk;
  for (let index = 0; index < count; index++) {
    const path = `${scene.disk}.${idOf(index)}`;
    img('create', '-q', '-f', 'qcow2', '-u', '-b', top, '-F', 'qcow2', path, '1M');
    top = path;
  }
  return top;
}

/** A VM that runs on the disk. Its QEMU's part of a merge is done by qemu-img. */
function vmOn(path: string): ManagedVm {
  const disk = { id: 'd0', path, format: 'qcow2', isReadOnly: false };
  const merge: VmDisks['merge'] = async ({ path }, atSwitch) => {
    // QEMU leaves the content in the overlay, too.
    await atSwitch(async () => img('commit', '-q', '-d', path));
    return true;
  };
  const active = async () => new Map([['d0', { path: vm.spec.disks[0]!.path }]]);
  const process = { disks: { merge, active, isOpen: async () => true } };
  const vm = { spec: { name: 'web', disks: [disk] }, state: 'running', job: null, image: null, mergedOverlay: null };
  return Object.assign(vm, { process }) as never;
}

test('a disk of 16 files gets no other overlay', async () => {
  const { context } = await scene.contextOn('A');
  expect(await longChains(context, vmOn(await stack(13)))).toEqual([]);
  expect(await longChains(context, vmOn(await stack(14)))).toEqual(['disk d0 of web is a chain of 16 files']);
});

test('an overlay of a fork is told from a file of the user, also one of build 0.1.0', () => {
  const base = '/srv/web.qcow2';
  const [first, second] = [`${base}.${idOf(1)}`, `${base}.${idOf(2)}`];
  expect([isOverlayOf(first, base), isOverlayOf(second, first), isOverlayOf(`${first}.${idOf(2)}`, first)]).toEqual([
    ...[true, true, true],
  ]);
  expect([isOverlayOf(base, '/srv/golden.raw'), isOverlayOf(first, '/srv/other.qcow2'), isOverlayOf(base, '')]).toEqual(
    [...[false, false, false]],
  );
});

test('flattening merges from the top down to the first layer that somebody needs', async () => {
  const host = await scene.contextOn('A');
  const top = await stack(3);
  const vm = vmOn(top);
  host.vms.push(vm);
  const amended: string[] = [];
  Object.assign(host.context.vms, {
    whilePaused: (_: string, work: () => Promise<void>) => work(),
    amend: async (_: string, change: (record: object) => RecordAmendment | null) => {
      const changed = change(vm);
      Object.assign(vm, changed);
      if (changed?.spec !== undefined && changed.mergedOverlay === undefined) amended.push(changed.spec.disks[0]!.path);
    },
  });
  await scene.forked(host);
  const needed = `${scene.disk}.${idOf(0)}`;
  await host.context.images.update(ID, { disks: [{ id: 'd0', path: needed, format: 'qcow2' }], layers: [] });
  const first = await flattenVm(host.context, NO_OTHER_HOSTS, 'web');
  expect(first.mergedDisks).toEqual([top]);
  expect(first.keptLayers).toEqual([{ path: needed, reason: `needed by image ${ID}` }]);
  expect(amended).toEqual([`${scene.disk}.${idOf(1)}`]);
  await host.context.images.delete(ID);
  const { mergedDisks, keptLayers } = await flattenVm(host.context, NO_OTHER_HOSTS, 'web');
  expect(mergedDisks).toEqual([`${scene.disk}.${idOf(1)}`, needed]);
  expect(keptLayers).toEqual([]);
  expect(vm.spec.disks[0]?.path).toBe(scene.disk);
  expect((await flattenVm(host.context, NO_OTHER_HOSTS, 'web')).mergedDisks).toEqual([]);
  Object.assign(vm, { job: 'job-1' });
  await expect(flattenVm(host.context, NO_OTHER_HOSTS, 'web')).rejects.toMatchObject({ code: 'VM_BUSY' });
});
