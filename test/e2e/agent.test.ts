/** One host's half of a migration, with real QEMU guests and without daemons: see test/hosts/agent-pair.ts. */

import { Duplex, Transform } from 'node:stream';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import type { MigrationMode } from '../../src/domain/migration.js';
import type { Transport } from '../../src/domain/transport.js';
import {
  AgentPair,
  commit,
  drained,
  moveByPostcopy,
  prepareRequest,
  stopAndTransfer,
  upToConnect,
} from '../hosts/agent-pair.js';
import { eventually } from '../hosts/cluster.js';
import { qmpOf } from '../hosts/qmp.js';
import { codeOf } from '../hosts/vm-host.js';

const APPEND = 'console=ttyS0 quiet vmg.workload=memtouch vmg.mb=64';

let pair: AgentPair;

beforeAll(async () => {
  pair = await AgentPair.start();
});
afterEach(async () => {
  pair.onSendState = async () => undefined;
  pair.onStream = (stream) => stream;
  await pair.clear();
});
afterAll(() => pair.end());

const view = (host: AgentPair['a'], vm: string) => host.vms.view(host.vms.get(vm));
const code = (expected: string) => expect.objectContaining({ code: expected });

async function expectClean(host: AgentPair['a'], vm: string): Promise<void> {
  const { pages, bad } = await host.verify(vm);
  expect(pages).toBeGreaterThan(0);
  expect(bad).toBe(0);
  expect(await host.serial(vm)).not.toMatch(/VMG BAD/);
}

/** What is written goes on at some 8 MB/s, so that much of a small guest is still missing when it runs. */
function slow(stream: Duplex): Duplex {
  const brake = new Transform({
    transform: (chunk: Buffer, _, done) => void setTimeout(done, chunk.length / 8_000, null, chunk),
  });
  brake.pipe(stream);
  stream.once('close', () => brake.destroy());
  return Duplex.from({ readable: stream, writable: brake });
}

describe('post-copy', () => {
  test.each<[string, Transport, object]>([
    ['busy-tcp', 'tcp', {}],
    ['busy-shm', 'shm', {}],
    ['busy-wide', 'tcp', { cpus: 2, regionsMiB: [96, 96] }],
    // virtio-net reads its rings in guest memory while it loads its state.
    ['busy-nic', 'tcp', { extra: { nics: [{ type: 'none' }], append: `${APPEND} vmg.ip=10.9.9.9/24` } }],
  ])('%s over %s: no bad page, nothing left at the source', async (name, transport, options) => {
    const { a, b } = pair;
    await pair.boot({ name, touchMiB: 64, ...options });
    const move = pair.move(name, { transport });
    const { deviceStateBytes, progress } = await moveByPostcopy(move);
    await b.goesOn(name);
    await expectClean(b, name);
    expect(deviceStateBytes).toBeGreaterThan(10_000);
    expect(progress.counters['demandBytes']).toBeGreaterThan(0);
    expect(progress.counters['pagesZero']).toBeGreaterThan(0);
    expect(a.vms.has(name)).toBe(false);
    expect(a.traces(name)).toEqual([]);
    expect(view(b, name)).toMatchObject({ state: 'running', epoch: 2 });
    expect(await b.registry.owner(name)).toMatchObject({ owner: 'B', epoch: 2, session: move.session });
    await expect(b.agent.target.discard(move.session)).resolves.toBeUndefined();
    expect(b.vms.get(name).state).toBe('running');
  });

  test('there and back: the first host takes a newer epoch, and only a newer one', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'traveller', touchMiB: 16 });
    await moveByPostcopy(pair.move('traveller'));
    await moveByPostcopy(pair.move('traveller', { from: b, to: a }));
    await expectClean(a, 'traveller');
    expect(await a.registry.owner('traveller')).toMatchObject({ owner: 'A', epoch: 3 });
    const stale = { ...(await prepareRequest(pair.move('traveller'))), epoch: 1 };
    await a.vms.destroy('traveller');
    await a.registry.swapOwner('traveller', null, { vm: 'traveller', owner: 'B', epoch: 4, session: null });
    await expect(a.agent.target.prepare({ ...stale, session: 'c'.repeat(32) })).rejects.toEqual(code('OWNER_CHANGED'));
    expect(a.traces('traveller')).toEqual([]);
    await a.registry.removeOwner('traveller', 4);
  });
});

