/** What this host's policy does not allow is neither opened for another host, nor described to it. */
import { mkdir, mkdtemp, realpath, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { checkTarget } from '../../../../src/agent/inventory/inventory.js';
import { refuseSpecOfPeer } from '../../../../src/agent/policy/policy.js';
import { viewStorage } from '../../../../src/agent/storage/storage.js';
import type { HostContext } from '../../../../src/agent/vm/context.js';
import { QemuBackend } from '../../../../src/backends/qemu/backend.js';
import { type HostPolicy, NOTHING_ALLOWED } from '../../../../src/domain/policy.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';

const PROOF = '0'.repeat(32);
let directory: string;
const at = (name: string): string => join(directory, name);

beforeAll(async () => {
  directory = await realpath(await mkdtemp(join(tmpdir(), 'vmg-target-')));
  await mkdir(at('allowed'));
  for (const name of ['allowed/kernel', 'allowed/disk', 'secret', 'format']) await writeFile(at(name), 'x'.repeat(512));
});
afterAll(() => rm(directory, { recursive: true, force: true }));

function context(allowed: Partial<HostPolicy> = {}): Pick<HostContext, 'host' | 'policy' | 'vms' | 'rdma'> {
  const policy = { ...NOTHING_ALLOWED, paths: [at('allowed')], ...allowed };
  const vms = { backend: new QemuBackend() } as unknown as HostContext['vms'];
  return {
    host: 'B',
    policy,
    vms,
    rdma: { inventory: async () => Promise.reject(), probe: async () => Promise.reject() },
  };
}
const spec = (change: object) => parseSpec({ name: 'web', memory: { size: '64M' }, ...change });
const disk = (path: string, more: object = {}) => ({ id: 'd0', path, format: 'raw', ...more });

test('pre-flight opens what is allowed, and names what is not', async () => {
  const good = spec({ kernel: at('allowed/kernel'), disks: [disk(at('allowed/disk'))] });
  const bad = spec({ kernel: at('secret'), qemuArgs: ['-D', '/x'], disks: [disk(at('secret'))] });
  expect(await checkTarget(context(), good, null)).toEqual({
    disks: [{ path: at('allowed/disk'), isReadable: true, isWritable: true }],
    files: [{ path: at('allowed/kernel'), isReadable: true }],
    rdma: null,
  });
  const checks = await checkTarget(context(), bad, null);
  expect(checks.forbidden?.map(({ key }) => key)).toEqual(['paths', 'qemuArgs', 'qemuArgs']);
  expect(checks.files).toEqual([]);
  expect(checks.disks).toMatchObject([{ isReadable: false, forbidden: [{ key: 'paths', value: at('secret') }] }]);
});

test('a VM that comes is refused whatever it names that is not allowed', async () => {
  const refused = (change: object) => refuseSpecOfPeer(context(), spec(change), 'A');
  await expect(refused({ kernel: at('allowed/kernel') })).resolves.toBeUndefined();
  const nic = { id: 'n0', type: 'tap', bridge: 'br0' };
  for (const change of [
    ...[
      { kernel: at('secret') },
      { disks: [disk(at('secret'))] },
      { qemuArgs: ['-D', '/x'] },
      { devices: ['virtio-rng-pci'] },
    ],
    ...[{ nics: [nic] }, { kernel: at('allowed/../secret') }],
  ])
    await expect(refused(change)).rejects.toMatchObject({ code: 'NOT_PERMITTED', message: /host B .*host A brings/ });
  const nothingElse = refuseSpecOfPeer(context({ bridges: ['br0'] }), spec({ nics: [nic] }), 'A');
  await expect(nothingElse).resolves.toBeUndefined();
});

test('a disk is no less a path because the other host says that it serves it', async () => {
  const [plain] = spec({ disks: [disk(at('secret'))] }).disks;
  const served = { ...spec({}), disks: [{ ...plain!, served: { host: 'A', image: 'a'.repeat(16) } }] };
  await expect(refuseSpecOfPeer(context(), served, 'A')).rejects.toMatchObject({ code: 'NOT_PERMITTED' });
});

test('the content of other files is not told, not even as a digest', async () => {
  const file = (name: string) => ({ path: at(name), use: 'disk', isWritable: false, format: null });
  const [allowed, secret, mark] = await viewStorage(context(), PROOF, ['allowed/disk', 'secret', 'format'].map(file));
  expect(allowed).toMatchObject({ problem: null, digest: expect.any(String) });
  expect(secret).toMatchObject({
    problem: expect.stringMatching(/policy of B/),
    digest: null,
    inode: '',
    sizeBytes: 0,
  });
  expect(mark).toMatchObject({ problem: null, digest: null, inode: expect.stringMatching(/^\d+:\d+$/) });
});
