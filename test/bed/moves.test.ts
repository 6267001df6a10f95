import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { type BedRun, buildBed, type MoveFacts, missingForBed, runProgramInBed } from './bed.js';

const MIB = 2 ** 20;
const TRANSPORT = 'rdma';
const LIMIT_S = 900;
const BUILD_LIMIT_S = 900;

let run: BedRun;
const facts = new Map<string, MoveFacts>();

beforeAll(
  async () => {
    if (missingForBed().length > 0) return;
    await buildBed();
    // Node's compiler and the emulator want a processor each: the daemons on one, the guest on the other.
    const limits = { cpus: 2, memory: '2G', timeoutSeconds: LIMIT_S };
    run = await runProgramInBed('test/bed/inside/moves.ts', [TRANSPORT], limits);
    for (const line of run.output.split('\n').filter((text) => text.startsWith('{"move"'))) {
      const move = JSON.parse(line) as MoveFacts;
      facts.set(move.move, move);
    }
  },
  (BUILD_LIMIT_S + LIMIT_S + 60) * 1000,
);

beforeEach((context) => {
  const missing = missingForBed();
  if (missing.length > 0) context.skip(`needs ${missing.join(', ')}`);
});

describe('two hosts with daemons of their own move a nested guest', () => {
  test.each([
    ['plain', 64, 'in peace'],
    ['sourceDaemonKilled', 64, 'when the source daemon is killed while pages are on their way, and started again'],
    ['linkCut', 64, 'when the cable is pulled for 3 s while pages are on their way'],
    ['packetsLost', 4, 'when a tenth of all packets is lost while pages are on their way'],
  ])('%s, with %i MiB: %s', (name, touchMiB) => {
    const move = facts.get(name);
    expect(move, run.output).toBeDefined();
    expect(move).toMatchObject({ pages: (touchMiB * MIB) / 4096, bad: 0, badSeen: 0 });
    const { report } = move as MoveFacts;
    expect(report).toMatchObject({ mode: 'postcopy', transport: TRANSPORT, verified: { isComplete: true } });
    expect(report.bytes.demand + report.bytes.prefetch).toBeGreaterThan(touchMiB * MIB);
    expect(report.bytes.demand + report.bytes.prefetch + report.bytes.zeroSkipped).toBe(report.memoryBytes);
    expect(report.faults.count).toBeGreaterThan(0);
  });

  test('which goes on working, and leaves the bed in order', () => {
    expect(run.status, run.output).toBe(0);
    expect([...facts.values()].slice(1).map(({ report }) => report.source)).toEqual(['B', 'A', 'A']);
  });
});