describe('before the commit', () => {
  test('discard leaves nothing, and the VM runs on where it was', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'undone', touchMiB: 16 });
    const move = pair.move('undone');
    await upToConnect(move);
    await stopAndTransfer(move);
    await a.agent.source.continueVm('undone', move.session);
    await a.goesOn('undone');
    await b.agent.target.discard(move.session);
    await a.agent.source.unexpose(move.session);
    await a.agent.source.unreserve('undone', move.job);
    expect(b.vms.has('undone')).toBe(false);
    expect(b.traces('undone')).toEqual([]);
    expect(view(a, 'undone')).toMatchObject({ state: 'running', job: null });
    await expect(b.agent.target.prepare(await prepareRequest(move))).rejects.toEqual(code('CONFLICT'));
    await expect(b.agent.target.resume(move.session, 2)).rejects.toEqual(code('CONFLICT'));
    await expectClean(a, 'undone');
    // The same VM again: nothing is left of the first attempt.
    await moveByPostcopy(pair.move('undone'));
    await expectClean(b, 'undone');
  });

  test('discard while the target is being prepared, early or at its very end, leaves nothing', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'unwanted', touchMiB: 16 });
    let discarding: Promise<void> = Promise.resolve();
    const ending = pair.move('unwanted');
    b.atPoint.set('agent:prepared', async () => {
      discarding = b.agent.target.discard(ending.session);
    });
    await expect(b.agent.target.prepare(await prepareRequest(ending))).rejects.toEqual(code('CANCELLED'));
    await discarding;
    expect(b.vms.has('unwanted')).toBe(false);
    expect(b.traces('unwanted')).toEqual([]);

    const beginning = pair.move('unwanted');
    const preparing = b.agent.target.prepare(await prepareRequest(beginning));
    preparing.catch(() => undefined);
    await eventually('its QEMU is being started', 60_000, () => (b.vms.has('unwanted') ? true : undefined));
    await b.agent.target.discard(beginning.session);
    await expect(preparing).rejects.toEqual(code('CANCELLED'));
    expect(b.traces('unwanted')).toEqual([]);
    await a.goesOn('unwanted');
  });

  test('a target that loses its QEMU in the transfer: a final error, and the source runs again', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'orphan', touchMiB: 16 });
    const move = pair.move('orphan');
    await upToConnect(move);
    pair.onSendState = async () => {
      process.kill(b.vms.get('orphan').pid, 'SIGKILL');
    };
    // The transfer may break before the end of QEMU is noticed, or after it.
    expect(['QEMU_FAILED', 'QEMU_GONE']).toContain(await codeOf(stopAndTransfer(move)));
    await a.agent.source.continueVm('orphan', move.session);
    await a.goesOn('orphan');
    await b.agent.target.discard(move.session);
    expect(b.traces('orphan')).toEqual([]);
    await a.agent.source.unexpose(move.session);
    expect(a.vms.get('orphan').state).toBe('running');
  });

  test('a state that the target’s QEMU refuses: the error has its last words', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'plugged', touchMiB: 16, restPercent: 90 });
    // Behind the daemon's back, which pre-flight would refuse.
    const port = { driver: 'virtserialport', id: 'added', bus: 'vmg-serial.0', name: 'x.y' };
    await qmpOf(a.vms.get('plugged')).executeUntyped('device_add', port);
    const move = pair.move('plugged');
    await upToConnect(move);
    const { stoppedAtUs } = await a.agent.source.stop('plugged', move.session);
    expect(stoppedAtUs).toBeGreaterThan(0);
    const [sent, loaded] = await Promise.allSettled([
      a.agent.source.transferState('plugged', move.session, 'B'),
      b.agent.target.awaitLoaded(move.session),
    ]);
    expect(sent.status).toBe('rejected');
    expect(loaded).toMatchObject({
      status: 'rejected',
      reason: { message: expect.stringMatching(/qemu-system.*load/s) },
    });
    await a.agent.source.continueVm('plugged', move.session);
    await b.agent.target.discard(move.session);
    await a.agent.source.unexpose(move.session);
    await a.goesOn('plugged');
  });

  test('resume refuses an epoch that is not newer, and a state that is not loaded', async () => {
    const { b } = pair;
    await pair.boot({ name: 'early', touchMiB: 16 });
    const move = pair.move('early');
    await upToConnect(move);
    await expect(b.agent.target.resume(move.session, 2)).rejects.toEqual(code('CONFLICT'));
    await b.agent.target.discard(move.session);
    expect(await b.registry.owner('early')).toBeNull();
  });
});

