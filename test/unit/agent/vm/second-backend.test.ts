/** The life of VMs on a back end that is not QEMU. VmManager needs only what backend.ts declares. */
import { mkdir, mkdtemp, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { VmManager } from '../../../../src/agent/vm/vms.js';
import { FileRegistry } from '../../../../src/cluster/file.js';
import type { VmExit } from '../../../../src/domain/vm.js';
import { findByArgument } from '../../../../src/kit/process.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';
import { Sleeper, SleeperBackend } from '../../../support/sleeper.js';
import { MemoryStore } from '../../durable/memory-store.js';

let directory: string;
let registry: FileRegistry;
let backend: SleeperBackend;
let vms: VmManager;

const warnings: string[] = [];
const log = {
  info: () => undefined,
  warn: (_: object, message: string) => void warnings.push(message),
  error: () => undefined,
};
const spec = parseSpec({ name: 'web', memory: { size: '16M' }, preload: false });

async function start(): Promise<void> {
  backend = new SleeperBackend();
  vms = new VmManager({
    ...{
      host: 'A',
      stateDir: directory,
      ramDir: join(directory, 'ram'),
      accel: 'tcg',
      preloadPath: null,
      native: null,
    },
    ...{ registry, log, backend: backend as never },
  });
  await vms.start();
}

beforeEach(async () => {
  warnings.length = 0;
  directory = await mkdtemp(join(tmpdir(), 'vmg-second-'));
  registry = await FileRegistry.on(new MemoryStore());
  await start();
});

afterEach(async () => {
  for (const vm of vms.all()) await vms.destroy(vm.spec.name);
  await vms.close();
  expect(await readdir(join(directory, 'vms'))).toEqual([]);
  await rm(directory, { recursive: true });
});

test('a VM is run, paused, resumed, shown, stopped and forgotten', async () => {
  const view = await vms.run(spec);
  expect(view).toMatchObject({ name: 'web', state: 'running', machine: 'bed', epoch: 1, exit: null });
  expect(vms.get('web').qemuVersion).toBe('1.0');
  await vms.pause('web');
  expect(vms.list()).toMatchObject([{ name: 'web', state: 'paused', pid: view.pid }]);
  await vms.resume('web');
  expect(vms.list()).toMatchObject([{ state: 'running' }]);
  await vms.stop('web', { isForced: false });
  expect(vms.list()).toMatchObject([{ state: 'stopped', pid: null, exit: { reason: 'stopped', signal: 'SIGTERM' } }]);
  await expect(vms.resume('web')).rejects.toMatchObject({ code: 'CONFLICT' });
  await vms.stop('web', { isForced: false });
  expect(vms.list()).toEqual([]);
});

test('a guest that switches itself off has ended well; one whose process is killed has not', async () => {
  const ended = () => new Promise<VmExit>((resolve) => vms.on('exit', (_, exit) => resolve(exit)));
  for (const [exitCode, reason, end] of [
    [0, 'lay down', () => backend.sleepers.get('web')?.powerOff()],
    [null, 'killed', () => process.kill(vms.get('web').pid, 'SIGKILL')],
  ] as const) {
    await vms.run(spec);
    const exit = ended();
    end();
    expect(await exit).toMatchObject({ reason, exitCode });
    expect(vms.list()).toMatchObject([{ state: 'stopped', exitCode }]);
  }
});

test('a VM outlives the daemon, and is taken up in the state that it is in', async () => {
  const { pid } = await vms.run(spec);
  await vms.pause('web');
  await vms.close();
  await start();
  expect(vms.list()).toMatchObject([{ name: 'web', state: 'paused', pid }]);
  await vms.resume('web');
  expect(vms.list()).toMatchObject([{ state: 'running' }]);
  await vms.stop('web', { isForced: true });
  expect(vms.list()).toMatchObject([{ state: 'stopped', exit: { reason: 'stopped' } }]);
});

test('a process that does not answer is asked again and again, and complained of once', async () => {
  await vms.run(spec);
  const sleeper = backend.sleepers.get('web');
  sleeper?.fallSilent();
  await expect.poll(() => sleeper?.connectCount, { timeout: 20_000 }).toBeGreaterThan(3);
  expect(warnings).toEqual(['QEMU is alive but does not answer; it is asked now and then']);
  sleeper?.speakAgain();
  await expect
    .poll(
      () =>
        vms.pause('web').then(
          () => vms.list()[0]?.state,
          () => null,
        ),
      { timeout: 20_000 },
    )
    .toBe('paused');
});

test('a VM whose memory is damaged stands still for good, also after a restart of the daemon', async () => {
  const { pid } = await vms.run(spec);
  await vms.markDamaged(vms.get('web'), 'page 7');
  const damaged = { state: 'paused', damage: 'page 7', pid };
  expect(vms.list()).toMatchObject([damaged]);
  await vms.close();
  await start();
  expect(vms.list()).toMatchObject([damaged]);
  const refused = { code: 'DAMAGED', message: expect.stringContaining('page 7') as string };
  await expect(vms.resume('web')).rejects.toMatchObject(refused);
  await expect(vms.reserve('web', 'job-1')).rejects.toMatchObject(refused);
  await vms.stop('web', { isForced: true });
  await vms.markDamaged(vms.get('web'), 'page 8');
  expect(vms.list()).toMatchObject([{ state: 'stopped', damage: 'page 7' }]);
});

test('a VM whose memory is damaged is paused as soon as its process answers', async () => {
  await vms.run(spec);
  const sleeper = backend.sleepers.get('web');
  sleeper?.fallSilent();
  await vms.markDamaged(vms.get('web'), 'page 7').catch(() => undefined);
  await expect(vms.resume('web')).rejects.toThrow();
  expect(await sleeper?.runState()).toBe('running');
  sleeper?.speakAgain();
  await expect.poll(() => sleeper?.runState(), { timeout: 20_000 }).toBe('paused');
}, 30_000);

test('a VM that has never run is ended by force only if no session or fork needs it', async () => {
  const options = { session: 'ab'.repeat(16), accel: 'tcg', epoch: 5 } as const;
  await vms.prepareIncoming(spec, options);
  const { pid } = vms.get('web');
  const refused = { code: 'CONFLICT', message: 'web is incoming' };
  await expect(vms.stop('web', { isForced: true })).rejects.toMatchObject(refused);
  await expect(vms.stop('web', { isForced: false, isUnclaimed: true })).rejects.toMatchObject(refused);
  await vms.stop('web', { isForced: true, isUnclaimed: true });
  expect(vms.list()).toEqual([]);
  expect(() => process.kill(pid, 0)).toThrow(/ESRCH/);
});

test('a VM whose directory is gone, as after a backup, is listed, and a new one does not end it', async () => {
  const { pid } = await vms.run(spec);
  const record = await readFile(join(directory, 'vms/web/record.json'));
  const state = await readdir(join(directory, 'vms/web'));
  await vms.close();
  await rm(join(directory, 'vms/web/record.json'));
  await rename(join(directory, 'vms/web'), join(directory, 'web.aside'));
  await start();
  expect(vms.list()).toMatchObject([{ name: 'web', state: 'unreadable', pid }]);
  await expect(vms.run(spec)).rejects.toMatchObject({
    code: 'CORRUPT',
    remedy: expect.stringContaining(`kill ${pid}`) as string,
  });
  process.kill(pid!, 0);
  // The remedy: the record comes back.
  await vms.close();
  expect(state).toContain('record.json');
  await rename(join(directory, 'web.aside'), join(directory, 'vms/web'));
  await writeFile(join(directory, 'vms/web/record.json'), record);
  await start();
  expect(vms.list()).toMatchObject([{ name: 'web', state: 'running', pid }]);
});

test.each(['missing', "another host's"])(
  'force ends a VM whose owner record is %s, nothing else does',
  async (which) => {
    const { pid } = await vms.run(spec);
    if (which === 'missing') await registry.removeOwner('web', 1);
    else await registry.swapOwner('web', 1, { vm: 'web', owner: 'Z', epoch: 2, session: null });
    const refused = { code: 'OWNER_CHANGED', remedy: expect.stringContaining('vmctl stop --force') as string };
    await expect(vms.stop('web', { isForced: false })).rejects.toMatchObject(refused);
    await expect(vms.resume('web')).rejects.toMatchObject(refused);
    await vms.stop('web', { isForced: true });
    expect(() => process.kill(pid!, 0)).toThrow(/ESRCH/);
    await vms.stop('web', { isForced: true });
    expect(vms.list()).toEqual([]);
  },
);

test('a start whose record cannot be written leaves no process', async () => {
  // A directory where the next record would be written.
  Sleeper.onLaunched = () => mkdir(join(directory, 'vms/web/record.json.new'));
  await expect(vms.run(spec)).rejects.toThrow(/EISDIR/);
  Sleeper.onLaunched = async () => undefined;
  expect(await findByArgument(`sleeper ${join(directory, 'vms/web')}`)).toEqual([]);
  expect(vms.list()).toEqual([]);
});
