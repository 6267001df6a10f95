/** What a host that has joined a fork does when its operator has removed the root from its peers. */
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { ForkAgent } from '../../../../src/agent/fork/agent.js';
import { exitReasonOf, isFinal, rootRemoved } from '../../../../src/agent/fork/pages/failed-image.js';
import { giveUpImage } from '../../../../src/agent/fork/unfillable.js';
import { RemoteAgents } from '../../../../src/api/peers/client.js';
import { MigrationError } from '../../../../src/domain/errors.js';

const FORK = '8'.repeat(16);
const code = (expected: string) => expect.objectContaining({ code: expected });
const nothing = async (): Promise<void> => undefined;
const quiet = () => undefined;

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

interface Scene {
  readonly state: 'prepared' | 'committed';
  readonly isPeer: boolean;
  readonly image?: 'capturing' | 'filling' | 'complete';
  readonly loadState?: 'loaded' | 'hasRun';
  /** How often the record cannot be removed. */
  readonly failures?: number;
}

/** The agent of a daemon that finds a fork that it has joined, with one clone. */
async function agentWith({ state, isPeer, image = 'capturing', loadState = 'loaded', failures = 0 }: Scene) {
  const kept = { records: [FORK], images: [FORK], clones: ['web-1'] };
  const ended: string[] = [];
  const asked: string[] = [];
  const warnings: string[] = [];
  let failureCount = failures;
  const clone = {
    ...{ spec: { name: 'web-1', uuid: 'u', clone: { fork: FORK } }, image: FORK, state: 'incoming', hasRun: false },
    ...{ exit: null, guestEnd: null, memory: null, process: { loadState: async () => loadState } },
  };
  const identity = { index: 1, cloneCount: 2, name: 'web-1', uuid: 'u', vmGenerationId: '', macs: {} };
  const origin = { host: 'A', image: FORK, spec: { memory: { pageBytes: 4096 } }, allocatedBytes: 0 };
  const request = {
    ...{ fork: FORK, job: 'j', vm: null, image: null, parentMode: 'continue', memory: 'cow' },
    ...{ share: { first: 1, count: 1 }, origin, isPartialAllowed: false },
  };
  const record = {
    ...{ version: 1, state, runsAfterCommit: true, image: FORK, isWarm: false, clones: [identity] },
    ...{ outcome: null, failure: null, request },
  };
  const ask = (call: string) => async () => {
    asked.push(call);
    throw new MigrationError('UNREACHABLE', 'nobody is there');
  };
  const memory = { sizeBytes: 4096, pageBytes: 4096 };
  const context = {
    ...{ host: 'B', native: {}, registry: { owner: async () => null }, inject: { hit: nothing } },
    log: { debug: quiet, info: quiet, warn: (_: object, text: string) => void warnings.push(text), error: quiet },
    servers: { closeAll: nothing, endFilling: nothing, close: nothing },
    peers: { isPeer: () => isPeer, agent: () => ({ forks: { forkDecision: ask('decision'), endImage: ask('end') } }) },
    forkStore: {
      load: async () => ({ records: [record], corrupt: [] }),
      save: nothing,
      remove: async () => {
        if (failureCount-- > 0) throw new MigrationError('IO_FAILED', 'the disk is gone');
        kept.records = [];
      },
    },
    vms: {
      ...{ on: quiet, off: quiet, all: () => (kept.clones.length > 0 ? [clone] : []) },
      ...{ has: () => kept.clones.length > 0, get: () => clone, unreserve: nothing },
      setState: async (_: string, next: string) => void (clone.state = next),
      destroy: async () => void (kept.clones = []),
      endClone: async (_: object, reason: string) => {
        ended.push(reason);
        clone.state = 'stopped';
      },
      room: { release: quiet, hold: nothing },
    },
    images: {
      has: () => kept.images.length > 0,
      get: () => ({ id: FORK, state: image, deviceStateBytes: 0, overlays: [], disks: [], spec: { memory } }),
      update: nothing,
      delete: async () => void (kept.images = []),
      withPresence: () => Promise.reject(new MigrationError('UNREACHABLE', 'not in this test')),
      setFilling: quiet,
    },
  };
  const agent = new ForkAgent(context as never, {} as never, async () => null);
  await agent.start();
  return { agent, kept, ended, asked, warnings };
}

