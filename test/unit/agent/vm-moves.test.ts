import { describe, expect, test } from 'vitest';
import { Arrival, type ArrivalReading } from '../../../src/agent/migration/arrival.js';
import { VmMoves } from '../../../src/agent/vm-moves.js';
import { MigrationError } from '../../../src/domain/errors.js';
import type { JobView } from '../../../src/domain/job.js';
import type { OwnerRecord } from '../../../src/engine/ports/registry.js';
import { jobView, vmView } from '../../support/api-fakes.js';
import { spec } from '../planner/planner-facts.js';

const clock = { nowMs: () => 1, isoNow: () => '2030-01-01T00:00:00.000Z', sleep: async () => undefined };
const filling: ArrivalReading = {
  ...{ state: 'filling', hasRun: true, pagesTotal: 1_000, pagesPresent: 410, bytesDone: 0, faultCount: 0, error: null },
};

function moves(known: { reading?: ArrivalReading; job?: JobView; owner?: OwnerRecord } = {}) {
  const request = {
    ...{ session: 's', job: 'job-7', spec, source: 'A', epoch: 3, mode: 'postcopy' as const, accel: 'tcg' as const },
    ...{ token: 't', bandwidthBytesPerS: 0 },
  };
  const arrival = new Arrival(request, clock);
  const givenUp: string[] = [];
  return {
    givenUp,
    moves: new VmMoves({
      host: 'B',
      registry: { owner: async () => known.owner ?? null },
      noticeOf: () => null,
      arrivalOf: () => (known.reading === undefined ? null : arrival.view(known.reading)),
      jobOf: () => known.job,
      giveUp: async (id) => void givenUp.push(id),
    }),
  };
}

const progress = { pagesTotal: 100, pagesDone: 41, bytesDone: 0, bytesPerS: 0, secondsLeft: null, faultCount: 0 };
const job = (change: Partial<Extract<JobView, { kind: 'migrate' }>> = {}) =>
  jobView('job-8', { source: 'B', target: 'C', progress, ...change });
const asked = (thing: string) => ({
  code: 'CONFLICT',
  message: expect.stringMatching(/lost/) as string,
  remedy: expect.stringMatching(new RegExp(`vmctl job ${thing} --follow.*vmctl stop --force web`)) as string,
});

describe('the view of a VM', () => {
  test('is as it was if nothing moves', () => {
    expect(moves().moves.view(vmView('web'))).toEqual(vmView('web'));
    expect(moves({ job: job({ state: 'queued' }) }).moves.view(vmView('web'))).toEqual(vmView('web'));
  });

  test('says how much has arrived, from where, and whether it stands still', () => {
    expect(moves({ reading: filling }).moves.view(vmView('web'))).toMatchObject({
      state: 'running',
      job: 'job-7',
      arriving: { source: 'A', job: 'job-7', percent: 41, isStalled: false, incompleteSince: clock.isoNow() },
    });
    const cut = { ...filling, state: 'disconnected' as const };
    expect(moves({ reading: cut }).moves.view(vmView('web')).arriving?.isStalled).toBe(true);
  });

  test('says how far it has left', () => {
    const departed = vmView('web', { state: 'departed', job: 'job-8' });
    expect(moves({ job: job() }).moves.view(departed).leaving).toEqual({
      ...{ target: 'C', job: 'job-8', percent: 41, isStalled: false },
    });
    expect(moves({ job: job({ state: 'needsRecovery' }) }).moves.view(departed).leaving?.isStalled).toBe(true);
  });
});

describe('a stop', () => {
  test('of a VM whose memory has not all arrived asks for force', async () => {
    const { moves: of, givenUp } = moves({ reading: filling });
    await expect(of.beforeStop(vmView('web'), false)).rejects.toMatchObject(asked('job-7'));
    await of.beforeStop(vmView('web'), true);
    expect(givenUp).toEqual([]);
  });

  test('of the frozen source asks for force, and then gives the job up first', async () => {
    const departed = vmView('web', { state: 'departed' });
    const { moves: of, givenUp } = moves({ job: job() });
    await expect(of.beforeStop(departed, false)).rejects.toMatchObject(asked('job-8'));
    await of.beforeStop(departed, true);
    expect(givenUp).toEqual(['job-8']);
  });

  test('of any other VM does not', async () => {
    await moves().moves.beforeStop(vmView('web'), false);
    await moves({ reading: { ...filling, hasRun: false } }).moves.beforeStop(vmView('web'), false);
    await moves().moves.beforeStop(vmView('web', { state: 'departed' }), false);
    await moves({ job: job({ isCommitted: false }) }).moves.beforeStop(vmView('web', { state: 'departed' }), false);
  });
});

describe('a VM that is not here', () => {
  const missing = () => Promise.reject(new MigrationError('NOT_FOUND', 'no VM web on B'));

  test('is said to be where it went', async () => {
    const owner = { vm: 'web', owner: 'C', epoch: 4, session: null };
    await expect(moves({ owner }).moves.located('web', missing)).rejects.toMatchObject({
      code: 'NOT_FOUND',
      message: 'web is not on B: it has moved to C',
      remedy: expect.stringContaining('C') as string,
    });
  });

  test('is unknown if it never was here, or ended here', async () => {
    const own = { vm: 'web', owner: 'B', epoch: 4, session: null };
    await expect(moves().moves.located('web', missing)).rejects.toThrow('no VM web on B');
    await expect(moves({ owner: own }).moves.located('web', missing)).rejects.toThrow('no VM web on B');
    const busy = () => Promise.reject(new MigrationError('VM_BUSY', 'in a job'));
    await expect(moves().moves.located('web', busy)).rejects.toMatchObject({ code: 'VM_BUSY' });
    expect(await moves().moves.located('web', () => 7)).toBe(7);
  });
});
