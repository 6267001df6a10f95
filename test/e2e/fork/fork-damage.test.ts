/**
 * A page of an image that is not what the host of the image has: found by its digest after clones have seen it, which
 * stand still for good then, or when the page comes. Real daemons and guests on two hosts.
 */
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import type { ForkReport } from '../../../src/domain/fork.js';
import { type ForkJobView, isFinal } from '../../../src/domain/job.js';
import type { ImagesOnHosts } from '../../../src/schemas/all-hosts.js';
import { Cluster, eventually } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';
import { Parking } from '../../hosts/parking.js';

const DIGESTS = 'agent:fork:digests';
const SOON_MS = 30_000;
const PAGE_BYTES = 4096;

let cluster: Cluster;
let parking: Parking;
let parent: Guest;

beforeAll(async () => {
  cluster = await Cluster.create();
  parking = new Parking(cluster.directory, [DIGESTS]);
  await cluster.stopDaemon('A');
  await cluster.startDaemon('A', parking.environment);
  parent = await Guest.start(cluster, 'A', { name: 'web', memoryMiB: 128, touchMiB: 16, restPercent: 50 });
});
afterAll(async () => {
  await parking?.releaseAll();
  await cluster?.destroy();
});

/** Changes one bit of a page with data in the file of the image on that host. */
async function flipBit(host: string, image: string): Promise<void> {
  const file = await open(join(cluster.ramDirectory(host), '.images', image, 'ram0.ram'), 'r+');
  try {
    const page = Buffer.alloc(PAGE_BYTES);
    for (let at = 64 << 20; ; at += PAGE_BYTES) {
      const { bytesRead } = await file.read(page, 0, PAGE_BYTES, at);
      if (bytesRead < PAGE_BYTES) throw new Error('no page has data');
      if (page.every((byte) => byte === 0)) continue;
      await file.write(Buffer.from([(page[100] ?? 0) ^ 1]), 0, 1, at + 100);
      return;
    }
  } finally {
    await file.close();
  }
}

const imageOn = async (host: string) => {
  const { images } = await cluster.json<ImagesOnHosts>('A', 'vmctl', 'images', '--all-hosts');
  return images.find((image) => image.host === host);
};

it('clones that run on a page which differs stand still for good, and the others run on', async () => {
  await parking.arm(DIGESTS);
  const { id } = await cluster.json<ForkJobView>(
    ...(['A', 'vfork', 'web', '--clones', '4', '--name', 'c', '--hosts', 'A:2,B:2', '--tcp', '--detach'] as const),
  );
  const { id: image } = await eventually('B has all pages', SOON_MS, async () => {
    const there = await imageOn('B');
    return there !== undefined && there.pagesDone === there.pagesTotal ? there : undefined;
  });
  await parking.parked(DIGESTS);
  expect(await imageOn('B')).toMatchObject({ state: 'filling', isChecked: false });
  await flipBit('B', image);
  await parking.release(DIGESTS);

  const { state, report } = await eventually('the fork has ended', SOON_MS, async () => {
    const job = await cluster.api('A').get<ForkJobView>(`/v1/jobs/${id}`);
    // On a slow machine a call may time out, and the fork recovers from that.
    return isFinal(job.state) ? job : undefined;
  });
  expect({ state, ran: report?.clones.map(({ name }) => name) }).toEqual({ state: 'done', ran: ['c-0', 'c-1'] });
  expect(report?.failures).toMatchObject([2, 3].map((index) => ({ index, error: { code: 'DAMAGED' } })));

  const damage = new RegExp(`^page \\d+ of region ram0 of image ${image} is not what the host of the image has$`);
  expect(await imageOn('B')).toMatchObject({ state: 'failed', problem: expect.stringMatching(damage) });
  const stand = { state: 'paused', damage: expect.stringMatching(damage) };
  for (const restarts of [false, true]) {
    if (restarts) {
      await cluster.stopDaemon('B');
      await cluster.startDaemon('B');
    }
    for (const name of ['c-2', 'c-3']) {
      expect(await cluster.api('B').get(`/v1/vms/${name}`)).toMatchObject(stand);
      expect(await cluster.vmctl('B', 'resume', name)).toMatchObject({
        code: expect.not.toBeOneOf([0]),
        stderr: expect.stringContaining('is damaged'),
      });
    }
    const { stdout } = await cluster.must(cluster.vmctl('B', 'ps'));
    expect(stdout).toMatch(/c-2 +damaged/);
  }
  for (const clone of ['c-0', 'c-1']) await new Guest(cluster, clone).expectClean('A');
  await parent.expectClean('A');
  await cluster.must(cluster.vmctl('A', 'stop', '--image', image));
  await cluster.must(cluster.vmctl('B', 'image', 'rm', image));
});

it('a host that serves a page which differs from its digest is refused, and so is the copy', async () => {
  const image = (await imageOn('A'))?.id ?? '';
  // Its digests were computed before.
  await flipBit('A', image);
  const copied = await cluster.vmctl('A', 'image', 'copy', image, 'B');
  expect(copied.code).not.toBe(0);
  expect(copied.stderr).toMatch(/DAMAGED|digest|is not what the host of the image has/);
  expect(await imageOn('B')).toMatchObject({ state: 'failed', isChecked: false });
  // The lost fork ends there when it is next told to.
  await eventually('the image can be removed', SOON_MS, async () => {
    const { code } = await cluster.vmctl('B', 'image', 'rm', image);
    return code === 0 ? true : undefined;
  });
});

it('an image whose pages all are what their digests say shows that it was checked', async () => {
  const { image } = await cluster.json<ForkReport>('A', 'vfork', 'web', '--clones', '1', '--name', 'd', '--hosts', 'B');
  expect(await imageOn('B')).toMatchObject({ id: image, state: 'complete', isChecked: true });
  expect((await imageOn('A'))?.isChecked).toBeUndefined();
});
