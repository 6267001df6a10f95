/** What the host whose record decides answers about a fork, from its records alone. */
import { expect, test } from 'vitest';
import { ForkAgent } from '../../../../src/agent/fork/agent.js';
import { FinishedForks } from '../../../../src/agent/fork/decision/finished.js';
import { type ForkRecord, finishRecord } from '../../../../src/agent/fork/record.js';
import { MigrationError } from '../../../../src/domain/errors.js';

const FORK = '6'.repeat(16);
const OTHER = '7'.repeat(16);
const code = (expected: string) => expect.objectContaining({ code: expected });
const nothing = async (): Promise<void> => undefined;

function recordOf(change: object = {}, request: object = {}): ForkRecord {
  return {
    ...{ version: 1, state: 'committed', runsAfterCommit: true, image: FORK, isWarm: false },
    ...{ clones: [], outcome: null, failure: null, ...change },
    request: { fork: FORK, job: 'j', vm: null, image: null, parentMode: 'continue', memory: 'cow', ...request },
  } as never;
}

interface Scene {
  readonly records?: readonly ForkRecord[];
  readonly corrupt?: readonly Error[];
  readonly images?: Readonly<Record<string, { readonly state: string }>>;
  /** How often the undo of a fork fails. */
  readonly undoFailures?: number;
  readonly arriving?: () => Promise<string>;
}

async function agentWith({ records = [], corrupt = [], images = {}, undoFailures = 0, arriving }: Scene) {
  let failureCount = undoFailures;
  const kept = new Map(records.map((record) => [record.request.fork, record]));
  const quiet = () => undefined;
  const forkStore = {
    load: async () => ({ records: [...kept.values()], corrupt }),
    save: async (record: ForkRecord) => void kept.set(record.request.fork, record),
    remove: async (fork: string) => {
      if (failureCount-- > 0) throw new MigrationError('IO_FAILED', 'the disk is gone');
      kept.delete(fork);
    },
  };
  const context = {
    ...{ host: 'A', forkStore, native: {}, registry: { owner: async () => null } },
    log: { debug: quiet, info: quiet, warn: quiet, error: quiet },
    servers: { closeAll: nothing },
    peers: { isPeer: () => true },
    vms: { on: quiet, off: quiet, all: () => [], has: () => false, room: { release: quiet } },
    images: { has: (id: string) => id in images, get: (id: string) => images[id] },
  };
  const agent = new ForkAgent(context as never, {} as never, arriving ?? (async () => null));
  await agent.start();
  const decision = async (fork = FORK) => (await agent.forkDecision(fork)).decision;
  return { agent, kept, decision };
}

test('a fork that nobody knows is discarded, and cannot be prepared after that answer', async () => {
  const { agent, decision } = await agentWith({});
  expect(await decision()).toBe('discarded');
  await expect(agent.prepareClones({ fork: FORK } as never)).rejects.toThrow(code('CONFLICT'));
  expect(await decision()).toBe('discarded');
});

test('a fork is open until its undo is durable', async () => {
  const { agent, decision } = await agentWith({ records: [recordOf({ state: 'prepared' })], undoFailures: 2 });
  expect(await decision()).toBe('open');
  await expect(agent.discardFork(FORK)).rejects.toThrow(code('STEP_FAILED'));
  expect(await decision()).toBe('open');
  await agent.discardFork(FORK);
  expect(await decision()).toBe('discarded');
});

test('a fork is open while it is being prepared, and never prepared if the answer was given before', async () => {
  let answer: (job: string) => void = () => undefined;
  const { agent, decision } = await agentWith({ arriving: () => new Promise((resolve) => (answer = resolve)) });
  const preparing = expect(agent.prepareClones({ fork: FORK, vm: 'web' } as never)).rejects.toThrow(code('VM_BUSY'));
  await new Promise(setImmediate);
  expect(await decision()).toBe('open');
  answer('job');
  await preparing;

  // The question comes while the call is on its way to the fork's lock.
  const late = expect(agent.prepareClones({ fork: OTHER, vm: 'web' } as never)).rejects.toThrow(code('CONFLICT'));
  expect(await decision(OTHER)).toBe('discarded');
  await late;
});

test('while a record cannot be read, every fork that is not known is open', async () => {
  const { decision } = await agentWith({ corrupt: [new Error('damaged')] });
  expect(await decision()).toBe('open');
});

test('a committed fork that is over is never undone; whoever still asks has no part in it', async () => {
  const saved: ForkRecord[] = [];
  const store = { save: async (record: ForkRecord) => void saved.push(record), remove: nothing };
  await finishRecord({ forkStore: store as never }, recordOf({}, { share: { first: 0, count: 1 } }));
  expect(saved).toMatchObject([{ isFinished: true, clones: [] }]);
  const { agent, decision, kept } = await agentWith({ records: saved });
  expect(await decision()).toBe('discarded');
  expect(agent.claims(FORK)).toBe(false);
  expect(kept.has(FORK)).toBe(true);
  await expect(agent.forkProgress(FORK)).rejects.toThrow(code('NOT_FOUND'));
  await expect(agent.prepareClones({ fork: FORK } as never)).rejects.toThrow(code('CONFLICT'));
  await expect(agent.discardFork(FORK)).rejects.toThrow(code('CONFLICT'));
  await agent.finishFork(FORK);
});

test('a fork whose image is gone after a reboot is over', async () => {
  const { decision, kept } = await agentWith({ records: [recordOf({}, { share: { first: 0, count: 1 } })] });
  expect(await decision()).toBe('discarded');
  expect(kept.get(FORK)).toMatchObject({ isFinished: true });
});

test.each([
  ['a fork of one host', {}],
  ['a fork that this host has joined', { share: { first: 1, count: 1 }, origin: { host: 'B' } }],
])('%s leaves no record', async (_, request) => {
  const { kept } = await agentWith({ records: [recordOf({}, request)] });
  expect(kept.size).toBe(0);
});

test('only the latest forks are kept', async () => {
  const removed: string[] = [];
  const finished = new FinishedForks({ remove: async (fork) => void removed.push(fork) });
  for (let index = 0; index < 1030; index++) await finished.add(`fork ${index}`);
  expect(removed).toEqual(Array.from({ length: 6 }, (_, index) => `fork ${index}`));
  expect([finished.has('fork 5'), finished.has('fork 6')]).toEqual([false, true]);
});
