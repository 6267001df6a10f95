/** A fork over two hosts whose coordinator dies right after its own commit: the other host has not heard of it. */
import { expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { ForkRequest } from '../../../src/domain/fork.js';
import { filled, forkInventory, forkRequest, identity } from '../planner/fork-facts.js';
import { held, restFork, Scripted } from './scripted.js';

const onTwoHosts: ForkRequest = {
  ...forkRequest,
  hosts: [
    { host: 'A', cloneCount: 1 },
    { host: 'B', cloneCount: 2 },
  ],
  placement: 'spread',
  fetch: 'all',
  transport: 'tcp',
};

const { vm } = forkInventory;
const inventory = { ...forkInventory, vm: { ...vm, spec: { ...vm.spec, disks: [] } } };

/** What each host answers of the clones that it makes. */
function share(world: Scripted, host: string, ...indexes: number[]): void {
  const clones = indexes.map((index) => identity(index));
  let isCommitted = host === 'A';
  world.on[`${host}.forkInventory`] = () => inventory;
  world.on[`${host}.prepareClones`] = () => ({ image: filled.committed?.image, isWarm: false, clones, failures: [] });
  world.on[`${host}.commitFork`] = () => {
    isCommitted = true;
    return null;
  };
  world.on[`${host}.runClones`] = () => ({ ready: indexes.map((index) => ({ index, atMs: 1 })), failures: [] });
  world.on[`${host}.forkProgress`] = () => ({
    ...filled,
    committed: isCommitted ? { ...filled.committed, isWarm: false, clones, ready: [] } : null,
  });
}

test('the next daemon names the clones of the host that had not heard of the commit', async () => {
  const world = new Scripted();
  share(world, 'A', 0);
  share(world, 'B', 1, 2);
  // The root commits, and its daemon dies before it has told B.
  const told = held(world, 'B.commitFork');
  const first = await world.daemon();
  const { id } = await first.jobs.submitFork(onTwoHosts);
  await told.came;
  share(world, 'B', 1, 2);
  world.on['A.discardFork'] = () => Promise.reject(new MigrationError('CONFLICT', 'it is committed'));
  const { jobs } = await world.daemon();
  const view = await restFork(jobs, id);
  expect(view).toMatchObject({ state: 'done', clones: ['vm1-0', 'vm1-1', 'vm1-2'] });
  expect(view.report?.clones.map(({ index, host }) => [index, host])).toEqual([
    [0, 'A'],
    [1, 'B'],
    [2, 'B'],
  ]);
});
