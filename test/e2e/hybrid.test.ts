/** Moves whose memory is fetched while the guest still runs on the source. */
import { readdir } from 'node:fs/promises';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { EXIT } from '../../src/cli/exit-codes.js';
import type { ErrorJson } from '../../src/domain/errors.js';
import type { ForkReport } from '../../src/domain/fork.js';
import type { ImageView } from '../../src/domain/image.js';
import { isEnded, type JobView } from '../../src/domain/job.js';
import type { MigrationPlan, MigrationReport } from '../../src/domain/migration.js';
import type { Refusal } from '../../src/domain/refusal.js';
import { Cluster, eventually } from '../hosts/cluster.js';
import { Guest } from '../hosts/guest.js';

let cluster: Cluster;
let guest: Guest;
let twinImage: string;
const MEMORY_MIB = [128, 37];
const MEMORY_BYTES = (128 + 37) << 20;
const PAGES = MEMORY_BYTES / 4096;

beforeAll(async () => {
  cluster = await Cluster.create();
  guest = await Guest.start(cluster, 'A', { name: 'pushed', regionsMiB: MEMORY_MIB, touchMiB: 48 });
});
afterEach(async () => {
  await cluster.network.setLink('B', true);
  if (!cluster.isDaemonRunning('B')) await cluster.startDaemon('B');
});
afterAll(() => cluster?.destroy());

const move = (from: string, to: string, ...flags: string[]): Promise<MigrationReport> =>
  cluster.json<MigrationReport>(from, 'vmigrate', guest.name, to, '--hybrid', ...flags);

/**
 * Starts a move so slow that it is still in its first pass, and waits until some of that is done. A hybrid would not
 * push that slowly what this guest writes to, but be a post-copy at once.
 */
async function pushing(): Promise<() => Promise<JobView>> {
  const { id } = await cluster.json<JobView>('A', 'vmigrate', guest.name, 'B', '--precopy', ...SLOWLY);
  const job = () => cluster.json<JobView>('A', 'vmctl', 'job', id);
  await eventually('pages come', 60_000, async () => {
    const { step, progress } = await job();
    return step === 'push' && (progress?.bytesDone ?? 0) > 1 << 20 ? true : undefined;
  });
  return job;
}
const SLOWLY = ['--tcp', '--bandwidth', '4', '--detach'];

async function expectUndone(job: () => Promise<JobView>, state: JobView['state']): Promise<void> {
  const ended = await eventually('the move ends', 60_000, async () => {
    const view = await job();
    return isEnded(view.state) ? view : undefined;
  });
  expect(ended.state).toBe(state);
  expect(await guest.view('A')).toMatchObject({ state: 'running', host: 'A', job: null });
  await guest.expectProgress('A');
}

async function expectNothingLeft(host: string): Promise<void> {
  await eventually(`nothing is left on ${host}`, 60_000, async () => {
    const files = (await readdir(cluster.ramDirectory(host))).filter((name) => !name.startsWith('.owner'));
    const list = await cluster.json<{ name: string }[]>(host, 'vmctl', 'ps');
    return list.length === 0 && files.length === 0 && (await cluster.qemuPids(host)).length === 0 ? true : undefined;
  });
}

describe('--hybrid', () => {
  it.each([
    ['A', 'B', 'tcp'],
    ['B', 'A', 'shm'],
  ])('%s → %s over %s: a busy guest, all of whose memory is proven', async (from, to, transport) => {
    const report = await move(from, to, `--${transport}`, '--verify-memory');
    expect(report).toMatchObject({ mode: 'hybrid', transport, verified: { isComplete: true, pages: PAGES } });
    expect(report.phases.map(({ name }) => name)).toContain('push');
    expect(report.rounds).toBeGreaterThanOrEqual(2);
    // What the guest has touched was fetched at least once before the stop, and little was left for after it.
    expect(report.bytes.push).toBeGreaterThan(48 << 20);
    expect(report.bytes.demand + report.bytes.prefetch).toBeLessThan(report.bytes.push);
    await guest.expectProgress(to);
    await guest.expectClean(to);
    await expectNothingLeft(from);
  });

  it('of a guest that rests leaves next to nothing for after the stop', async () => {
    const idle = await Guest.start(cluster, 'A', { name: 'resting', workload: 'idle', touchMiB: 16 });
    const report = await cluster.json<MigrationReport>('A', 'vmigrate', idle.name, 'B', '--hybrid', '--tcp');
    const { push, demand, prefetch } = report.bytes;
    expect(push).toBeGreaterThan(16 << 20);
    expect(demand + prefetch).toBeLessThan(8 << 20);
    await idle.expectProgress('B');
    await idle.expectClean('B');
    await cluster.must(cluster.vmctl('B', 'stop', '--force', idle.name));
  });
});

