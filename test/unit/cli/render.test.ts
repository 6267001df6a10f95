import { describe, expect, test } from 'vitest';
import {
  bytes,
  jobTable,
  microseconds,
  milliseconds,
  plain,
  planText,
  progressLine,
  progressLines,
  reportText,
  table,
  vmTable,
} from '../../../src/cli/render.js';
import { forkPlanText, forkReportText } from '../../../src/cli/render-fork.js';
import type { MigrationPlan } from '../../../src/domain/migration.js';
import { FORK_REPORT, jobView, REPORT, vmView } from '../../support/api-fakes.js';

test.each([
  [0, '0 B'],
  [1023, '1023 B'],
  [1024, '1.0 KiB'],
  [150 * 2 ** 20, '150 MiB'],
  [2 ** 33, '8.0 GiB'],
  [2 ** 60, '1048576 TiB'],
])('%d bytes', (amount, text) => expect(bytes(amount)).toBe(text));

test('times are short and carry their unit', () => {
  expect([milliseconds(8.25), milliseconds(650), milliseconds(12_345)]).toEqual(['8.3 ms', '650 ms', '12.3 s']);
  expect([microseconds(210.4), microseconds(1900)]).toEqual(['210 µs', '1.9 ms']);
});

test('what others wrote cannot steer the terminal', () => {
  expect(plain('a\u001b[2Jb\r\nc\u009bd')).toBe('a [2Jb c d');
  const rows = [['\u001b]0;owned\u0007', 'x']];
  // oxlint-disable-next-line no-control-regex
  expect(table(['A', 'B'], rows)).not.toMatch(/[\u0000-\u0009\u000b-\u001f]/);
});

describe('a progress line', () => {
  const progress = {
    pagesTotal: 1000,
    pagesDone: 250,
    bytesDone: 0,
    bytesPerS: 2 ** 27,
    secondsLeft: 2.1,
    faultCount: 7,
  };
  test('has a line for each host of a fork over several hosts', () => {
    const hosts = [
      { host: 'A', state: 'complete', pagesTotal: 500, pagesDone: 500, bytesDone: 2 ** 20 },
      { host: 'node12', state: 'filling', pagesTotal: 500, pagesDone: 30, bytesDone: 2 ** 17 },
    ] as const;
    expect(progressLines(jobView('job-1', { progress: { ...progress, hosts } })).slice(1)).toEqual([
      '  A       complete  100 %, 1.0 MiB',
      '  node12  filling     6 %, 128 KiB',
    ]);
  });

  test('says pages, rate, time left and faults', () => {
    const line = progressLine(jobView('job-1', { progress }));
    expect(line).toBe('web: drain  250/1000 pages 25 %, 128 MiB/s, 3 s left, 7 faults');
  });
  test('says no time left for a job that has ended', () => {
    for (const state of ['cancelled', 'lost', 'failed'] as const)
      expect(progressLine(jobView('job-1', { state, progress }))).not.toContain('s left');
  });
  test('before there is anything to count says the step', () => {
    expect(progressLine(jobView('job-1', { step: 'prepareTarget' }))).toBe('web: prepareTarget');
  });
  test('has no rate and no time left for what has ended', () => {
    for (const state of ['lost', 'cancelled', 'failed', 'needsRecovery'] as const)
      expect(progressLine(jobView('job-1', { state, step: null, progress }))).toBe(
        `web: ${state}  250/1000 pages 25 %`,
      );
  });
  test('says that it is recovering', () => {
    expect(progressLine(jobView('job-1', { state: 'recovering', progress }))).toContain('recovering, drain');
  });
});

test('a VM that moves is listed with what has arrived', () => {
  const open = { job: 'job-1', percent: 41, isStalled: false };
  const arriving = { ...open, source: 'A', incompleteSince: null };
  expect(vmTable([vmView('web', { arriving })])).toContain(' running, arriving from A, 41 %  ');
  expect(vmTable([vmView('web', { arriving: { ...arriving, isStalled: true } })])).toContain('41 %, stalled');
  const leaving = { ...open, percent: null, target: 'B' };
  expect(vmTable([vmView('web', { state: 'departed', leaving })])).toContain(' departed, leaving for B  ');
});

test('a report names blackout, degraded time, faults, bytes and CPU', () => {
  expect(reportText(REPORT)).toBe(
    [
      'web: A → B, 512 MiB, postcopy over tcp',
      '  blackout   8.3 ms',
      '  degraded   120 ms',
      '  total      650 ms',
      '  faults     10, p50 210 µs, p99 1.9 ms, max 2.5 ms',
      '  moved      256 MiB (push 0 B, demand 40.0 KiB, prefetch 256 MiB, device state 293 KiB), ' +
        '256 MiB known to be zero',
      '  CPU        source 0.21 s, target 0.34 s',
      '',
    ].join('\n'),
  );
  expect(reportText({ ...REPORT, reconnects: 2 })).toContain('reconnects 2');
  // Nobody measures what QEMU does by itself, so nothing is claimed.
  expect(
    reportText({ ...REPORT, mode: 'native-precopy' })
      .split('\n')
      .slice(1),
  ).toEqual([
    '  blackout   8.3 ms',
    '  degraded   -',
    '  total      650 ms',
    '  faults     -',
    '  moved      256 MiB by QEMU',
    '  CPU        -',
    '',
  ]);
});

test('a plan marks the steps in which the VM does not run', () => {
  const plan: MigrationPlan = {
    request: { vm: 'web', target: 'B', mode: 'postcopy', transport: 'tcp', bandwidthBytesPerS: 0, downtimeMsMax: 300 },
    transportReason: 'B has no RDMA device',
    source: 'A',
    memoryBytes: 2 ** 28,
    steps: [
      { name: 'reserve', host: 'A', text: 'take the VM', isInBlackout: false, timeoutMs: 1000 },
      { name: 'stopSource', host: 'A', text: 'stop it', isInBlackout: true, timeoutMs: 1000 },
    ],
    notes: ['nothing else'],
  };
  expect(planText(plan).split('\n')).toEqual(
    expect.arrayContaining(['   1.   A: take the VM', '   2. ■ A: stop it', '  note: nothing else']),
  );
});

test('columns line up', () => {
  const [head = '', row = ''] = jobTable([jobView('job-123456', { report: REPORT, state: 'done', step: null })]).split(
    '\n',
  );
  expect(row.indexOf('web')).toBe(head.indexOf('VM'));
  expect(row).toContain('8.3 ms');
});

test('plan and report of a fork name what carries a multicast', () => {
  const request = { cloneCount: 2, memory: 'cow', network: 'fresh', disks: 'overlay' };
  const fanout = { kind: 'multicast', provider: 'verbs', reason: 'asked for', near: [] };
  const plan = { request, host: 'A', parent: 'web', memoryBytes: 1, steps: [], notes: [], fanout };
  expect(forkPlanText(plan as never)).toContain('fan-out: multicast by RDMA (asked for)');
  const bytes = { ...FORK_REPORT.bytes, perHost: { A: 1, B: 1 } };
  const report = { ...FORK_REPORT, bytes, fanout: { kind: 'multicast', provider: 'udp', reason: '', lossPerHost: {} } };
  expect(forkReportText(report as never)).toMatch(/multicast by UDP: .* once to all/);
});
