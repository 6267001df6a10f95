/** The events of a host's VMs, derived from the changes of VMs and jobs. */
import { EventEmitter } from 'node:events';
import { expect, test } from 'vitest';
import type { ManagedVm, VmManager } from '../../../src/agent/vm/vms.js';
import { VmEvents } from '../../../src/agent/vm-events.js';
import type { JobView, MigrationJobView } from '../../../src/domain/job.js';
import type { VmExit } from '../../../src/domain/vm.js';
import { jobView } from '../../support/api-fakes.js';
import { spec } from '../planner/planner-facts.js';

const exit = (reason: string, exitCode: number | null = null): VmExit => ({
  ...{ at: '2030-01-01T00:00:00Z', code: 0, signal: null },
  reason,
  exitCode,
});

type Changes = Partial<Pick<ManagedVm, 'state' | 'job' | 'session' | 'guestEnd' | 'isMerging'>>;

/** The table of a host's VMs, and its jobs, whose changes a test makes. */
class Scene {
  readonly emitter = new EventEmitter();
  readonly vms = new Map<string, ManagedVm>();
  readonly jobs: JobView[] = [];
  arrival: { job: string; source: string } | null = null;
  onJob: (view: JobView) => void = () => undefined;
  readonly events: VmEvents;

  constructor() {
    const manager: Pick<VmManager, 'has' | 'get' | 'all' | 'on'> = {
      has: (name) => this.vms.has(name),
      get: (name) => this.vms.get(name) as ManagedVm,
      all: () => [...this.vms.values()],
      on: (event: string, listener: (...args: never[]) => void) =>
        void this.emitter.on(event, listener as (...args: unknown[]) => void),
    };
    const fail = (error: unknown): never => {
      throw error;
    };
    const clock = { isoNow: () => '2030-01-01T00:00:00Z' };
    this.events = new VmEvents({ host: 'B', clock, vms: manager, life: 'f00d', onFailure: fail });
  }

  begin(): this {
    this.events.begin({
      jobs: {
        list: () => this.jobs,
        subscribe: (_, onChange) => {
          this.onJob = onChange;
          return () => undefined;
        },
      },
      arrivalOf: () => (this.arrival === null ? null : { request: this.arrival as never }),
    });
    return this;
  }

  set(name: string, change: Changes): this {
    const before = this.vms.get(name) ?? { job: null, session: null, guestEnd: null, isMerging: false };
    this.vms.set(name, { ...before, spec: { ...spec, name }, ...change } as ManagedVm);
    this.emitter.emit('change', name);
    return this;
  }

  end(name: string, how: VmExit): this {
    this.vms.set(name, { ...(this.vms.get(name) as ManagedVm), state: 'stopped' });
    this.emitter.emit('exit', name, how);
    this.emitter.emit('change', name);
    return this;
  }

  remove(name: string): this {
    this.vms.delete(name);
    this.emitter.emit('change', name);
    return this;
  }

  job(change: Partial<MigrationJobView>): this {
    this.onJob(jobView('job-1', { vm: 'web', source: 'B', target: 'C', isCommitted: false, ...change }));
    return this;
  }

  get kinds(): string[] {
    return this.events.list().map(({ kind }) => kind);
  }
}

test('a VM starts, rests, goes on, ends with a reason and an exit code, and is gone', () => {
  const scene = new Scene().begin();
  scene.set('web', { state: 'starting' }).set('web', { state: 'running' }).set('web', { state: 'running' });
  scene.set('web', { state: 'paused' }).set('web', { state: 'running' });
  // QEMU pauses a guest that has ended, so that its last words can be read: that is no pause.
  scene.set('web', { state: 'paused', guestEnd: { reason: 'panicked', exitCode: null } });
  scene.end('web', exit('panicked', 7)).remove('web');
  expect(scene.kinds).toEqual(['started', 'paused', 'resumed', 'stopped', 'gone']);
  expect(scene.events.list()[3]).toMatchObject({ vm: 'web', host: 'B', exit: { reason: 'panicked', exitCode: 7 } });
});

test('a clone that the memory budget ends is told, and a waiting process that nobody knew is not', () => {
  const scene = new Scene().begin();
  scene.set('c-0', { state: 'incoming' }).set('c-0', { state: 'running' }).end('c-0', exit('memory'));
  scene.set('c-1', { state: 'incoming' }).end('c-1', exit('killed')).remove('c-1');
  expect(scene.events.list()).toMatchObject([
    { vm: 'c-0', kind: 'started' },
    { vm: 'c-0', kind: 'stopped', exit: { reason: 'memory' } },
  ]);
});

