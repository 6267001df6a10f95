import { describe, expect, test } from 'vitest';
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import { request, vm } from '../planner/planner-facts.js';
import { complete, gate, rest, restMigration, Scripted } from './scripted.js';

const failing =
  (code: ErrorCode, context = {}) =>
  () =>
    Promise.reject(new MigrationError(code, 'as told', context));
const UNDONE = ['A.continueVm', 'A.unexpose', 'B.discard', 'A.unreserve'];

describe('forward', () => {
  test('post-copy calls what it must, in order, and nothing else', async () => {
    const world = new Scripted();
    const { jobs, registry } = await world.daemon();
    const view = await rest(jobs, (await jobs.submit(request)).id);
    expect(view.error).toBeNull();
    expect(view.state).toBe('done');
    expect(world.acts).toEqual([
      'A.reserve',
      'B.prepare',
      'A.expose',
      'B.connect',
      'A.stop',
      'A.transferState',
      'B.awaitLoaded',
      'B.resume',
      'A.release',
      'B.finish',
    ]);
    expect(await registry.owner('vm1')).toMatchObject({ owner: 'B', epoch: 4 });
  });

  test('the report tells what the counters say', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const { report } = await restMigration(jobs, (await jobs.submit(request)).id);
    expect(report).toMatchObject({
      vm: 'vm1',
      source: 'A',
      target: 'B',
      blackoutByEventsMs: 10,
      degradedMs: 30,
      bytes: { push: 0, demand: 40_960, prefetch: 81_920, zeroSkipped: 70 * 4096, deviceState: 300_000 },
      faults: { count: 10, p50Us: 200, p99Us: 900, maxUs: 1000 },
      sourceCpuS: 0.25,
      targetCpuS: 0.5,
      reconnects: 1,
    });
    expect(report?.blackoutMs).toBeGreaterThan(0);
    expect(report?.phases.map(({ name }) => name)).toHaveLength(10);
  });

  test('a native pre-copy counts the time that QEMU had stopped the VM before it said so', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    const view = await restMigration(jobs, (await jobs.submit({ ...request, mode: 'native-precopy' })).id);
    expect(view.report).toMatchObject({ rounds: 3, bytes: { push: 5_000 } });
    expect(view.report?.blackoutMs).toBeGreaterThanOrEqual(20);
    expect(world.acts).toEqual([
      'A.reserve',
      'B.prepare',
      'A.nativeMigrate',
      'B.awaitLoaded',
      'B.resume',
      'A.release',
      'B.finish',
    ]);
  });

  test('a native post-copy drains until QEMU says that it is complete', async () => {
    const world = new Scripted();
    const states = ['postcopy-active', 'postcopy-active', 'postcopy-active', 'completed'];
    world.on['A.nativeProgress'] = () => ({
      status: states.shift() ?? 'completed',
      ramTransferredBytes: states.length,
    });
    world.on['B.progress'] = () => ({ ...complete, state: 'filling' });
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submit({ ...request, mode: 'native-postcopy' })).id)).toMatchObject({
      state: 'done',
    });
    expect(states).toEqual([]);
  });

  test('between stop and resume nothing is written but the owner record', async () => {
    const world = new Scripted();
    const writes: string[] = [];
    for (const name of ['journalStore', 'ownerStore'] as const) {
      const append = world[name].append.bind(world[name]);
      world[name].append = (bytes) => {
        writes.push(name);
        return append(bytes);
      };
    }
    world.on['A.stop'] = () => {
      writes.length = 0;
      return { stoppedAtUs: 0, stoppedForMs: 0 };
    };
    let inBlackout: string[] = [];
    world.on['B.resume'] = () => {
      inBlackout = [...writes];
      return { resumedAtUs: 0 };
    };
    const { jobs } = await world.daemon();
    await rest(jobs, (await jobs.submit(request)).id);
    expect(inBlackout).toEqual(['ownerStore']);
  });
});

