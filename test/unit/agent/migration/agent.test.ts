import { access, readFile, writeFile } from 'node:fs/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { SessionStore, type TargetRecord } from '../../../../src/agent/migration/session-store.js';
import { MigrationWatch } from '../../../../src/backends/qemu/migration-watch.js';
import type { VmSpec } from '../../../../src/domain/vm.js';
import { failureToError } from '../../../../src/native/failure.js';
import { NATIVE_ERROR } from '../../../../src/protocol/wire.js';
import { FakeHost, FakeListener } from '../../../support/agent-fakes.js';
import { gate } from '../../engine/scripted.js';

const [FIRST, SECOND] = ['1'.repeat(32), '2'.repeat(32)];
const code = (expected: string) => expect.objectContaining({ code: expected });

let host: FakeHost;
beforeEach(async () => {
  host = await FakeHost.make();
});
afterEach(() => host.end());

const expose = (session: string) =>
  host.agent.source.expose({ session, vm: 'web', token: 'e'.repeat(64), transport: 'tcp', target: 'B' });

describe('an undo that comes late', () => {
  test('does not let a VM run that another session has stopped since', async () => {
    await host.agent.start();
    await expose(SECOND);
    await host.agent.source.stop('web', SECOND);
    await expect(host.agent.source.continueVm('web', FIRST)).rejects.toEqual(code('CONFLICT'));
    expect(host.qemu.isRunning).toBe(false);
    expect(host.qemu.commands).not.toContain('migrate_cancel');
    await host.agent.source.continueVm('web', SECOND);
    expect(host.qemu.isRunning).toBe(true);
    expect(host.vm['state']).toBe('running');
    await host.agent.source.continueVm('web', FIRST);
  });

  test('does not end the migration of another session', async () => {
    await host.agent.start();
    await expose(SECOND);
    await host.agent.source.stop('web', SECOND);
    await host.agent.source.nativeCancel('web', FIRST);
    expect(host.qemu.commands).not.toContain('migrate_cancel');
  });

  test('and is already under way is over before another session stops the VM', async () => {
    await host.agent.start();
    await expose(SECOND);
    const asked = gate();
    const answer = gate();
    host.qemu.onCommand = async (command) => {
      if (command !== 'query-status') return;
      asked.open();
      await answer.passed;
    };
    const continuing = host.agent.source.continueVm('web', FIRST);
    await asked.passed;
    const stopping = host.agent.source.stop('web', SECOND);
    answer.open();
    await continuing;
    await stopping;
    expect(host.qemu.commands.lastIndexOf('query-status')).toBeLessThan(host.qemu.commands.indexOf('migrate'));
    expect(host.qemu.isRunning).toBe(false);
    expect(host.vm['state']).toBe('departed');
  });
});

test('a VM without an owner record does not run: it may run on another host', async () => {
  await host.agent.start();
  await expose(SECOND);
  await host.agent.source.stop('web', SECOND);
  await host.registry.removeOwner('web', 1);
  await expect(host.agent.source.continueVm('web', SECOND)).rejects.toMatchObject({
    code: 'OWNER_CHANGED',
    remedy: expect.stringContaining('vmctl state repair') as string,
  });
  expect(host.qemu.isRunning).toBe(false);
});

describe('a daemon that has just been started', () => {
  test('waits with an undo until QEMU answers, and lets the VM run', async () => {
    host.qemu.isRunning = false;
    host.vm['state'] = 'departed';
    host.answerAfter(50);
    await host.agent.start();
    await host.agent.source.continueVm('web', FIRST);
    expect(host.qemu.isRunning).toBe(true);
    expect(host.vm['state']).toBe('running');
  });

  test('answers pre-flight when QEMU does', async () => {
    host.answerAfter(50);
    await host.agent.start();
    expect(await host.agent.inventory.vmInventory('web')).toMatchObject({ state: 'running', migrationBlockers: [] });
  });

  test('does not wait for a QEMU that has ended', async () => {
    host.vm['state'] = 'departed';
    host.neverAnswer();
    await host.agent.start();
    await expect(host.agent.source.continueVm('web', FIRST)).rejects.toEqual(code('QEMU_GONE'));
  });
});