describe('after the commit', () => {
  test('a source that has given the VM away neither continues nor loses it', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'given', touchMiB: 32 });
    const move = pair.move('given');
    await upToConnect(move);
    await stopAndTransfer(move);
    const epoch = await commit(move);
    await expect(a.agent.source.continueVm('given', move.session)).rejects.toEqual(code('OWNER_CHANGED'));
    process.kill(a.vms.get('given').pid, 'SIGKILL');
    await eventually('the end of QEMU is noticed', 60_000, () => (a.vms.exitOf('given') === null ? undefined : true));
    await b.agent.target.resume(move.session, epoch);
    await expect(b.agent.target.discard(move.session)).rejects.toEqual(code('CONFLICT'));
    await drained(move);
    await expectClean(b, 'given');
    await a.agent.source.release('given', move.session);
    await a.agent.source.release('given', move.session);
    expect(a.traces('given')).toEqual([]);
  });

  test('a restarted target takes its descriptors back and fetches the rest', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'restarted', memoryMiB: 384, touchMiB: 256 });
    const move = pair.move('restarted');
    await b.agent.target.prepare({ ...(await prepareRequest(move)), bandwidthBytesPerS: 40 << 20 });
    await a.agent.source.reserve('restarted', move.job);
    const exposed = {
      session: move.session,
      vm: 'restarted',
      token: move.token,
      transport: move.transport,
      target: 'B',
    };
    await b.agent.target.connect(move.session, await a.agent.source.expose(exposed));
    await stopAndTransfer(move);
    await b.agent.target.resume(move.session, await commit(move));
    const before = await b.agent.target.progress(move.session);
    const since = b.agent.target.arrivalOf('restarted')?.incompleteSince;
    expect(since).toEqual(expect.any(String));
    await b.restart();
    expect(b.agent.target.arrivalOf('restarted')).toMatchObject({ incompleteSince: since });
    const after = await b.agent.target.progress(move.session);
    expect(after.hasRun).toBe(true);
    expect(before.pagesPresent).toBeLessThan(before.pagesTotal);
    await drained(move);
    await b.goesOn('restarted');
    await expectClean(b, 'restarted');
    await a.agent.source.release('restarted', move.session);
    await b.agent.target.finish(move.session);
    expect(b.vms.get('restarted').state).toBe('running');
  });

  test('a restarted source exposes the frozen memory again, under new keys', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'exposed', memoryMiB: 384, touchMiB: 256 });
    const move = pair.move('exposed');
    await b.agent.target.prepare({ ...(await prepareRequest(move)), bandwidthBytesPerS: 40 << 20 });
    await a.agent.source.reserve('exposed', move.job);
    const exposed = { session: move.session, vm: 'exposed', token: move.token, transport: move.transport, target: 'B' };
    await b.agent.target.connect(move.session, await a.agent.source.expose(exposed));
    await stopAndTransfer(move);
    await b.agent.target.resume(move.session, await commit(move));
    await a.restart();
    expect(a.vms.get('exposed').state).toBe('departed');
    await eventually('the target notices', 60_000, async () =>
      ['disconnected', 'failed'].includes((await b.agent.target.progress(move.session)).state) ? true : undefined,
    );
    await b.agent.target.reconnect(move.session, await a.agent.source.expose(exposed));
    const { counters } = await drained(move);
    expect(counters['reconnectCount']).toBeGreaterThan(0);
    await expectClean(b, 'exposed');
    await a.agent.source.release('exposed', move.session);
    await b.agent.target.finish(move.session);
  });

  test('a crash between ownership and the first instruction: repeating resume runs the VM', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'between', touchMiB: 16 });
    const move = pair.move('between');
    await upToConnect(move);
    await stopAndTransfer(move);
    const epoch = await commit(move);
    b.failures.add('agent:resume');
    await expect(b.agent.target.resume(move.session, epoch)).rejects.toEqual(code('CANCELLED'));
    await b.restart();
    await expect(b.agent.target.discard(move.session)).rejects.toEqual(code('CONFLICT'));
    await b.agent.target.resume(move.session, epoch);
    await b.agent.target.resume(move.session, epoch);
    await drained(move);
    await b.goesOn('between');
    await expectClean(b, 'between');
    await a.agent.source.release('between', move.session);
  });
});