describe('before the commit', () => {
  test.each([
    ['B.prepare', ['B.discard', 'A.unreserve']],
    ['A.expose', ['A.unexpose', 'B.discard', 'A.unreserve']],
    ['B.connect', ['A.unexpose', 'B.discard', 'A.unreserve']],
    ['A.stop', UNDONE],
    ['A.transferState', UNDONE],
    ['B.awaitLoaded', UNDONE],
  ])('a failure of %s is undone backwards', async (call, undone) => {
    const world = new Scripted();
    world.on[call] = failing('QEMU_FAILED', { remedy: 'look at it' });
    const { jobs, registry } = await world.daemon();
    const view = await rest(jobs, (await jobs.submit(request)).id);
    expect(view).toMatchObject({
      state: 'failed',
      isCommitted: false,
      error: { code: 'STEP_FAILED', remedy: 'look at it', cause: { code: 'QEMU_FAILED' } },
    });
    expect(world.acts.slice(-undone.length)).toEqual(undone);
    expect(await registry.owner('vm1')).toMatchObject({ owner: 'A', epoch: 3 });
  });

  test('the VM runs again although the target does not answer, which is cleaned up when it does', async () => {
    const world = new Scripted();
    const running = gate();
    let isReachable = false;
    world.on['A.transferState'] = failing('UNREACHABLE');
    world.on['A.continueVm'] = running.open;
    world.on['B.discard'] = () => {
      if (!isReachable) throw new MigrationError('UNREACHABLE', 'no answer');
    };
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    await running.passed;
    expect(world.calls).not.toContain('B.discard');
    expect(await rest(jobs, id)).toMatchObject({ state: 'failed' });
    expect(world.journalled()).toContainEqual({ type: 'leftover', job: id, step: 'prepareTarget' });
    isReachable = true;
    await expect.poll(() => world.journalled()).toContainEqual({ type: 'cleared', job: id, step: 'prepareTarget' });
    await jobs.close();
  });

  test('an undo of the source that fails for a moment is tried again', async () => {
    const world = new Scripted();
    let attempts = 0;
    world.on['A.transferState'] = failing('QEMU_FAILED');
    world.on['A.continueVm'] = () => {
      if (++attempts < 3) throw new MigrationError('TIMEOUT', 'QEMU is busy');
    };
    const { jobs } = await world.daemon();
    await rest(jobs, (await jobs.submit(request)).id);
    expect(attempts).toBe(3);
    expect(world.journalled().filter(({ type }) => type === 'leftover')).toEqual([]);
  });

  test('a full disk at the commit leaves the VM where it is', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    world.on['B.awaitLoaded'] = () => {
      world.ownerStore.room = 20;
    };
    const view = await rest(jobs, (await jobs.submit(request)).id);
    expect(view).toMatchObject({ state: 'failed', error: { step: 'commit', cause: { code: 'NO_SPACE' } } });
    expect(world.acts.slice(-4)).toEqual(UNDONE);
  });

  test('when nobody can know whether the commit took effect, no copy runs until somebody does', async () => {
    const world = new Scripted();
    const { jobs } = await world.daemon();
    world.on['B.awaitLoaded'] = () => {
      world.ownerStore.room = 1_000;
      world.ownerStore.canTruncate = false;
    };
    const view = await rest(jobs, (await jobs.submit(request)).id);
    expect(view).toMatchObject({
      state: 'needsRecovery',
      error: { code: 'NEEDS_RECOVERY', cause: { code: 'STEP_FAILED' } },
    });
    expect(world.calls).not.toContain('A.continueVm');
    expect(world.calls).not.toContain('B.resume');
    // The entry had been written, so a daemon that reads the journal again continues.
    world.ownerStore.room = null;
    world.ownerStore.canTruncate = true;
    const next = await world.daemon();
    expect(await rest(next.jobs, view.id)).toMatchObject({ state: 'done' });
  });
});