test('a stop that is undone while its record is being written does not stop the VM afterwards', async () => {
  await host.agent.start();
  await expose(FIRST);
  const written = gate();
  host.onSetState = async (state) => {
    if (state === 'departed') await written.passed;
  };
  const stopping = host.agent.source.stop('web', FIRST);
  await host.agent.source.continueVm('web', FIRST);
  written.open();
  await expect(stopping).rejects.toEqual(code('CONFLICT'));
  expect(host.qemu.commands).not.toContain('migrate');
  expect(host.qemu.isRunning).toBe(true);
});

test('a release that comes late does not take the memory that another session is fetching', async () => {
  await host.agent.start();
  await expose(SECOND);
  await host.registry.swapOwner('web', 1, { vm: 'web', owner: 'B', epoch: 4, session: SECOND });
  await host.agent.source.release('web', FIRST);
  expect(host.destroyed).toEqual([]);
  await host.agent.source.release('web', SECOND);
  expect(host.destroyed).toEqual(['web']);
});

describe('a VM whose memory has not all arrived', () => {
  const record = (): TargetRecord => ({
    version: 1,
    role: 'target',
    session: FIRST,
    job: 'job-77',
    spec: host.vm['spec'] as VmSpec,
    source: 'Z',
    epoch: 1,
    mode: 'postcopy',
    accel: 'tcg',
    token: 'd'.repeat(64),
    bandwidthBytesPerS: 0,
    state: 'resumed',
    nativeUri: null,
    endpoint: null,
  });

  beforeEach(async () => {
    host.vm['session'] = FIRST;
    await host.registry.swapOwner('web', 1, { vm: 'web', owner: 'A', epoch: 2, session: FIRST });
  });

  test('is part of the job that brings it, and its holes are not exposed as zeros', async () => {
    await (await SessionStore.open(host.stateDir)).save(record());
    await host.agent.start();
    expect(await host.agent.inventory.vmInventory('web')).toMatchObject({ job: 'job-77', state: 'running' });
    await expect(expose(SECOND)).rejects.toEqual(code('VM_BUSY'));
    host.pages = 'complete';
    expect(await host.agent.inventory.vmInventory('web')).toMatchObject({ job: null });
    await expose(SECOND);
  });

  test('keeps the times of its session, and gets those that an earlier build has not noted', async () => {
    const store = await SessionStore.open(host.stateDir);
    const times = { preparedAt: '2030-01-01T00:00:00.000Z', resumedAt: '2030-01-01T00:00:01.000Z' };
    await store.save({ ...record(), ...times });
    await host.agent.start();
    expect(host.agent.target.arrivalOf('web')).toMatchObject({ incompleteSince: times.resumedAt });
    expect(host.agent.target.incoming.find('job-77')).toMatchObject({ createdAt: times.preparedAt });
    await host.agent.close();

    await store.save(record());
    await host.agent.start();
    const since = host.agent.target.arrivalOf('web')?.incompleteSince;
    expect(since).toEqual(expect.any(String));
    await expect
      .poll(async () => (await store.load()).records)
      .toMatchObject([{ session: FIRST, state: 'resumed', resumedAt: since }]);
  });

  test.each(['postcopy', 'precopy'] as const)(
    'is not complete by its resume (%s): nothing is mapped yet',
    async (mode) => {
      const store = await SessionStore.open(host.stateDir);
      await store.save({ ...record(), mode, state: 'prepared' });
      host.vm['state'] = 'incoming';
      await host.agent.start();
      await host.agent.target.resume(FIRST, 2);
      await expect.poll(async () => (await store.load()).records).toMatchObject([{ state: 'resumed' }]);
    },
  );

  test('whose QEMU has ended with the daemon that was starting it is not left over', async () => {
    const store = await SessionStore.open(host.stateDir);
    await store.save({ ...record(), state: 'preparing' });
    host.vm['state'] = 'stopped';
    await host.agent.start();
    expect(host.destroyed).toEqual(['web']);
    expect((await store.load()).records).toEqual([]);
  });

  test('is not destroyed when the record of its session is damaged, or lost after it has run', async () => {
    await (await SessionStore.open(host.stateDir)).save(record());
    const path = `${host.stateDir}/sessions/${FIRST}.target.json`;
    await writeFile(path, (await readFile(path, 'utf8')).replace('"job-77"', '"job-78"'));
    host.vm['state'] = 'incoming';
    await host.registry.removeOwner('web', 2);
    await host.agent.start();
    expect(host.destroyed).toEqual([]);
  });

  test('is not exposed either when the record of its session has been lost', async () => {
    await writeFile(host.presencePath('ram0'), '');
    await host.agent.start();
    expect(await host.agent.inventory.vmInventory('web')).toMatchObject({ job: FIRST });
    await expect(expose(SECOND)).rejects.toEqual(code('VM_BUSY'));
  });
});

