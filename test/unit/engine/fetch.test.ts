import { describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import { request, vm } from '../planner/planner-facts.js';
import { complete, rest, Scripted } from './scripted.js';

describe('a page session that failed', () => {
  const memory = { code: 'OUT_OF_MEMORY', message: 'UFFDIO_CONTINUE (ENOMEM)', remedy: 'free memory' };
  const failed = { ...complete, state: 'failed', pagesPresent: 20, error: memory };

  test('is not called a lost connection, and its remedy is the one that counts', async () => {
    const world = new Scripted();
    world.on['B.progress'] = () => failed;
    const { jobs } = await world.daemon({ recoveryMsMax: 30 });
    const { id } = await jobs.submit(request);
    const shown: unknown[] = [];
    jobs.subscribe(id, ({ state, error }) => state === 'recovering' && shown.push(error));
    const { error } = await rest(jobs, id);
    const why = { code: 'OUT_OF_MEMORY', message: expect.stringContaining('OUT_OF_MEMORY') as string, cause: memory };
    expect(error).toMatchObject({ code: 'NEEDS_RECOVERY', remedy: 'free memory', cause: why });
    expect(shown[0]).toMatchObject({ ...why, remedy: 'free memory' });
  });

  test('is remembered by the next one, which waits without a reason, until a page arrives', async () => {
    const told = async (...readings: unknown[]): Promise<unknown> => {
      const world = new Scripted();
      world.on['B.progress'] = () => (readings.length > 1 ? readings.shift() : readings[0]);
      const { jobs } = await world.daemon({ recoveryMsMax: 30 });
      return (await rest(jobs, (await jobs.submit(request)).id)).error;
    };
    const filling = { ...complete, state: 'filling', pagesPresent: 20 };
    const cut = { ...filling, state: 'disconnected' };
    const because = { message: expect.stringContaining('page session failed') as string, cause: memory };
    expect(await told(failed, filling)).toMatchObject({ remedy: 'free memory', cause: because });
    expect(await told(failed, cut, filling)).toMatchObject({ remedy: 'free memory', cause: because });
    const network = expect.stringContaining('connection between the hosts') as string;
    expect(await told(failed, { ...filling, pagesPresent: 21 })).toMatchObject({ remedy: network });
    expect(await told(cut)).toMatchObject({ remedy: network, cause: { code: 'DISCONNECTED' } });
  });

  test('without a word has failed all the same', async () => {
    const world = new Scripted();
    world.on['B.progress'] = () => ({ ...failed, error: null });
    const { jobs } = await world.daemon({ recoveryMsMax: 30 });
    const { error } = await rest(jobs, (await jobs.submit(request)).id);
    expect(error).toMatchObject({ code: 'NEEDS_RECOVERY', cause: { code: 'NATIVE_FAILED' } });
    expect((error as { remedy: string }).remedy).not.toContain('connection');
  });
});

describe('a guest that ends while its pages still come', () => {
  const gone = { ...complete, state: 'gone', pagesPresent: 20, error: { code: 'QEMU_GONE', message: 'it has ended' } };
  const ended = { reason: 'guest-shutdown', exitCode: 0 };
  async function moved(progress: object, ownerSays = {}) {
    const world = new Scripted();
    world.on['B.progress'] = () => progress;
    Object.assign(world.on, ownerSays);
    const { jobs } = await world.daemon({ recoveryMsMax: 30 });
    const view = await rest(jobs, (await jobs.submit(request)).id);
    return { view, calls: world.calls };
  }

  test.each([
    ['has shut down', ended],
    ['has panicked', { reason: 'panicked', exitCode: null }],
    ['was a clone and has restarted', { reason: 'guest-reset', exitCode: 3 }],
  ])('%s: the move is done, its source is released', async (_what, end) => {
    const { view, calls } = await moved({ ...gone, ended: end });
    expect(view).toMatchObject({ state: 'done', error: null, report: { guestEnd: end } });
    for (const call of ['A.release', 'B.finish']) expect(calls).toContain(call);
  });

  test('was killed, or its host does not say how it ended: the VM is lost', async () => {
    for (const end of [{}, { ended: { reason: 'killed', exitCode: null } }]) {
      const { view, calls } = await moved({ ...gone, ...end });
      expect(view).toMatchObject({ state: 'lost', error: { code: 'VM_LOST' } });
      expect(calls).not.toContain('A.release');
    }
  });
});

test("QEMU's own post-copy that has stopped says why, in QEMU's words", async () => {
  const world = new Scripted();
  world.on['A.vmInventory'] = () => ({ ...vm, owner: 'A', isRamShared: false, isRamNamedFile: false });
  world.on['B.progress'] = () => ({ ...complete, state: 'filling' });
  world.on['A.nativeProgress'] = () => ({ status: 'postcopy-paused', errorText: 'Channel error: Connection reset' });
  world.on['A.nativeRecover'] = () => {
    throw new MigrationError('UNREACHABLE', 'host B does not answer');
  };
  const { jobs } = await world.daemon({ recoveryMsMax: 30 });
  const { id } = await jobs.submit({ ...request, mode: 'native-postcopy' });
  expect((await rest(jobs, id)).error).toMatchObject({
    code: 'NEEDS_RECOVERY',
    cause: { code: 'UNREACHABLE', message: 'host B does not answer' },
  });
});

test("QEMU's own post-copy whose stream is lost is connected again", async () => {
  const world = new Scripted();
  world.on['A.vmInventory'] = () => ({ ...vm, owner: 'A', isRamShared: false, isRamNamedFile: false });
  world.on['B.progress'] = () => ({ ...complete, state: 'filling' });
  const attempts: unknown[][] = [];
  world.on['A.nativeProgress'] = () => ({ status: attempts.length < 2 ? 'postcopy-paused' : 'completed' });
  world.on['A.nativeRecover'] = (...args: unknown[]) => {
    attempts.push(args);
    if (attempts.length === 1) throw new MigrationError('UNREACHABLE', 'host B does not answer');
  };
  const { jobs } = await world.daemon();
  const { id } = await jobs.submit({ ...request, mode: 'native-postcopy' });
  expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  const attempt = [request.vm, expect.any(String), request.target];
  expect(attempts).toEqual([attempt, attempt]);
});

test("QEMU's own post-copy that is connected again and again in vain needs recovery", async () => {
  const world = new Scripted();
  world.on['A.vmInventory'] = () => ({ ...vm, owner: 'A', isRamShared: false, isRamNamedFile: false });
  world.on['B.progress'] = () => ({ ...complete, state: 'filling' });
  world.on['A.nativeProgress'] = () => ({ status: 'postcopy-paused' });
  const { jobs } = await world.daemon({ recoveryMsMax: 30 });
  const { id } = await jobs.submit({ ...request, mode: 'native-postcopy' });
  expect((await rest(jobs, id)).error).toMatchObject({ code: 'NEEDS_RECOVERY' });
  expect(world.calls.filter((call) => call === 'A.nativeRecover').length).toBeGreaterThan(1);
});