test('a move away is leaving, left and gone, or stayed if it is undone; its pauses are no events', () => {
  const scene = new Scene().begin().set('web', { state: 'running' });
  scene.job({ state: 'queued' }).job({ state: 'running' }).set('web', { state: 'running', job: 'job-1' });
  scene.set('web', { state: 'paused' }).set('web', { state: 'departed' }).set('web', { state: 'running', job: null });
  scene.job({ state: 'failed' });
  expect(scene.kinds).toEqual(['started', 'leaving', 'stayed']);
  scene.job({ state: 'running' }).set('web', { state: 'departed' }).job({ state: 'running', isCommitted: true });
  scene.job({ state: 'recovering', isCommitted: true });
  expect(scene.kinds.slice(3)).toEqual(['leaving', 'left']);
  // The QEMU of a VM that has left is nobody's end.
  scene.emitter.emit('exit', 'web', exit('killed'));
  scene.remove('web').job({ state: 'done', isCommitted: true });
  expect(scene.kinds.slice(5)).toEqual(['gone']);
  expect(scene.events.list()[1]).toMatchObject({ job: 'job-1', peer: 'C' });
});

test('a move to this host is arriving, arrived and complete', () => {
  const scene = new Scene().begin();
  const move = { source: 'A', target: 'B', coordinator: 'A' };
  scene.set('web', { state: 'incoming', session: 's' }).job({ ...move, state: 'running' });
  scene.arrival = { job: 'job-1', source: 'A' };
  scene.set('web', { state: 'running' }).job({ ...move, state: 'running', isCommitted: true });
  scene.job({ ...move, state: 'running', isCommitted: true, step: 'releaseSource' });
  scene.job({ ...move, state: 'done', isCommitted: true, step: null });
  expect(scene.events.list()).toMatchObject(
    ['arriving', 'arrived', 'complete'].map((kind) => ({ kind, vm: 'web', job: 'job-1', peer: 'A' })),
  );
});

test('a guest that ends before its memory is here never becomes complete', () => {
  const scene = new Scene().begin();
  const move = { source: 'A', target: 'B', coordinator: 'A' };
  scene.set('web', { state: 'incoming', session: 's' }).job({ ...move, state: 'running' });
  scene.set('web', { state: 'running' }).job({ ...move, state: 'running', isCommitted: true });
  scene.end('web', exit('guest-shutdown', 0)).job({ ...move, state: 'done', isCommitted: true, step: null });
  expect(scene.kinds).toEqual(['arriving', 'arrived', 'stopped']);
});

test('a new daemon tells which VMs it has found and which have vanished, and no old news', () => {
  const scene = new Scene();
  scene.jobs.push(jobView('job-1', { vm: 'away', source: 'B', target: 'C', state: 'recovering', isCommitted: true }));
  scene.set('web', { state: 'running' }).set('away', { state: 'departed', job: 'job-1' });
  scene.set('lost', { state: 'running' }).end('lost', exit('vanished'));
  scene.begin().job({ vm: 'away', state: 'running', isCommitted: true });
  expect(scene.events.list().map(({ vm, kind }) => `${vm} ${kind}`)).toEqual([
    'lost stopped',
    'web found',
    'away found',
  ]);
});

test('a VM whose QEMU has not answered by the start of the daemon is found, not started', () => {
  const scene = new Scene();
  const slow = { spec: { ...spec, name: 'slow' }, state: 'running', job: null, session: null, guestEnd: null };
  scene.vms.set('slow', { ...slow, isMerging: false } as ManagedVm);
  scene.begin().set('slow', { state: 'paused' }).set('slow', { state: 'running' });
  expect(scene.kinds).toEqual(['found', 'paused', 'resumed']);
});

test('the pause in which a disk is switched is no event', () => {
  const scene = new Scene().begin().set('web', { state: 'running' });
  scene.set('web', { isMerging: true }).set('web', { state: 'paused' }).set('web', { state: 'running' });
  scene.set('web', { isMerging: false }).set('web', { state: 'paused' });
  expect(scene.kinds).toEqual(['started', 'paused']);
});

test('a reader goes on after the last event it has seen, and only the last 1024 are kept', () => {
  const scene = new Scene().begin().set('web', { state: 'running' });
  let calls = 0;
  const unsubscribe = scene.events.subscribe(() => calls++);
  for (let turn = 0; turn < 600; turn++) scene.set('web', { state: 'paused' }).set('web', { state: 'running' });
  unsubscribe();
  scene.set('web', { state: 'paused' });
  expect(calls).toBe(1200);
  const kept = scene.events.list();
  expect(kept).toHaveLength(1024);
  expect(kept.at(-1)?.id).toBe('f00d-1202');
  expect(scene.events.list('f00d-1200').map(({ id }) => id)).toEqual(['f00d-1201', 'f00d-1202']);
  expect(scene.events.list('f00d-1202')).toEqual([]);
  for (const strange of ['', 'f00d-1', 'beef-1201', 'f00d-99999', 'f00d-x']) {
    expect(scene.events.list(strange)).toHaveLength(1024);
  }
});