test('a finish that comes late leaves the presence map of the next session alone', async () => {
  const { spec } = host.vm as unknown as { spec: VmSpec };
  const fixed = { version: 1, role: 'target', mode: 'postcopy', accel: 'tcg', bandwidthBytesPerS: 0 } as const;
  const ids = { session: FIRST, job: 'job-1', token: 'd'.repeat(64), source: 'Z', epoch: 1 };
  const record: TargetRecord = { ...fixed, ...ids, spec, state: 'complete', nativeUri: null, endpoint: null };
  await (await SessionStore.open(host.stateDir)).save(record);
  host.vm['session'] = FIRST;
  await host.agent.start();
  host.vm['session'] = SECOND;
  await writeFile(host.presencePath('ram0'), '');
  await host.agent.target.finish(FIRST);
  await access(host.presencePath('ram0'));
});

test('a watch that has ended leaves nothing on the connection', () => {
  const { events } = host.qemu;
  for (let attempt = 0; attempt < 3; attempt++) new MigrationWatch(host.qemu as never).end();
  expect([events.listenerCount('event'), events.listenerCount('closed')]).toEqual([0, 0]);
});

describe('a VM that has left over RDMA', () => {
  const exposeByRdma = () =>
    host.agent.source.expose({ session: FIRST, vm: 'web', token: 'e'.repeat(64), transport: 'rdma', target: 'B' });

  test('is refused where there is none, and nothing of it stays', async () => {
    await host.agent.start();
    await expect(exposeByRdma()).rejects.toEqual(code('UNSUPPORTED'));
    expect((await (await SessionStore.open(host.stateDir)).load()).records).toEqual([]);
    expect(host.exposures).toEqual([]);
  });

  test('is exposed anew when the device has been taken away, and not before', async () => {
    host.rdmaListener = new FakeListener('verbs', { host: '10.0.1.1', port: 7401 });
    await host.agent.start();
    expect(await exposeByRdma()).toMatchObject({ transport: 'rdma', host: '10.0.1.1', port: 7401 });
    // The VM still runs here, so the move is undone, whatever has happened to the device.
    host.rdmaListener.isLost = true;
    await exposeByRdma();
    expect(host.exposures).toEqual(['opened']);

    await host.registry.swapOwner('web', 1, { vm: 'web', owner: 'B', epoch: 2, session: FIRST });
    await host.agent.start();
    expect(host.exposures.splice(0)).toEqual(['opened', 'opened', 'scanned']);
    const lost = host.rdmaListener;
    host.rdmaListener = new FakeListener('verbs', { host: '10.0.1.1', port: 999 });
    expect(await exposeByRdma()).toMatchObject({ port: 999 });
    expect(host.exposures.splice(0)).toEqual(['closed', 'opened', 'scanned']);
    lost.isLost = false;
    expect(await exposeByRdma()).toMatchObject({ port: 999 });
    expect(host.exposures).toEqual([]);
  });
});

