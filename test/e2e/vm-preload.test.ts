/** VMs whose memory the daemon serves: QEMU with the preload, connected to the addon. */

import { stat } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { loadNativeBinding } from '../../src/native/binding.js';
import { codeOf, VmHost, vmSpec } from '../hosts/vm-host.js';

const preloadPath = fileURLToPath(new URL('../../build/native/Release/libvmigrate-preload.so', import.meta.url));

let host: VmHost;
beforeEach(async () => {
  host = await VmHost.start('A', { native: loadNativeBinding(), preloadPath });
});
afterEach(async () => {
  expect(await host.close()).toEqual([]);
});

const TWO_REGIONS = { preload: true, cpus: 2, memory: { regions: [{ size: '64M' }, { size: '32M' }] } };

test('all of its memory is known to the daemon, and again to the next daemon', async () => {
  await host.vms.run(vmSpec(TWO_REGIONS));
  const before = host.vms.get('vm').memory?.snapshot();
  expect(before).toMatchObject({ state: 'complete', pid: host.vms.get('vm').pid });
  const knownBytes = before?.ranges.reduce((sum, range) => sum + range.lengthBytes, 0n);
  expect(knownBytes).toBe(96n << 20n);
  await host.restart();
  const vm = host.vms.get('vm');
  expect(vm.state).toBe('running');
  expect(vm.memory?.snapshot()).toEqual(before);
  await host.vms.pause('vm');
  await host.vms.resume('vm');
});

test('a target is registered before QEMU could touch a page', async () => {
  const incoming = { session: 's', accel: 'tcg', epoch: 3 } as const;
  const vm = await host.vms.prepareIncoming(vmSpec(TWO_REGIONS), incoming);
  expect(vm.memory?.snapshot().state).toBe('complete');
  for (const region of vm.regions) expect((await stat(region.path)).blocks).toBe(0);
  await host.restart();
  expect(host.vms.get('vm').memory?.snapshot().state).toBe('complete');
});

test('QEMU killed: the daemon sees it, and takes the next one of that name', async () => {
  await host.vms.run(vmSpec(TWO_REGIONS));
  const seen = host.exits();
  process.kill(host.vms.get('vm').pid, 'SIGKILL');
  await expect.poll(() => seen.length).toBe(1);
  expect((await host.vms.run(vmSpec(TWO_REGIONS))).state).toBe('running');
});

test('a start that fails leaves nothing, with the preload as well', async () => {
  expect(await codeOf(host.vms.run(vmSpec({ ...TWO_REGIONS, qemuArgs: ['-no-such-option'] })))).toBe('QEMU_FAILED');
  expect(host.vms.list()).toEqual([]);
});

test('private memory needs no preload', async () => {
  const spec = vmSpec({ preload: true, memory: { size: '64M', backing: 'private' } });
  await host.vms.run(spec);
  expect(host.vms.get('vm').memory).toBeNull();
});
