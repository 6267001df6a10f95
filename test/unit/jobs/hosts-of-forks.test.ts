/** The hosts that a fork names: which of them the jobs refuse, and that nothing has been touched then. */
import { describe, expect, test } from 'vitest';
import { type ErrorCode, MigrationError } from '../../../src/domain/errors.js';
import type { ForkRequest } from '../../../src/domain/fork.js';
import { onHosts, scriptedHosts } from '../engine/on-hosts.js';
import { held, rest, restFork, type Scripted } from '../engine/scripted.js';
import { IMAGE, image } from '../planner/fork-facts.js';
import { host, request as moveRequest } from '../planner/planner-facts.js';

const ofImage: ForkRequest = { ...onHosts, vm: null, image: IMAGE };

/** The hosts, with the image on the root. */
function withImage(): Scripted {
  const world = scriptedHosts();
  const inventory = world.on['A.forkInventory']!;
  world.on['A.forkInventory'] = () => ({ ...(inventory() as object), image });
  return world;
}

async function expectRefused(world: Scripted, request: ForkRequest, refusal: object): Promise<void> {
  const { jobs } = await world.daemon();
  await expect(jobs.submitFork(request)).rejects.toMatchObject({ code: 'PREFLIGHT_REFUSED', details: [refusal] });
  // A probe changes nothing.
  expect(world.acts.filter((act) => !act.endsWith('.probeMulticast'))).toEqual([]);
}

describe('a fork is refused, and nothing has been touched, because of', () => {
  test('a host that nobody knows', async () => {
    const hosts = [...(onHosts.hosts ?? []).slice(0, 2), { host: 'Z', cloneCount: 1 }];
    await expectRefused(
      scriptedHosts(),
      { ...onHosts, hosts },
      {
        code: 'TARGET_UNREACHABLE',
        reason: expect.stringMatching(/^Z does not answer: .*\bZ\b/),
        remedy: expect.stringMatching(/\bZ\b/),
      },
    );
  });

  test.each(['USAGE', 'NOT_FOUND'] as const)(
    'a daemon of the previous build, which answers %s to the question of a fork over hosts',
    async (code: ErrorCode) => {
      const world = scriptedHosts();
      world.on['B.forkInventory'] = () => Promise.reject(new MigrationError(code, 'no VM, no image'));
      await expectRefused(world, onHosts, {
        code: 'TARGET_UNREACHABLE',
        reason: expect.stringMatching(/^B .*B cannot join a fork/),
        remedy: expect.stringMatching(/install the same vmigrate on B/),
      });
    },
  );

  test('another host at the address of one', async () => {
    const world = scriptedHosts();
    world.on['B.inventory'] = () => host('C');
    await expectRefused(world, onHosts, {
      code: 'TARGET_UNREACHABLE',
      reason: expect.stringMatching(/^B .*the host at the address of B is C/),
      remedy: expect.stringMatching(/peers/),
    });
  });
});

describe('a parent is in one job', () => {
  test('while it moves it is not forked onto other hosts', async () => {
    const world = scriptedHosts();
    const { release } = held(world, 'B.prepare', { nativeUri: null });
    const { jobs } = await world.daemon();
    const { id } = await jobs.submit(moveRequest);
    await expect(jobs.submitFork(onHosts)).rejects.toMatchObject({ details: [{ code: 'VM_IN_JOB' }] });
    expect(world.acts.filter((act) => /prepareClones|armParent/.test(act))).toEqual([]);
    release();
    expect(await rest(jobs, id)).toMatchObject({ state: 'done' });
  });

  test('while another host makes its clones it does not move, and the fork goes on', async () => {
    const world = scriptedHosts();
    const prepare = world.on['C.prepareClones']!;
    const { came, release } = held(world, 'C.loadClones', { failures: [] });
    world.on['C.prepareClones'] = prepare;
    const { jobs } = await world.daemon();
    const { id } = await jobs.submitFork(onHosts);
    await came;
    await expect(jobs.submit(moveRequest)).rejects.toMatchObject({ details: [{ code: 'VM_IN_JOB' }] });
    release();
    expect(await restFork(jobs, id)).toMatchObject({ state: 'done', report: { failures: [] } });
  });
});

describe('two forks of one image at once', () => {
  test('both make their clones', async () => {
    const { jobs } = await withImage().daemon();
    const views = await Promise.all([jobs.submitFork(ofImage), jobs.submitFork(ofImage)]);
    for (const { id } of views) {
      expect(await restFork(jobs, id)).toMatchObject({ state: 'done', report: { failures: [] } });
    }
  });

  test('a host to which the first one still brings it fails the second, which leaves the first alone', async () => {
    const world = withImage();
    const prepare = world.on['B.prepareClones']!;
    let first: string | null = null;
    world.on['B.prepareClones'] = (asked: never) => {
      const { fork } = asked as { fork: string };
      first ??= fork;
      if (fork !== first) throw new MigrationError('CONFLICT', `image ${IMAGE} on B is capturing`);
      return prepare(asked);
    };
    const discarded: string[] = [];
    world.on['B.discardFork'] = (fork: never) => void discarded.push(fork);
    const { jobs } = await world.daemon();
    const views = await Promise.all([jobs.submitFork(ofImage), jobs.submitFork(ofImage)]);
    const ends = await Promise.all(views.map(({ id }) => restFork(jobs, id)));
    expect(ends.map(({ state }) => state).sort()).toEqual(['done', 'failed']);
    const error = ends.find(({ state }) => state === 'failed')?.error;
    expect(error).toMatchObject({ message: expect.stringMatching(/image .* on B is capturing/) });
    expect(discarded).not.toContain(first);
  });
});
