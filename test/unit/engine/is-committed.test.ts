import { describe, expect, test } from 'vitest';
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import { request } from '../planner/planner-facts.js';
import { complete, gate, INCARNATION, rest, Scripted } from './scripted.js';

const failing = (code: ErrorCode) => () => Promise.reject(new MigrationError(code, 'as told'));

/** The source's daemon ends right after the target runs the VM, and its owner records are gone when it starts again. */
describe('a daemon whose owner records are lost', () => {
  async function crashed(): Promise<Scripted> {
    const world = new Scripted();
    const resumed = gate();
    world.onInject = (point) => {
      if (point !== 'after:resumeTarget') return Promise.resolve();
      resumed.open();
      return new Promise(() => undefined);
    };
    const { jobs } = await world.daemon();
    await jobs.submit(request);
    await resumed.passed;
    world.onInject = () => Promise.resolve();
    world.calls.length = 0;
    await world.ownerStore.truncate(0);
    return world;
  }

  test('asks the target, which runs the VM, and goes on', async () => {
    const world = await crashed();
    const { jobs, registry } = await world.daemon({}, { hasOwner: false });
    await jobs.start();
    expect(await rest(jobs, jobs.list()[0]!.id)).toMatchObject({ state: 'done' });
    expect(world.calls).not.toContain('A.continueVm');
    expect(world.calls).not.toContain('B.discard');
    expect(await registry.owner('vm1')).toMatchObject({ owner: 'B', epoch: 4 });
  });

  test('keeps the id of the start of the VM, as the commit and the target do', async () => {
    const world = new Scripted();
    const prepared: unknown[] = [];
    world.on['B.prepare'] = (asked: unknown) => {
      prepared.push(asked);
      return { nativeUri: null };
    };
    const { jobs, registry } = await world.daemon();
    expect(await rest(jobs, (await jobs.submit(request)).id)).toMatchObject({ state: 'done' });
    expect(prepared).toEqual([expect.objectContaining({ epoch: 3, incarnation: INCARNATION })]);
    expect(await registry.owner('vm1')).toMatchObject({ owner: 'B', epoch: 4, incarnation: INCARNATION });
    const lost = await crashed();
    const next = await lost.daemon({}, { hasOwner: false });
    expect(await rest(next.jobs, next.jobs.list()[0]!.id)).toMatchObject({ state: 'done' });
    expect(await next.registry.owner('vm1')).toMatchObject({ owner: 'B', epoch: 4, incarnation: INCARNATION });
  });

  test('runs nothing while the target does not answer', async () => {
    const world = await crashed();
    world.on['B.progress'] = failing('UNREACHABLE');
    const { jobs } = await world.daemon({}, { hasOwner: false });
    await jobs.start();
    expect(await rest(jobs, jobs.list()[0]!.id)).toMatchObject({
      state: 'needsRecovery',
      error: { code: 'NEEDS_RECOVERY', cause: { code: 'UNREACHABLE' } },
    });
    expect(world.calls).not.toContain('A.continueVm');
    delete world.on['B.progress'];
    const { id } = jobs.list()[0]!;
    await jobs.recover(id);
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });

  test('lets the VM run here if the target has not run it, and never will', async () => {
    const world = await crashed();
    world.on['B.progress'] = () => ({ ...complete, state: 'loaded', hasRun: false });
    const { jobs, registry } = await world.daemon({}, { hasOwner: false });
    await jobs.start();
    expect(await rest(jobs, jobs.list()[0]!.id)).toMatchObject({ state: 'failed' });
    expect(world.calls.indexOf('B.discard')).toBeLessThan(world.calls.indexOf('A.continueVm'));
    expect(world.calls.indexOf('B.discard')).toBeGreaterThan(-1);
    expect(await registry.owner('vm1')).toMatchObject({ owner: 'A', epoch: 3 });
  });
});
