/** A fork of an earlier daemon whose undo fails: nobody forgets it, and it is tried again. */
import { expect, test } from 'vitest';
import { ForkAgent } from '../../../../src/agent/fork/agent.js';
import { MigrationError } from '../../../../src/domain/errors.js';

const FORK = 'f'.repeat(16);
const SILENT = { info: () => undefined, warn: () => undefined, error: () => undefined, debug: () => undefined };
const GONE = { records: [], images: [], clones: [] };
const code = (expected: string) => expect.objectContaining({ code: expected });

/**
 * The agent of a daemon that finds an uncommitted fork of `web`. The QEMU of `web` refuses with `failures`, one at a
 * time. The end of the guest is known, and that of QEMU recorded, from question number `endsAt` on.
 */
async function agentWith(
  failures: MigrationError[],
  { endsAt = Infinity, hasRun = false, isEarlier = false, request = {} } = {},
) {
  let questionCount = 0;
  const resumed: string[] = [];
  const parent = {
    ...{ spec: { name: 'web', uuid: 'u', disks: [] }, state: 'running', job: 'job-1', memory: null, image: null },
    mergedOverlay: null,
    process: {
      cancelAndRun: async () => {
        resumed.push('web');
        const failure = failures.shift();
        if (failure !== undefined) throw failure;
      },
    },
  };
  const kept = { records: [FORK], images: [FORK], clones: ['web-0'] };
  const clone = { spec: { name: 'web-0', clone: { fork: FORK } }, image: FORK, state: 'incoming', hasRun, exit: null };
  const vms = new Map<string, object>([
    ['web', parent],
    ['web-0', clone],
  ]);
  const record = {
    ...(isEarlier ? {} : { runsAfterCommit: true }),
    ...{ version: 1, image: FORK, state: 'prepared', isWarm: false, clones: [], outcome: null, failure: null },
    request: { fork: FORK, job: 'job-1', vm: 'web', image: null, parentMode: 'continue', ...request },
  };
  const context = {
    vms: {
      ...{ on: () => undefined, off: () => undefined, all: () => [...vms.values()] },
      ...{ has: (name: string) => vms.has(name), get: (name: string) => vms.get(name) },
      destroy: async () => void (kept.clones = []),
      room: { hold: async () => undefined, release: () => undefined },
      guestEnd: async () => {
        if (++questionCount >= endsAt) parent.state = 'stopped';
        return parent.state === 'stopped' ? { reason: 'guest-shutdown', exitCode: 0 } : null;
      },
    },
    images: {
      has: (id: string) => kept.images.includes(id),
      get: () => ({ overlays: [], spec: { uuid: 'u' } }),
      delete: async () => (kept.images = []),
    },
    forkStore: { load: async () => ({ records: [record], corrupt: [] }), remove: async () => (kept.records = []) },
    servers: { close: async () => undefined, closeAll: async () => undefined },
    peers: {
      isPeer: () => true,
      agent: () => ({ forks: { endImage: async () => undefined } }),
    },
    ...{ native: {}, log: SILENT, host: 'A', registry: { owner: async () => null } },
    diskServer: { whileUnserved: (_: string, work: () => Promise<void>) => work() },
  };
  const agent = new ForkAgent(context as never, {} as never, async () => null);
  await agent.start();
  return { agent, kept, resumed };
}

test('is undone by the next try, and claims its image until then', async () => {
  const { agent, kept } = await agentWith([new MigrationError('TIMEOUT', 'QEMU does not answer')]);
  expect(kept).toEqual({ records: [FORK], images: [FORK], clones: ['web-0'] });
  expect(agent.claims(FORK)).toBe(true);
  await expect(agent.prepareClones({ fork: FORK } as never)).rejects.toEqual(code('CONFLICT'));
  await agent.discardFork(FORK);
  expect(kept).toEqual(GONE);
  expect(agent.claims(FORK)).toBe(false);
});

test('that fails again does not look like a committed one, nor like one of which nothing is left', async () => {
  const failure = (word: 'CONFLICT' | 'NOT_FOUND') => new MigrationError(word, 'the disk is open in another program');
  const { agent, kept } = await agentWith([failure('CONFLICT'), failure('CONFLICT'), failure('NOT_FOUND')]);
  await expect(agent.discardFork(FORK)).rejects.toEqual(code('STEP_FAILED'));
  await expect(agent.discardFork(FORK)).rejects.toEqual(code('STEP_FAILED'));
  await agent.discardFork(FORK);
  expect(kept).toEqual(GONE);
});

test.each([1, 2])('is undone at once if the guest of its parent has ended (seen by question %i)', async (question) => {
  const { kept } = await agentWith([new MigrationError('QEMU_FAILED', 'a reset is required')], {
    endsAt: question,
  });
  expect(kept).toEqual(GONE);
});

test('does not take a clone that has run, and says so', async () => {
  const { agent, kept } = await agentWith([], { hasRun: true });
  expect(kept.clones).toEqual(['web-0']);
  await expect(agent.discardFork(FORK)).rejects.toMatchObject({
    ...{ code: 'STEP_FAILED', message: expect.stringContaining('web-0 has run') },
  });
  expect(kept).toEqual({ records: [FORK], images: [FORK], clones: ['web-0'] });
});

test('of an earlier build, whose clones ran before the commit, is undone with them', async () => {
  const { kept } = await agentWith([], { hasRun: true, isEarlier: true });
  expect(kept).toEqual(GONE);
});

test('of another host that names a VM of this one has nothing to do with that', async () => {
  const origin = {
    host: 'B',
    image: FORK,
    spec: { name: 'web', disks: [], memory: { pageBytes: 4096 } },
    accel: 'tcg',
    allocatedBytes: 0,
  };
  const { agent, resumed } = await agentWith([], { request: { origin } });
  await agent.discardFork(FORK).catch(() => undefined);
  expect(resumed).toEqual([]);
  const prepared = agent.prepareClones({ fork: 'e'.repeat(16), vm: 'web', origin } as never);
  await expect(prepared).rejects.toEqual(code('USAGE'));
});