describe('a clone that has left, and whose pages have not all been fetched', () => {
  const leave = async (): Promise<void> => {
    const spec = host.vm['spec'] as VmSpec;
    host.vm['spec'] = { ...spec, memory: { ...spec.memory, backing: 'image' } };
    await host.agent.start();
    await expose(FIRST);
    await host.registry.swapOwner('web', 1, { vm: 'web', owner: 'B', epoch: 2, session: FIRST });
  };
  const gone = { code: NATIVE_ERROR.PROCESS_GONE, errno: 0, what: 'a clone has ended' };

  test('is exposed again by the next daemon, and lost once its process has taken pages along', async () => {
    await leave();
    await host.agent.start();
    expect(host.exposures).toEqual(['opened', 'opened', 'scanned']);
    await expose(FIRST);
    // Pages that cannot be kept are still in the process.
    host.sourceFailure = { code: NATIVE_ERROR.NO_SPACE, errno: 28, what: 'write' };
    await expose(FIRST);
    host.sourceFailure = gone;
    await expect(expose(FIRST)).rejects.toEqual(code('VM_LOST'));
  });

  test('is lost to the next daemon if its process ended before that', async () => {
    await leave();
    host.onOpenSource = () => {
      throw failureToError(gone, 'open source session');
    };
    await host.agent.start();
    await expect(expose(FIRST)).rejects.toEqual(code('VM_LOST'));
  });
});

describe('a VM whose writes are noted', () => {
  const exposeTracked = () =>
    host.agent.source.expose({
      ...{ session: FIRST, vm: 'web', token: 'e'.repeat(64), transport: 'tcp', target: 'B', isTracked: true },
    });

  test('has rounds until its stop, and the last one is in the answer to that', async () => {
    await host.agent.start();
    await exposeTracked();
    const { source } = host.agent;
    expect(await source.noteDirty('web', FIRST)).toEqual({ round: 1, dirtyPages: 7, againPages: 2 });
    expect(await source.noteDirty('web', FIRST)).toEqual({ round: 2, dirtyPages: 7, againPages: 2 });
    expect(await source.stop('web', FIRST)).toMatchObject({ dirty: { round: 3, dirtyPages: 7 } });
    expect(host.exposures).toEqual(['opened', 'tracked', 'noted', 'noted', 'noted last']);
    // A repeated stop gives the same answer. There is no round after the last one.
    expect(await source.stop('web', FIRST)).toMatchObject({ dirty: { round: 3 } });
    await expect(source.noteDirty('web', FIRST)).rejects.toEqual(code('CONFLICT'));
    await source.unexpose(FIRST);
    expect(host.exposures.slice(-2)).toEqual(['noted last', 'closed']);
  });

  test('does not leave if QEMU writes to its memory after the last round', async () => {
    await host.agent.start();
    await exposeTracked();
    const { source } = host.agent;
    host.onSendState = async () => undefined;
    await source.stop('web', FIRST);
    host.hasLateWrites = true;
    await expect(source.transferState('web', FIRST, 'B')).rejects.toEqual(code('CONFLICT'));
    host.hasLateWrites = false;
    await source.transferState('web', FIRST, 'B');
  });

  test('needs the preload', async () => {
    await host.agent.start();
    host.vm['memory'] = null;
    await expect(exposeTracked()).rejects.toEqual(code('UNSUPPORTED'));
    expect(host.exposures).toEqual([]);
  });

  test('is exposed without that for a post-copy', async () => {
    await host.agent.start();
    await expose(FIRST);
    await expect(host.agent.source.noteDirty('web', FIRST)).rejects.toEqual(code('CONFLICT'));
    expect(await host.agent.source.stop('web', FIRST)).not.toHaveProperty('dirty');
    expect(host.exposures).toEqual(['opened']);
  });
});
