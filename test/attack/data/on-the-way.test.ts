/** Somebody on the data network, between two real daemons: he records, repeats and changes what he sees. */
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import type { JobView } from '../../../src/domain/job.js';
import type { MigrationReport } from '../../../src/domain/migration.js';
import { CONSTANTS, HELLO_STATUS } from '../../../src/protocol/wire.js';
import { Cluster, eventually } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import { Relay } from './relay.js';

const { HELLO_BYTES, HELLO_REPLY_BYTES } = CONSTANTS;
/** Within the first megabyte of pages. */
const FLIP_AT = 300_000;
/** In the memory of every Linux guest, and nowhere else on the way. */
const GUEST_TEXT = 'Linux version ';

let cluster: Cluster;
let guest: Guest;
let relay: Relay | null = null;

beforeAll(async () => {
  cluster = await Cluster.create();
  guest = await Guest.start(cluster, 'A', { name: 'victim', touchMiB: 32, memoryMiB: 128, restPercent: 75 });
});
afterEach(async () => {
  await relay?.stop();
  relay = null;
});
afterAll(() => cluster?.destroy());

const move = (from: string, to: string, ...flags: string[]): Promise<MigrationReport> =>
  cluster.json<MigrationReport>(from, 'vmigrate', 'victim', to, '--tcp', ...flags);

const statusOf = (replies: Buffer, number: number): number => replies.readUInt16LE(number * HELLO_REPLY_BYTES + 6);

async function expectRightMemory(host: string): Promise<void> {
  const { pages, bad } = await guest.verify(host);
  expect(pages).toBeGreaterThan(1000);
  expect(bad).toBe(0);
}

describe('somebody on the data network', () => {
  it('reads nothing with a hello that he has recorded', async () => {
    relay = await Relay.start(cluster, 'A', 'B');
    const { id } = await cluster.json<JobView>('A', 'vmigrate', 'victim', 'B', '--tcp', '--bandwidth', '4', '--detach');
    const live = await eventually('pages come', 60_000, async () =>
      (await relay?.recorded())?.find(({ replies }) => replies.length > 1_000_000),
    );
    // What he repeats has worked once.
    expect(statusOf(live.replies, 0)).toBe(HELLO_STATUS.CHALLENGE);
    expect(statusOf(live.replies, 1)).toBe(HELLO_STATUS.OK);

    const first = live.requests.subarray(0, HELLO_BYTES);
    const answers = await relay.replay(first, live.requests.subarray(HELLO_BYTES, HELLO_BYTES + 4096));
    expect(answers.length).toBe(2 * HELLO_REPLY_BYTES);
    expect(statusOf(answers, 0)).toBe(HELLO_STATUS.CHALLENGE);
    expect(answers.subarray(8, HELLO_REPLY_BYTES)).not.toEqual(live.replies.subarray(8, HELLO_REPLY_BYTES));
    expect(statusOf(answers, 1)).toBe(HELLO_STATUS.REFUSED);
    // The session was there all the time.
    const { state } = await cluster.json<JobView>('A', 'vmctl', 'job', id);
    expect(['running', 'committed']).toContain(state);
    await eventually('the move ends', 120_000, async () => {
      const job = await cluster.json<JobView>('A', 'vmctl', 'job', id);
      return job.state === 'done' ? true : undefined;
    });
    await expectRightMemory('B');
    await move('B', 'A');
  });

  it('changes no byte of memory: the connection ends, and the move completes', async () => {
    relay = await Relay.start(cluster, 'A', 'B', { at: FLIP_AT, flips: 2 });
    const report = await move('A', 'B');
    expect(await relay.flipCount()).toBe(2);
    expect(report).toMatchObject({ dataSecurity: 'integrity' });
    expect(report.reconnects).toBeGreaterThanOrEqual(1);
    await expectRightMemory('B');
    await move('B', 'A');
  });

  it('sees no memory of a move that is encrypted, and cannot change it either', async () => {
    relay = await Relay.start(cluster, 'A', 'B');
    expect(await move('A', 'B')).toMatchObject({ dataSecurity: 'integrity' });
    const seen = async () => (await relay?.recorded())?.some(({ replies }) => replies.includes(GUEST_TEXT));
    expect(await seen()).toBe(true);
    await move('B', 'A');
    await relay.stop();

    relay = await Relay.start(cluster, 'A', 'B', { at: FLIP_AT, flips: 2 });
    const report = await move('A', 'B', '--data-security', 'encrypt');
    expect(report).toMatchObject({ dataSecurity: 'encrypt' });
    expect(await relay.flipCount()).toBe(2);
    expect(report.reconnects).toBeGreaterThanOrEqual(1);
    expect(await seen()).toBe(false);
    const bytes = (await relay.recorded()).reduce((sum, { replies }) => sum + replies.length, 0);
    expect(bytes).toBeGreaterThan(report.bytes.demand + report.bytes.prefetch);
    await expectRightMemory('B');
  });
});
