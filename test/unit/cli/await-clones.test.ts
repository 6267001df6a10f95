/** `vfork --wait` over several hosts: which clones it waits for, by what the hosts answer. */
import { describe, expect, test } from 'vitest';
import { CloneWatch, type Found } from '../../../src/cli/await-clones.js';
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import type { VmView } from '../../../src/domain/vm.js';
import { vmView } from '../../support/api-views.js';

const SILENT_MS_MAX = 60_000;
const clones = ['A', 'B'].map((host, index) => ({ name: `web-${index}`, uuid: `uuid-${index}`, index, host }));
const view = (index: number, host: string, change: Partial<VmView> = {}) =>
  vmView(`web-${index}`, { uuid: `uuid-${index}`, host, ...change });
const exit = { at: '', reason: 'guest-shutdown', code: 0, signal: null, exitCode: 0 };
const ended = (index: number, host: string) => view(index, host, { state: 'stopped', exit, exitCode: 0 });
const noAnswer = (host: string, code: ErrorCode = 'UNREACHABLE') => ({
  host,
  error: new MigrationError(code, `${host} is away`).toJSON(),
});
const shown = (found: Found[] | null) =>
  found?.map(({ host, vm, reason }) => (vm === null ? `${host}: ${reason}` : `${host}: ended`)) ?? null;

function watching(nowMs = 1_000) {
  const watch = new CloneWatch(clones, SILENT_MS_MAX);
  let atMs = nowMs;
  return {
    watch,
    later: (ms: number) => (atMs += ms),
    take: (vms: VmView[], ...unanswered: ReturnType<typeof noAnswer>[]) => shown(watch.take({ vms, unanswered }, atMs)),
  };
}

describe('clones on several hosts', () => {
  test('are waited for until all have ended or reported a code', () => {
    const { take } = watching();
    expect(take([view(0, 'A'), view(1, 'B')])).toBeNull();
    expect(take([ended(0, 'A'), view(1, 'B')])).toBeNull();
    expect(take([ended(0, 'A'), view(1, 'B', { exitCode: 3 })])).toEqual(['A: ended', 'B: ended']);
  });

  test('that are damaged are not waited for, because they stand still for good', () => {
    const { take } = watching();
    expect(take([ended(0, 'A'), view(1, 'B', { state: 'paused' })])).toBeNull();
    const damaged = view(1, 'B', { state: 'paused', damage: 'page 7' });
    expect(take([ended(0, 'A'), damaged])).toEqual(['A: ended', 'B: ended']);
  });

  test('are not mistaken for another VM of the same name', () => {
    const { take } = watching();
    expect(take([ended(0, 'A'), vmView('web-1', { uuid: 'other', host: 'B' })])).toEqual(['A: ended', 'B: removed']);
  });

  test('are followed to the host that they move to', () => {
    const { watch, take } = watching();
    const leaving = { job: 'job-1', target: 'C', percent: 41, isStalled: false };
    const moving = [view(1, 'B', { state: 'departed', epoch: 1, leaving }), view(1, 'C', { epoch: 2 })];
    expect(watch.areAllIn([ended(0, 'A'), ...moving.slice(0, 1)])).toBe(false);
    expect(take([ended(0, 'A'), ...moving])).toBeNull();
    // What is left of it on its old host has ended, and it runs on.
    expect(take([ended(0, 'A'), view(1, 'B', { state: 'stopped', epoch: 1 }), view(1, 'C', { epoch: 2 })])).toBeNull();
    expect(take([ended(0, 'A'), { ...ended(1, 'C'), epoch: 2 }])).toEqual(['A: ended', 'C: ended']);
  });

  test('that is on its way to a host that is silent is waited for only so long', () => {
    const { take, later } = watching();
    const leaving = { job: 'job-1', target: 'C', percent: 41, isStalled: true };
    const vms = [ended(0, 'A'), view(1, 'B', { state: 'departed', leaving })];
    expect(take(vms, noAnswer('C'))).toBeNull();
    later(SILENT_MS_MAX + 1);
    expect(take(vms, noAnswer('C'))).toEqual(['A: ended', 'B: unknown: no answer from C']);
  });

  test('are looked for on all hosts as soon as one is not listed here', () => {
    const { watch } = watching();
    expect(watch.areAllIn([view(0, 'A'), view(1, 'A')])).toBe(true);
    expect(watch.areAllIn([view(0, 'A')])).toBe(false);
  });
});

describe('a host that does not answer', () => {
  test('is waited for a while, counted from its last answer, and then its clones are not', () => {
    const { take, later } = watching();
    expect(take([ended(0, 'A')], noAnswer('B'))).toBeNull();
    later(SILENT_MS_MAX);
    expect(take([ended(0, 'A'), view(1, 'B')])).toBeNull();
    expect(take([ended(0, 'A')], noAnswer('B'))).toBeNull();
    later(SILENT_MS_MAX);
    expect(take([ended(0, 'A')], noAnswer('B', 'TIMEOUT'))).toBeNull();
    later(1);
    expect(take([ended(0, 'A')], noAnswer('B'))).toEqual(['A: ended', 'B: unknown: B does not answer']);
  });

  test('does not hold up clones of other hosts, and what it has said before counts', () => {
    const { take, later } = watching();
    expect(take([view(0, 'A'), ended(1, 'B')])).toBeNull();
    expect(take([ended(0, 'A')], noAnswer('B'))).toEqual(['A: ended', 'B: ended']);
    later(1);
    expect(take([view(0, 'A')], noAnswer('B'))).toBeNull();
  });

  test('may have a clone that its own host does not list', () => {
    const { take, later } = watching();
    expect(take([ended(0, 'A')], noAnswer('C'))).toBeNull();
    later(SILENT_MS_MAX + 1);
    expect(take([ended(0, 'A')], noAnswer('C'))).toEqual(['A: ended', 'B: unknown: no answer from C']);
  });

  test('because its build is older is not waited for', () => {
    const { take } = watching();
    expect(take([ended(0, 'A')], noAnswer('C', 'UNSUPPORTED'))).toEqual(['A: ended', 'B: removed']);
  });
});
