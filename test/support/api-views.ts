/** Views of VMs, jobs, images and events for tests of the API and the commands. */
import type { ForkReport } from '../../src/domain/fork.js';
import type { ImageView } from '../../src/domain/image.js';
import type { ForkJobView, MigrationJobView } from '../../src/domain/job.js';
import type { MigrationReport } from '../../src/domain/migration.js';
import type { VmView } from '../../src/domain/vm.js';
import type { VmEvent } from '../../src/domain/vm-event.js';

export const REPORT: MigrationReport = {
  job: 'job-1',
  vm: 'web',
  mode: 'postcopy',
  transport: 'tcp',
  transportReason: 'asked for',
  source: 'A',
  target: 'B',
  memoryBytes: 512 * 2 ** 20,
  blackoutMs: 8.25,
  blackoutByEventsMs: 7.5,
  degradedMs: 120,
  totalMs: 650,
  rounds: 0,
  bytes: { push: 0, demand: 4096 * 10, prefetch: 2 ** 28, zeroSkipped: 2 ** 28, deviceState: 300_000 },
  faults: { count: 10, p50Us: 210, p99Us: 1900, maxUs: 2500 },
  sourceCpuS: 0.21,
  targetCpuS: 0.34,
  reconnects: 0,
  phases: [{ name: 'prepareTarget', ms: 300 }],
};

export function vmView(name: string, change: Partial<VmView> = {}): VmView {
  return {
    ...{ name, uuid: '00000000-0000-4000-8000-000000000001', host: 'A', state: 'running', epoch: 1 },
    ...{
      memoryBytes: 2 ** 28,
      pid: 4711,
      machine: 'pc-q35-7.2',
      accel: 'tcg',
      job: null,
      serialLog: null,
      image: null,
      exitCode: null,
      exit: null,
      identityIssue: null,
    },
    ...change,
  };
}

export function vmEvent(number: number, change: Partial<VmEvent> = {}): VmEvent {
  return {
    ...{ id: `f00d-${number}`, at: '2030-01-01T00:00:00Z', kind: 'started', vm: 'web', host: 'A' },
    ...{ uuid: '00000000-0000-4000-8000-000000000001', job: null, peer: null, exit: null },
    ...change,
  };
}

export function jobView(id: string, change: Partial<MigrationJobView> = {}): MigrationJobView {
  return {
    ...{ id, kind: 'migrate', vm: 'web', source: 'A', target: 'B', state: 'running', step: 'drain', isCommitted: true },
    ...{
      progress: null,
      report: null,
      error: null,
      createdAt: '2030-01-01T00:00:00Z',
      updatedAt: '2030-01-01T00:00:00Z',
    },
    ...change,
  };
}

export const FORK_REPORT: ForkReport = {
  job: 'job-1',
  image: '00112233445566ff',
  parent: 'web',
  parentPauseMs: 14.5,
  isWarm: true,
  totalMs: 900,
  firstReadyMs: 40,
  lastReadyMs: 60,
  memoryBytes: 2 ** 28,
  clones: [0, 1].map((index) => ({
    index,
    cloneCount: 2,
    name: `web-${index}`,
    uuid: `00000000-0000-4000-8000-00000000001${index}`,
    vmGenerationId: `00000000-0000-4000-8000-00000000002${index}`,
    macs: { n0: `52:54:00:00:00:0${index}` },
    mac: `52:54:00:00:00:0${index}`,
    host: 'A',
    readyMs: 40 + 20 * index,
  })),
  failures: [],
  bytes: {
    copied: 2 ** 27,
    zeroSkipped: 2 ** 27,
    deviceState: 300_000,
    perHost: {},
    rootEgress: 0,
    multicast: 0,
    repair: 0,
    relayed: 0,
    perLink: {},
  },
  faults: { parent: 12, clones: 34 },
  phases: [{ name: 'forkPoint', ms: 20 }],
};

export function forkJobView(id: string, change: Partial<ForkJobView> = {}): ForkJobView {
  return {
    ...{ id, kind: 'fork', vm: 'web', source: 'A', state: 'running', step: 'fillImage', isCommitted: true },
    waitsFor: null,
    ...{
      image: FORK_REPORT.image,
      cloneCount: 2,
      clones: ['web-0', 'web-1'],
      progress: null,
      report: null,
      error: null,
    },
    ...{ createdAt: '2030-01-01T00:00:00Z', updatedAt: '2030-01-01T00:00:00Z' },
    ...change,
  };
}

export function imageView(id: string, change: Partial<ImageView> = {}): ImageView {
  return {
    ...{ id, host: 'A', state: 'complete', parent: 'web', createdAt: '2030-01-01T00:00:00Z', memoryBytes: 2 ** 28 },
    ...{ allocatedBytes: 2 ** 27, pageBytes: 4096, deviceStateBytes: 300_000, pagesTotal: 65_536, pagesDone: 65_536 },
    ...{ disks: [], clones: [] },
    ...change,
  };
}
