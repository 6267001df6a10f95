/** Memory is promised once, with real QEMUs: the guest that has the promise never pays for one that comes later. */
import { execFileSync } from 'node:child_process';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { hostFacts } from '../../src/agent/inventory/host-facts.js';
import { VmHost, vmSpec } from '../hosts/vm-host.js';

let host: VmHost;
beforeEach(async () => {
  host = await VmHost.start();
});
afterEach(async () => {
  expect(await host.close()).toEqual([]);
});

test('a VM that comes when the memory is promised is refused, and the one that has the promise runs on', async () => {
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=100m', 'none', host.ramDir]);
  try {
    const specs = ['first', 'second'].map((name) => vmSpec({ name }));
    const outcomes = await Promise.allSettled(specs.map((spec) => host.vms.run(spec)));
    expect(outcomes.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
    expect(outcomes.find(({ status }) => status === 'rejected')).toMatchObject({ reason: { code: 'NO_SPACE' } });
    const [{ name } = { name: '' }, ...others] = host.vms.list();
    expect(others).toEqual([]);
    await host.restart();
    // A page that the guest takes while the host is looked at makes it less, never more.
    expect((await hostFacts(host.vms)).ramFileFreeBytes).toBeLessThanOrEqual(36 * 2 ** 20);
    await expect.poll(async () => (await hostFacts(host.vms)).ramFileFreeBytes).toBe(36 * 2 ** 20);
    expect(host.vms.list()).toMatchObject([{ name, state: 'running' }]);
    await host.vms.destroy(name);
    // The kernel frees the pages when the process of QEMU is gone, a little later.
    await expect.poll(async () => (await hostFacts(host.vms)).ramFileFreeBytes).toBe(100 * 2 ** 20);
  } finally {
    execFileSync('umount', ['--lazy', host.ramDir]);
  }
});