test('an undecided fork is discarded: its clones have never run', async () => {
  const { agent, kept, warnings, asked } = await agentWith({ state: 'prepared', isPeer: false });
  expect(kept).toEqual({ records: [], images: [], clones: [] });
  expect(warnings).toEqual(['the root of a fork is no peer any more: this host ends its part by itself']);
  // The root, if it is a peer again: it names the clones as lost.
  await expect(agent.runClones(FORK, 'committed')).rejects.toThrow(code('NOT_FOUND'));
  expect(asked).not.toContain('decision');
});

test('an undecided fork whose undo fails is discarded later', async () => {
  const { kept, asked } = await agentWith({ state: 'prepared', isPeer: false, failures: 1 });
  expect(kept.records).toEqual([FORK]);
  await vi.advanceTimersByTimeAsync(60_000);
  expect(kept).toEqual({ records: [], images: [], clones: [] });
  expect(asked).not.toContain('decision');
});

test('a root that is only silent is asked for ever, and nothing is discarded', async () => {
  const { kept, asked, agent } = await agentWith({ state: 'prepared', isPeer: true });
  await vi.advanceTimersByTimeAsync(24 * 3_600_000);
  expect(asked.length).toBeGreaterThan(100);
  expect(kept).toEqual({ records: [FORK], images: [FORK], clones: ['web-1'] });
  await agent.close();
});

test('a committed fork with all pages ends here without its root: what has run goes on', async () => {
  const scene = { state: 'committed', image: 'complete', loadState: 'hasRun' } as const;
  const { kept, ended } = await agentWith({ ...scene, isPeer: false });
  await vi.advanceTimersByTimeAsync(60_000);
  expect(kept).toEqual({ records: [], images: [FORK], clones: ['web-1'] });
  expect(ended).toEqual([]);
});

test('a clone of a committed fork that has not run never will, and ends', async () => {
  const { kept, ended } = await agentWith({ state: 'committed', image: 'complete', isPeer: false });
  await vi.advanceTimersByTimeAsync(60_000);
  expect(ended).toEqual(['root-removed']);
  expect(kept.records).toEqual([]);
});

test('a committed fork whose root is a peer waits for it', async () => {
  const { kept, ended, agent } = await agentWith({ state: 'committed', image: 'complete', isPeer: true });
  await vi.advanceTimersByTimeAsync(24 * 3_600_000);
  expect([kept.records, ended]).toEqual([[FORK], []]);
  await agent.close();
});

test('a host of the configuration is a peer, also if nobody can be called', () => {
  const local = () => Promise.reject(new Error('not in this test')) as never;
  const agents = new RemoteAgents({ self: 'B', local, peers: { A: 'https://a:1' }, store: null });
  expect(['A', 'B', 'C'].map((host) => agents.isPeer(host))).toEqual([true, true, false]);
  expect(agents.names).toEqual([]);
});

test('the clones of an image that is given up for it end with that reason, which the image shows', async () => {
  const failure = rootRemoved(FORK, 'A');
  expect(isFinal(failure)).toBe(true);
  const changes: object[] = [];
  const ended: string[] = [];
  const context = {
    ...{ native: {}, log: { error: quiet }, forkStore: { save: nothing } },
    vms: { endClone: async (_: object, reason: string) => void ended.push(reason) },
    images: {
      get: () => ({ state: 'filling' }),
      update: async (_: string, change: object) => void changes.push(change),
      dropMemory: nothing,
    },
  };
  const record = { image: FORK, request: { fork: FORK }, failure: failure.toJSON() };
  await giveUpImage(context as never, { record, parent: null, clones: [{}], filling: null } as never);
  expect(ended).toEqual(['root-removed']);
  expect(changes).toEqual([{ state: 'failed', problem: expect.stringMatching(/only A has/) }]);
  expect(exitReasonOf(new MigrationError('NO_SPACE', 'full').toJSON())).toBe('stopped');
});
