/** VMs that wait for a disk of another host: when they are resumed, and what is said of them. */
import { EventEmitter } from 'node:events';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { DiskWaits } from '../../../../../src/agent/fork/bases/disk-waits.js';
import { MigrationError } from '../../../../../src/domain/errors.js';

const SILENT = { info: () => undefined, warn: () => undefined, error: () => undefined, debug: () => undefined };
const served = { host: 'A', image: 'a'.repeat(16) };

/** A VM whose disk another host serves. */
class Vm {
  state = 'running';
  isStoppedByDisk = true;
  mergedOverlay: object | null = null;
  readonly spec;
  readonly process = { facts: { isStoppedByDisk: async () => this.isStoppedByDisk } };

  constructor(name: string, isServed = true) {
    this.spec = { name, disks: [{ id: 'd0', ...(isServed ? { served } : {}) }] };
  }
}

const events = new EventEmitter();
let vms: Vm[];
let resumed: string[];
/** Called when a VM is resumed. */
let onResume: (vm: Vm) => void;
let problem: MigrationError | null;
let waits: DiskWaits;

beforeEach(() => {
  vi.useFakeTimers();
  [vms, resumed, problem] = [[], [], null];
  onResume = (vm) => (vm.state = 'running');
  const manager = {
    all: () => vms,
    has: (name: string) => vms.some(({ spec }) => spec.name === name),
    get: (name: string) => vms.find(({ spec }) => spec.name === name),
    on: (event: string, listener: () => void) => events.on(event, listener),
    off: (event: string, listener: () => void) => events.off(event, listener),
    restoreRunState: async (name: string, work: () => Promise<boolean>) => {
      if (!(await work())) return;
      resumed.push(name);
      onResume(manager.get(name) as Vm);
    },
  };
  const probe = async () => {
    if (problem !== null) throw problem;
  };
  waits = new DiskWaits({ vms: manager, log: SILENT } as never, { probe });
  waits.start();
});
afterEach(() => {
  waits.close();
  vi.useRealTimers();
});

async function stop(vm: Vm): Promise<void> {
  vms.push(vm);
  vm.state = 'paused';
  events.emit('change', vm.spec.name);
  await vi.advanceTimersByTimeAsync(0);
}

test('a VM goes on when the host serves its disk again, and says why it stands still until then', async () => {
  problem = new MigrationError('UNREACHABLE', 'no route');
  await stop(new Vm('web'));
  await vi.advanceTimersByTimeAsync(10_000);
  expect(resumed).toEqual([]);
  expect(waits.noticeOf('web')).toMatch(/reads disk d0 from A, which does not serve it \(no route\)/);
  problem = null;
  await vi.advanceTimersByTimeAsync(2_000);
  expect([resumed, waits.noticeOf('web')]).toEqual([['web'], null]);
});

test('one that stops again while it is being resumed is resumed again', async () => {
  onResume = () => events.emit('change', 'web');
  const vm = new Vm('web');
  await stop(vm);
  expect(resumed).toEqual(['web']);
  onResume = (other) => (other.state = 'running');
  await vi.advanceTimersByTimeAsync(6_000);
  expect([resumed, vm.state]).toEqual([['web', 'web'], 'running']);
});

test('one that never goes on is tried less and less often', async () => {
  onResume = () => undefined;
  await stop(new Vm('web'));
  await vi.advanceTimersByTimeAsync(600_000);
  expect(resumed.length).toBeGreaterThan(8);
  expect(resumed.length).toBeLessThan(20);
});

test('VMs that stand still for another reason are left alone', async () => {
  const paused = new Vm('paused');
  paused.isStoppedByDisk = false;
  await stop(paused);
  await stop(new Vm('own', false));
  const merged = new Vm('merged');
  merged.mergedOverlay = {};
  await stop(merged);
  await vi.advanceTimersByTimeAsync(10_000);
  expect([resumed, waits.noticeOf('paused'), waits.noticeOf('own')]).toEqual([[], null, null]);
});