describe('after the commit', () => {
  test('nothing is undone: resume is tried again until it works', async () => {
    const world = new Scripted();
    let attempts = 0;
    world.on['B.resume'] = () => {
      if (++attempts < 6) throw new MigrationError(attempts % 2 ? 'UNREACHABLE' : 'NO_SPACE', 'not now');
      return { resumedAtUs: 12_000 };
    };
    const { jobs } = await world.daemon();
    const states: string[] = [];
    const { id } = await jobs.submit(request);
    jobs.subscribe(id, ({ state }) => states.at(-1) !== state && states.push(state));
    expect(await rest(jobs, id)).toMatchObject({ state: 'done', error: null });
    expect(states).toEqual(['running', 'recovering', 'running', 'done']);
    expect(world.acts.filter((call) => UNDONE.includes(call))).toEqual([]);
  });

  test('a lost data connection is made again, with the keys that the source has now', async () => {
    const world = new Scripted();
    const readings = [
      { ...complete, state: 'filling', pagesPresent: 10 },
      { ...complete, state: 'disconnected', pagesPresent: 20 },
      { ...complete, state: 'filling', pagesPresent: 30 },
      complete,
    ];
    world.on['B.progress'] = () => readings.shift();
    const keys: unknown[] = [];
    world.on['A.expose'] = () => ({
      transport: 'tcp',
      host: 'x',
      port: 1,
      keys: [{ ram: `${keys.length}`, dataMap: '' }],
    });
    world.on['B.connect'] = (_: never, endpoint: never) => void keys.push(endpoint);
    world.on['B.reconnect'] = (_: never, endpoint: never) => void keys.push(endpoint);
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    const states = new Set<string>();
    jobs.subscribe(id, ({ state }) => states.add(state));
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
    expect(keys).toMatchObject([{ keys: [{ ram: '0' }] }, { keys: [{ ram: '1' }] }]);
    expect(states).toContain('recovering');
  });

  test('without any advance it stops and waits for recover, which goes on where it was', async () => {
    const world = new Scripted();
    world.on['B.progress'] = () => ({ ...complete, state: 'disconnected', pagesPresent: 20 });
    world.on['B.reconnect'] = failing('DISCONNECTED');
    const { jobs } = await world.daemon({ recoveryMsMax: 60 });
    const { id } = await jobs.submit(request);
    expect(await rest(jobs, id)).toMatchObject({
      state: 'needsRecovery',
      isCommitted: true,
      error: { code: 'NEEDS_RECOVERY', cause: { code: 'DISCONNECTED' } },
    });
    delete world.on['B.progress'];
    await jobs.recover(id);
    expect(await rest(jobs, id)).toMatchObject({ state: 'done', error: null });
    expect(world.calls.filter((call) => call === 'B.resume')).toHaveLength(1);
  });

  test.each([
    ['while it ran', true, /had run there/],
    ['before it ran', false, /before the VM ran there/],
  ])('a target whose QEMU died %s is lost, and what is kept is said', async (_, hasRun, message) => {
    const world = new Scripted();
    world.on['B.resume'] = hasRun ? () => ({ resumedAtUs: 1 }) : failing('QEMU_GONE');
    world.on['B.progress'] = () => ({ ...complete, state: 'gone', hasRun });
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submit(request)).id);
    expect(view).toMatchObject({ state: 'lost', error: { code: 'VM_LOST' } });
    expect((view.error as { message: string }).message).toMatch(message);
    expect((view.error as { remedy: string }).remedy).toMatch(/keeps .*memory/);
    expect(world.calls).not.toContain('A.release');
    // The remedy says that the user can stop the rest on the source.
    expect(world.acts.slice(-2)).toEqual(['A.unexpose', 'A.unreserve']);
  });

  test('a source that has lost pages says so, and nobody tries any longer', async () => {
    const world = new Scripted();
    world.on['B.progress'] = () => ({ ...complete, state: 'failed', pagesPresent: 10 });
    let hasCommitted = false;
    world.on['B.resume'] = () => {
      hasCommitted = true;
      return { resumedAtUs: 1 };
    };
    world.on['A.expose'] = () => {
      if (hasCommitted) throw new MigrationError('VM_LOST', 'QEMU of vm1 has ended here with pages');
      return { transport: 'tcp', host: '10.0.0.1', port: 1, keys: [] };
    };
    const { jobs } = await world.daemon();
    const view = await rest(jobs, (await jobs.submit(request)).id);
    expect(view).toMatchObject({ state: 'lost', error: { code: 'VM_LOST' } });
    expect(world.calls).not.toContain('A.release');
  });

  test('an exit code that the guest wrote before it moved goes along, before the source forgets it', async () => {
    const world = new Scripted();
    const inherited: unknown[] = [];
    world.on['A.vmInventory'] = () => ({ ...vm, owner: 'A', exitCode: 3 });
    world.on['B.inherit'] = (_session: string, legacy: unknown) => inherited.push(legacy);
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'done' });
    expect(inherited).toEqual([{ exitCode: 3 }]);
    expect(world.acts.indexOf('B.inherit')).toBeLessThan(world.acts.indexOf('A.release'));
  });

  test('a release that is repeated does without what the source has forgotten', async () => {
    const world = new Scripted();
    let hasReleased = false;
    world.on['A.release'] = () => {
      hasReleased = true;
      throw new MigrationError('UNREACHABLE', 'the answer is lost');
    };
    world.on['A.vmInventory'] = () => {
      if (!hasReleased) return { ...vm, owner: 'A', exitCode: 3 };
      world.on['A.release'] = () => undefined;
      throw new MigrationError('NOT_FOUND', 'no VM vm1');
    };
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'done' });
    expect(world.calls.filter((call) => call === 'B.inherit')).toHaveLength(1);
  });

  test('a VM is lost also when the source cannot let go of it', async () => {
    const world = new Scripted();
    world.on['B.progress'] = () => ({ ...complete, state: 'gone' });
    world.on['A.unexpose'] = failing('NO_SPACE');
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'lost' });
    expect(world.acts.slice(-2)).toEqual(['A.unexpose', 'A.unreserve']);
    expect(world.warnings).toContain('unexposing a lost VM failed');
  });

  test('progress tells pages, rate and time left', async () => {
    const world = new Scripted();
    let pagesPresent = 0;
    world.on['B.progress'] = () => {
      pagesPresent += 10;
      const state = pagesPresent < 100 ? 'filling' : 'complete';
      return { ...complete, state, pagesPresent, counters: { faultCount: pagesPresent } };
    };
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(request);
    const seen: { pagesDone: number; secondsLeft: number | null }[] = [];
    jobs.subscribe(id, ({ progress }) => progress && seen.push(progress));
    const view = await rest(jobs, id);
    expect(view.progress).toMatchObject({ pagesTotal: 100, pagesDone: 100, secondsLeft: 0, faultCount: 100 });
    expect(view.progress?.bytesPerS).toBeGreaterThan(0);
    expect(seen.some(({ pagesDone, secondsLeft }) => pagesDone === 50 && secondsLeft !== null && secondsLeft > 0)).toBe(
      true,
    );
  });

  test('a target that is silent for a moment at the very end costs the report nothing', async () => {
    const world = new Scripted();
    let hasReleased = false;
    let attempts = 0;
    world.on['A.release'] = () => {
      hasReleased = true;
    };
    world.on['A.sourceCounters'] = () => (hasReleased ? {} : { cpuNs: 25e7 });
    world.on['B.finish'] = () => {
      if (++attempts < 3) throw new MigrationError('UNREACHABLE', 'not now');
    };
    const { jobs } = await world.daemon();
    expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({
      state: 'done',
      report: { sourceCpuS: 0.25 },
    });
  });

  test('a VM that has come back is not released by a job that did not hear of its own success', async () => {
    const world = new Scripted();
    const { jobs, registry } = await world.daemon();
    world.on['B.progress'] = async () => {
      const present = await registry.owner('vm1');
      if (present?.epoch === 4) await registry.swapOwner('vm1', 4, { vm: 'vm1', owner: 'A', epoch: 5, session: null });
      return complete;
    };
    expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'done' });
    expect(world.calls).not.toContain('A.release');
  });
});