describe('--precopy', () => {
  it('brings every page before the guest runs on the target', async () => {
    const flags = ['--precopy', '--max-downtime', '5000', '--verify-memory', '--json'];
    const dry = await cluster.vmigrate('A', guest.name, 'B', ...flags, '--dry-run');
    expect(dry.stdout).toContain('until the rest fits in 5000 ms');
    for (const [from, to, transport] of [
      ['A', 'B', '--tcp'],
      ['B', 'A', '--shm'],
    ] as const) {
      const report = await cluster.json<MigrationReport>(from, 'vmigrate', guest.name, to, transport, ...flags);
      expect(report).toMatchObject({ mode: 'precopy', verified: { isComplete: true, pages: PAGES } });
      expect(report.bytes).toMatchObject({ demand: 0, prefetch: 0 });
      expect(report.blackoutMs).toBeLessThan(5000);
      await guest.expectProgress(to);
      await guest.expectClean(to);
      await expectNothingLeft(from);
    }
  });

  it('leaves a guest where it is that writes too fast for the downtime', async () => {
    const limits = ['--bandwidth', '24', '--max-downtime', '60'];
    const failed = await cluster.vmigrate('A', guest.name, 'B', '--precopy', '--tcp', ...limits, '--json');
    expect(failed.code).toBe(EXIT.failed);
    const { error } = JSON.parse(failed.stdout) as { error: ErrorJson };
    expect(error.cause?.cause).toMatchObject({ code: 'DOWNTIME_TOO_LONG', details: { downtimeMsMax: 60 } });
    expect(await guest.view('A')).toMatchObject({ state: 'running', host: 'A', job: null });
    await guest.expectProgress('A');
    await expectNothingLeft('B');
  });
});

describe('while memory is fetched, the guest runs on after', () => {
  it('the death of the daemon that fetches', async () => {
    const job = await pushing();
    await cluster.stopDaemon('B');
    await expectUndone(job, 'failed');
    await cluster.startDaemon('B');
    await expectNothingLeft('B');
  });

  it('a cut of the link', async () => {
    const job = await pushing();
    await cluster.network.setLink('B', false);
    await expectUndone(job, 'failed');
    await cluster.network.setLink('B', true);
    await expectNothingLeft('B');
  });

  it('the death of the daemon of the source', async () => {
    const job = await pushing();
    await cluster.stopDaemon('A');
    await cluster.startDaemon('A');
    await expectUndone(job, 'failed');
    await expectNothingLeft('B');
    // What a fork needs of the memory, the tracking of writes does not hold any more.
    const { image } = await cluster.json<ForkReport>('A', 'vfork', guest.name, '--clones', '1', '--name', 'twin');
    twinImage = image;
    await eventually('the parent is let go', 60_000, async () => {
      const images = await cluster.json<ImageView[]>('A', 'vmctl', 'images');
      return images.find(({ id }) => id === image)?.state === 'complete' ? true : undefined;
    });
  });

  it('a cancel, and moves all the same afterwards', async () => {
    const job = await pushing();
    await cluster.must(cluster.vmctl('A', 'cancel', (await job()).id));
    await expectUndone(job, 'cancelled');
    await expectNothingLeft('B');
    expect(await move('A', 'B', '--tcp', '--verify-memory')).toMatchObject({ verified: { isComplete: true } });
    await guest.expectClean('B');
    await move('B', 'A', '--tcp');
  });
});

describe('is refused, with --postcopy as the remedy', () => {
  async function refusals(vm: string): Promise<readonly Refusal[]> {
    const asked = await cluster.vmigrate('A', vm, 'B', '--hybrid', '--dry-run', '--json');
    expect(asked.code).toBe(EXIT.refused);
    const { plan, refusals: found } = JSON.parse(asked.stdout) as { plan: MigrationPlan | null; refusals: Refusal[] };
    expect(plan).toBeNull();
    return found;
  }

  it('for a clone on an image', async () => {
    expect(await refusals('twin-0')).toContainEqual(
      expect.objectContaining({ code: 'RAM_NOT_SHARED', remedy: 'use --postcopy' }),
    );
    for (let n = 0; n < 2; n++) await cluster.must(cluster.vmctl('A', 'stop', '--force', '--image', twinImage));
  });

  it('for a VM without the preload, and one with memory of its own', async () => {
    const options = { workload: 'idle', touchMiB: 8, memoryMiB: 96 };
    const bare = await Guest.start(cluster, 'A', { ...options, name: 'bare', hasPreload: false });
    expect((await refusals(bare.name)).map(({ code }) => code)).toContain('PRELOAD_MISSING');
    await cluster.must(cluster.vmctl('A', 'stop', '--force', bare.name));
    const own = await Guest.start(cluster, 'A', { ...options, name: 'own', backing: 'private' });
    expect((await refusals(own.name)).map(({ code }) => code)).toContain('RAM_NOT_SHARED');
    await cluster.must(cluster.vmctl('A', 'stop', '--force', own.name));
  });
});
