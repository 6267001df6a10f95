/** Moves that prove that the target's memory was what the source's was. */
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { JobView } from '../../src/domain/job.js';
import type { MigrationPlan, MigrationReport } from '../../src/domain/migration.js';
import type { Refusal } from '../../src/domain/refusal.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

let cluster: Cluster;
let guest: Guest;
const MEMORY_MIB = [128, 37];
const CHUNKS = 64 + 19;
const PAGES = (128 + 37) * 256;

beforeAll(async () => {
  cluster = await Cluster.create();
  guest = await Guest.start(cluster, 'A', { name: 'proven', regionsMiB: MEMORY_MIB, touchMiB: 48 });
});
afterAll(() => cluster?.destroy());

const move = (from: string, to: string, ...flags: string[]): Promise<MigrationReport> =>
  cluster.json<MigrationReport>(from, 'vmigrate', guest.name, to, '--verify-memory', ...flags);

async function expectNoTags(host: string): Promise<void> {
  const left = await readdir(join(cluster.ramDirectory(host), guest.name));
  expect(left.filter((name) => !name.endsWith('.ram'))).toEqual([]);
}

describe('--verify-memory', () => {
  it.each([
    ['A', 'B', 'tcp'],
    ['B', 'A', 'shm'],
  ])('%s → %s over %s: a busy guest, all of whose memory is proven', async (from, to, transport) => {
    const report = await move(from, to, `--${transport}`);
    expect(report).toMatchObject({ transport, verified: { isComplete: true, chunks: CHUNKS, pages: PAGES } });
    expect(report.phases.map(({ name }) => name)).toContain('verifyMemory');
    await guest.expectProgress(to);
    await guest.expectClean(to);
    await expectNoTags(to);
  });

  it('is proven although both daemons were killed while pages came', async () => {
    const args = ['--tcp', '--bandwidth', '4', '--verify-memory', '--detach'];
    const { id } = await cluster.json<JobView>('A', 'vmigrate', guest.name, 'B', ...args);
    const job = () => cluster.json<JobView>('A', 'vmctl', 'job', id);
    await eventually('pages come', 60_000, async () => {
      const { step, progress } = await job();
      return step === 'drain' && (progress?.pagesDone ?? 0) > 500 ? true : undefined;
    });
    for (const host of ['B', 'A']) {
      await cluster.stopDaemon(host);
      await cluster.startDaemon(host);
    }
    const ended = await eventually('the move ends', 240_000, async () => {
      const view = await job();
      return view.state === 'done' ? view : undefined;
    });
    expect(ended.report).toMatchObject({ verified: { isComplete: true, chunks: CHUNKS, pages: PAGES } });
    await guest.expectClean('B');
  });

  it('is refused where QEMU moves its pages by itself', async () => {
    const asked = await cluster.vmigrate('B', guest.name, 'A', '--verify-memory', '--native', '--dry-run', '--json');
    expect(asked.code).toBe(3);
    const { plan, refusals } = JSON.parse(asked.stdout) as { plan: MigrationPlan | null; refusals: Refusal[] };
    expect(plan).toBeNull();
    expect(refusals.map(({ code }) => code)).toContain('MEMORY_NOT_VERIFIABLE');
  });
});
