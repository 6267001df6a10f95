/** `vmctl stop`, and what else may happen to the VM while its guest is waited for. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { stopForUser } from '../../../../src/agent/vm/user-stop.js';
import { VmManager } from '../../../../src/agent/vm/vms.js';
import { FileRegistry } from '../../../../src/cluster/file.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import { parseSpec } from '../../../../src/schemas/vm-spec.js';
import { type Sleeper, SleeperBackend } from '../../../support/sleeper.js';
import { MemoryStore } from '../../durable/memory-store.js';

const WAIT_MS = 60_000;
const spec = parseSpec({ name: 'web', memory: { size: '16M' }, preload: false });
const gentle = { isForced: false, gracefulMs: WAIT_MS };
const log = { info: () => undefined, warn: () => undefined, error: () => undefined };

let directory: string;
let backend: SleeperBackend;
let vms: VmManager;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-stop-'));
  backend = new SleeperBackend();
  const registry = await FileRegistry.on(new MemoryStore());
  const place = { host: 'A', stateDir: directory, ramDir: join(directory, 'ram') };
  const fixed = { accel: 'tcg', preloadPath: null, native: null } as const;
  vms = new VmManager({ ...place, ...fixed, registry, log, backend: backend as never });
  await vms.start();
  await vms.run(spec);
});
afterEach(async () => {
  for (const vm of vms.all()) await vms.destroy(vm.spec.name);
  await vms.close();
  await rm(directory, { recursive: true });
});

const sleeper = (): Sleeper => backend.sleepers.get('web') as Sleeper;
async function pressed(): Promise<Sleeper> {
  const one = sleeper();
  await expect.poll(() => one.buttonCount).toBe(1);
  return one;
}

test('a guest that obeys its power button has shut down; a deaf one is ended', async () => {
  expect(await stopForUser(vms, 'web', gentle)).toMatchObject({ how: 'shutDown', exitCode: 0 });
  expect(vms.list()).toEqual([]);
  await vms.run(spec);
  sleeper().isObedient = false;
  expect(await stopForUser(vms, 'web', { isForced: false, gracefulMs: 50 })).toMatchObject({ how: 'noReaction' });
  await vms.run(spec);
  expect(await stopForUser(vms, 'web', { isForced: false, gracefulMs: 0 })).toMatchObject({ how: 'ended' });
  expect(vms.list()).toEqual([]);
});

test('a QEMU that does not take the power button is ended', async () => {
  sleeper().powerdown = () => Promise.reject(new MigrationError('TIMEOUT', 'QEMU did not answer'));
  expect(await stopForUser(vms, 'web', gentle)).toMatchObject({ how: 'noReaction', reason: 'stopped' });
  expect(vms.list()).toEqual([]);
});

test('a guest that is killed while it is waited for has not shut down', async () => {
  sleeper().isObedient = false;
  const waiting = stopForUser(vms, 'web', gentle);
  await pressed();
  process.kill(vms.get('web').pid, 'SIGKILL');
  expect(await waiting).toMatchObject({ how: 'endedMeanwhile', reason: 'killed', exitCode: null });
  expect(vms.list()).toEqual([]);
});

test('a stop by force ends the wait of another stop, and each says what it has done', async () => {
  sleeper().isObedient = false;
  const waiting = stopForUser(vms, 'web', gentle);
  await pressed();
  const forced = await stopForUser(vms, 'web', { isForced: true, gracefulMs: 0 });
  expect(forced).toMatchObject({ how: 'killed' });
  expect(await waiting).toMatchObject({ how: 'endedMeanwhile', reason: 'stopped' });
});

test('of several stops at once none fails', async () => {
  const stops = await Promise.all([1, 2, 3, 4].map(() => stopForUser(vms, 'web', gentle)));
  for (const stop of stops) expect(stop).toMatchObject({ how: 'shutDown', exitCode: 0 });
  expect(vms.list()).toEqual([]);
});

test('a VM that gets the name of a stopped one at once is nobody’s to stop', async () => {
  sleeper().isObedient = false;
  const first = stopForUser(vms, 'web', gentle);
  const old = await pressed();
  const second = stopForUser(vms, 'web', { isForced: false, gracefulMs: 0 });
  // It waits for the lock of the name in the middle of the stops.
  const next = expect
    .poll(
      async () =>
        vms.run(spec).then(
          () => true,
          () => false,
        ),
      { timeout: 10_000, interval: 1 },
    )
    .toBe(true);
  await Promise.all([first, second, next]);
  expect(sleeper()).not.toBe(old);
  expect(vms.list()).toMatchObject([{ name: 'web', state: 'running' }]);
});
