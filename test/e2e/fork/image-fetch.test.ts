/** `vmctl image fetch`, with the commands and real daemons: a host that reads an image on demand reads the rest. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import type { ForkReport } from '../../../src/domain/fork.js';
import type { ImageView } from '../../../src/domain/image.js';
import type { ImagesOnHosts } from '../../../src/schemas/all-hosts.js';
import { Cluster } from '../../hosts/cluster.js';
import { Guest } from '../../hosts/guest.js';

let cluster: Cluster;

beforeAll(async () => {
  cluster = await Cluster.create();
});
afterAll(() => cluster?.destroy());

it('a host that reads only what its clones touch reads the rest when a user asks for it', async () => {
  await Guest.start(cluster, 'A', { name: 'web', memoryMiB: 128, touchMiB: 32, restPercent: 50 });
  const flags = ['--clones', '2', '--hosts', 'A,B', '--fetch', 'demand', '--name', 'd'];
  const { image } = await cluster.json<ForkReport>('A', 'vfork', ...flags, 'web');
  const { images } = await cluster.json<ImagesOnHosts>('A', 'vmctl', 'images', '--all-hosts');
  const onB = images.find(({ host }) => host === 'B');
  expect(onB).toMatchObject({ id: image });
  expect(onB?.pagesDone).toBeLessThan(onB?.pagesTotal ?? 0);
  const fetched = await cluster.json<ImageView>('A', 'vmctl', 'image', 'fetch', image, '--on', 'B');
  expect(fetched).toMatchObject({ host: 'B', state: 'complete', pagesDone: onB?.pagesTotal });
  await new Guest(cluster, 'd-1').expectClean('B');
});
