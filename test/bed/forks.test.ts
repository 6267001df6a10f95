import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { type BedRun, buildBed, type ForkFacts, missingForBed, runProgramInBed } from './bed.js';

const MIB = 2 ** 20;
const LIMIT_S = 1500;
const BUILD_LIMIT_S = 900;
/** What a tenth does not break, less does not; 1 for runs by hand. */
const LOSS_PERCENT = Number(process.env.VMIGRATE_TEST_LOSS ?? 10);
/** Each lost packet makes the device go back to it, so more loss gets less memory. */
const LOSSY_TOUCH_MIB = LOSS_PERCENT > 2 ? 2 : 16;

let run: BedRun;
const facts = new Map<string, ForkFacts>();

beforeAll(
  async () => {
    if (missingForBed().length > 0) return;
    await buildBed();
    const limits = { hosts: 3, cpus: 2, memory: '2G', timeoutSeconds: LIMIT_S };
    run = await runProgramInBed('test/bed/inside/forks.ts', [`${LOSS_PERCENT}`, `${LOSSY_TOUCH_MIB}`], limits);
    for (const line of run.output.split('\n').filter((text) => text.startsWith('{"fork"'))) {
      const fork = JSON.parse(line) as ForkFacts;
      facts.set(fork.fork, fork);
    }
  },
  (BUILD_LIMIT_S + LIMIT_S + 60) * 1000,
);

beforeEach((context) => {
  const missing = missingForBed();
  if (missing.length > 0) context.skip(`needs ${missing.join(', ')}`);
});

describe('three hosts with RDMA make six clones of a nested guest', () => {
  test.each([
    ['plain', 16, 'while the parent runs on'],
    ['packetsLost', LOSSY_TOUCH_MIB, `when ${LOSS_PERCENT} % of all packets are lost`],
    ['multicast', 4, `which a multicast by RDMA brings while ${LOSS_PERCENT} % of all packets are lost`],
    ['tree', 8, 'of which one host reads from another that reads from the root'],
  ])('%s, with %i MiB: %s', (name, touchMiB) => {
    const fork = facts.get(name);
    expect(fork, run.output).toBeDefined();
    const { clones, report } = fork as ForkFacts;
    expect(clones.map(({ host }) => host)).toEqual(['A', 'A', 'B', 'B', 'C', 'C']);
    for (const clone of clones) expect(clone).toMatchObject({ pages: (touchMiB * MIB) / 4096, bad: 0 });
    expect(report.failures).toEqual([]);
    for (const host of ['B', 'C']) expect(report.bytes.perHost[host]).toBeGreaterThan(touchMiB * MIB);
  });

  test('the multicast has gone by the devices, once for all hosts, and was repaired', () => {
    const { report } = facts.get('multicast') as ForkFacts;
    expect(report.fanout).toMatchObject({ kind: 'multicast', provider: 'verbs', reason: 'asked for' });
    expect(report.bytes.multicast).toBeGreaterThan(4 * MIB);
    expect(report.bytes.repair).toBeGreaterThan(0);
    for (const host of ['B', 'C']) expect(report.fanout?.lossPerHost[host]).toBeGreaterThan(0);
  });

  test('the relay has passed on what it has read', () => {
    const { report } = facts.get('tree') as ForkFacts;
    expect(report.fanout?.kind).toBe('tree');
    expect(report.bytes.relayed).toBeGreaterThan(0);
    expect(report.bytes.perLink['B']).toBeGreaterThan(0);
  });

  test('which leaves the bed in order', () => {
    expect(run.status, run.output).toBe(0);
  });
});