// The guests write little: under TCG, QEMU 7.2's own pre-copy sometimes loses a page that was written meanwhile (stock
// QEMU alone does so too).
describe("QEMU's own migration", () => {
  test.each<MigrationMode>(['native-precopy', 'native-postcopy'])('%s of private memory', async (mode) => {
    const { a, b } = pair;
    await pair.boot({ name: 'private', touchMiB: 32, workload: 'idle', backing: 'private', hasPreload: false });
    const move = pair.move('private', { mode });
    const { session } = move;
    await b.agent.target.prepare(await prepareRequest(move));
    const options = { target: 'B', bandwidthBytesPerS: 0, downtimeMsMax: 300, isPostcopy: mode === 'native-postcopy' };
    await a.agent.source.nativeMigrate('private', session, options);
    await b.agent.target.awaitLoaded(session);
    expect(a.vms.get('private').state).toBe('departed');
    expect((await a.agent.source.nativeProgress('private'))['ramTotalBytes']).toBeGreaterThan(0);
    await b.agent.target.resume(session, await commit(move));
    await drained(move);
    await b.goesOn('private');
    await expectClean(b, 'private');
    await a.agent.source.release('private', session);
    await b.agent.target.finish(session);
    expect(a.traces('private')).toEqual([]);
  });

  test('a post-copy whose stream is lost goes on over another one, also after a restart of the source', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'cut', touchMiB: 64, workload: 'idle', backing: 'private', hasPreload: false });
    const move = pair.move('cut', { mode: 'native-postcopy' });
    const { session } = move;
    const streams: Duplex[] = [];
    pair.onStream = (stream) => {
      streams.push(stream);
      return slow(stream);
    };
    await b.agent.target.prepare(await prepareRequest(move));
    const options = { target: 'B', bandwidthBytesPerS: 0, downtimeMsMax: 300, isPostcopy: true };
    await a.agent.source.nativeMigrate('cut', session, options);
    await b.agent.target.awaitLoaded(session);
    await b.agent.target.resume(session, await commit(move));
    for (const restart of [async () => undefined, () => a.restart()]) {
      streams.at(-1)?.destroy();
      await eventually('the source notices', 60_000, async () =>
        (await a.agent.source.nativeProgress('cut'))['status'] === 'postcopy-paused' ? true : undefined,
      );
      await restart();
      await a.agent.source.nativeRecover('cut', session, 'B');
    }
    pair.onStream = (stream) => stream;
    expect(streams).toHaveLength(3);
    await drained(move);
    await b.goesOn('cut');
    await expectClean(b, 'cut');
    await a.agent.source.release('cut', session);
    await b.agent.target.finish(session);
  });

  test('the end of the target in the middle of a pre-copy: the VM never stops', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'spared', touchMiB: 64, workload: 'idle', backing: 'private', hasPreload: false });
    const move = pair.move('spared', { mode: 'native-precopy' });
    pair.onStream = slow;
    await b.agent.target.prepare(await prepareRequest(move));
    const options = { target: 'B', isPostcopy: false, bandwidthBytesPerS: 0, downtimeMsMax: 1 };
    const moving = a.agent.source.nativeMigrate('spared', move.session, options);
    moving.catch(() => undefined);
    await eventually('it is under way', 60_000, async () =>
      Number((await a.agent.source.nativeProgress('spared'))['ramTransferredBytes'] ?? 0) > 1 << 20 ? true : undefined,
    );
    process.kill(b.vms.get('spared').pid, 'SIGKILL');
    await expect(moving).rejects.toEqual(code('QEMU_FAILED'));
    expect(await qmpOf(a.vms.get('spared')).execute('query-status')).toMatchObject({ running: true });
    await b.agent.target.discard(move.session);
    await a.goesOn('spared');
  });

  test('cancelled: the VM runs on at the source, the target is empty', async () => {
    const { a, b } = pair;
    await pair.boot({ name: 'kept', touchMiB: 64, writePercent: 50, backing: 'private', hasPreload: false });
    const move = pair.move('kept', { mode: 'native-precopy' });
    await b.agent.target.prepare(await prepareRequest(move));
    const options = { target: 'B', isPostcopy: false, bandwidthBytesPerS: 1 << 20, downtimeMsMax: 1 };
    const moving = a.agent.source.nativeMigrate('kept', move.session, options);
    moving.catch(() => undefined);
    await eventually('it is under way', 60_000, async () =>
      (await a.agent.source.nativeProgress('kept'))['status'] === 'active' ? true : undefined,
    );
    await a.agent.source.nativeCancel('kept', move.session);
    await expect(moving).rejects.toEqual(code('QEMU_FAILED'));
    await a.agent.source.continueVm('kept', move.session);
    await b.agent.target.discard(move.session);
    await a.goesOn('kept');
    expect(b.traces('kept')).toEqual([]);
  });
});
