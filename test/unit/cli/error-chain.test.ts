/**
 * From an ioctl's errno to the text on the terminal: native failures of host B, over real TLS to host A, through the
 * real engine and journal into a job's view, and out of the command. No layer in between may lose anything.
 */

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { getSystemErrorName } from 'node:util';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { RemoteAgents } from '../../../src/api/peers/client.js';
import { callOn, HOST_CALLS } from '../../../src/api/peers/methods.js';
import { buildServer } from '../../../src/api/server.js';
import { errorText } from '../../../src/cli/error-text.js';
import { jobError } from '../../../src/cli/follow.js';
import type { CauseJson, MigrationError } from '../../../src/domain/errors.js';
import type { JobView } from '../../../src/domain/job.js';
import { LIMITS } from '../../../src/domain/limits.js';
import type { HostPort } from '../../../src/engine/ports/host.js';
import { failureToError, thrownToError } from '../../../src/native/failure.js';
import { NATIVE_ERROR } from '../../../src/protocol/wire.js';
import { jobView } from '../../../src/schemas/job.js';
import { decodeJournalEntry } from '../../../src/schemas/journal.js';
import { Authority } from '../../../src/tls/authority.js';
import { TlsStore } from '../../../src/tls/store.js';
import { fakeServices } from '../../support/api-fakes.js';
import { complete, rest, Scripted } from '../engine/scripted.js';
import { filled, forkRequest } from '../planner/fork-facts.js';
import { request } from '../planner/planner-facts.js';

const RECOVERY_MS_MAX = 40;
let directory: string;
let peers: RemoteAgents;
const services = fakeServices({ host: 'B' });
const closers: (() => unknown)[] = [];

beforeAll(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-chain-'));
  const authority = await Authority.create(join(directory, 'ca'), 'test');
  const storeOf = async (name: string): Promise<TlsStore> => {
    await authority.issue({ role: 'host', name }, ['127.0.0.1'], join(directory, name));
    return new TlsStore(join(directory, name), () => undefined);
  };
  const [storeA, storeB] = [await storeOf('A'), await storeOf('B')];
  const server = buildServer({ ...services, tls: storeB, peers: { ...services.peers, names: ['A'] } });
  const port = await server.listenTls('127.0.0.1', 0, storeB);
  peers = new RemoteAgents({
    ...{ self: 'A', store: storeA, peers: { B: `https://127.0.0.1:${port}` } },
    local: () => {
      throw new Error('host A is the scripted one');
    },
  });
  closers.push(
    () => rm(directory, { recursive: true, force: true }),
    ...[storeA, storeB].map((store) => () => store.close()),
    () => server.close(),
    () => peers.close(),
  );
});
afterAll(async () => {
  for (const close of closers.reverse()) await close();
});

/** Host A as the test scripts it, and host B behind its server, scripted in the same way. */
function worldOverTls(): Scripted {
  const world = new Scripted();
  const local = world.agent.bind(world);
  const target = local('B');
  for (const call of HOST_CALLS) services.answers.set(call.name, () => callOn(target, call, []));
  world.agent = (name: string): HostPort => (name === 'B' ? peers.agent('B') : local(name));
  return world;
}

/** The job as the next daemon reads it from the journal, and as a client gets it. */
function asClientSeesIt(world: Scripted, view: JobView): JobView {
  const ends = world.journalled().map((line) => decodeJournalEntry(line));
  const last = ends.findLast(({ type }) => type === 'state');
  const error = last?.type === 'state' ? last.error : undefined;
  expect(error).toEqual(JSON.parse(JSON.stringify(view.error)));
  return jobView.parse(JSON.parse(JSON.stringify({ ...view, error })));
}

/** The output of the command, and the innermost cause in it. */
async function printed(world: Scripted, kind: 'migrate' | 'fork'): Promise<{ actual: string; root: CauseJson }> {
  const { jobs } = await world.daemon({ recoveryMsMax: RECOVERY_MS_MAX });
  const { id } = kind === 'fork' ? await jobs.submitFork(forkRequest) : await jobs.submit(request);
  const view = asClientSeesIt(world, await rest(jobs, id));
  await jobs.close();
  const error = jobError(view).toJSON();
  let root: CauseJson = error;
  while (root.cause !== undefined) root = root.cause;
  return { actual: errorText(kind === 'fork' ? 'vfork' : 'vmigrate', error).replaceAll(id, 'JOB'), root };
}

/** The error that the addon throws. */
function thrown(code: keyof typeof NATIVE_ERROR, errno: number, what: string, doing: string): MigrationError {
  return thrownToError(Object.assign(new Error(what), { nativeCode: NATIVE_ERROR[code], errno }), doing);
}

/** The failure in a session's snapshot, as target-session.ts reports it. */
function failed(code: keyof typeof NATIVE_ERROR, errno: number, what: string) {
  const error = failureToError({ code: NATIVE_ERROR[code], errno, what }, 'fetching pages');
  return () => ({ ...complete, state: 'failed', pagesPresent: 20, error: error.toJSON() });
}

/** `doing` names the agent's attempt, as the callers of the addon name it. */
const throwing =
  (...failure: Parameters<typeof thrown>) =>
  () =>
    Promise.reject(thrown(...failure));
const CONNECT = 'connect to the source at 10.0.0.1 over';

const MOVES: readonly (readonly [name: string, told: Scripted['on'], text: string])[] = [
  [
    'UFFDIO_CONTINUE: ENOMEM',
    { 'B.progress': failed('OUT_OF_MEMORY', 12, 'UFFDIO_CONTINUE') },
    `vmigrate: vm1 belongs to B and waits for memory from A (NEEDS_RECOVERY)
  because: no page has arrived for 40 ms (NEEDS_RECOVERY)
  because: the target's page session failed: OUT_OF_MEMORY
  because: fetching pages: UFFDIO_CONTINUE (ENOMEM) (OUT_OF_MEMORY)
  → ${LIMITS.memory.remedy}
  → then the job goes on by itself; to try at once: vmigrate --recover JOB
`,
  ],
  [
    'UFFDIO_COPY: ENOSPC',
    { 'B.progress': failed('NO_SPACE', 28, 'UFFDIO_COPY') },
    `vmigrate: vm1 belongs to B and waits for memory from A (NEEDS_RECOVERY)
  because: no page has arrived for 40 ms (NEEDS_RECOVERY)
  because: the target's page session failed: NO_SPACE
  because: fetching pages: UFFDIO_COPY (ENOSPC) (NO_SPACE)
  → free space in the directory of the memory files on that host
  → then the job goes on by itself; to try at once: vmigrate --recover JOB
`,
  ],
  [
    'fallocate: ENOMEM, no huge page is left',
    { 'B.progress': failed('NO_SPACE', 12, 'fallocate huge page') },
    `vmigrate: vm1 belongs to B and waits for memory from A (NEEDS_RECOVERY)
  because: no page has arrived for 40 ms (NEEDS_RECOVERY)
  because: the target's page session failed: NO_SPACE
  because: fetching pages: fallocate huge page (ENOMEM) (NO_SPACE)
  → free space in the directory of the memory files on that host
  → then the job goes on by itself; to try at once: vmigrate --recover JOB
`,
  ],
  [
    'read of the userfaultfd: ESRCH',
    { 'B.progress': failed('PROCESS_GONE', 3, 'read userfaultfd') },
    `vmigrate: vm1 belongs to B and waits for memory from A (NEEDS_RECOVERY)
  because: no page has arrived for 40 ms (NEEDS_RECOVERY)
  because: the target's page session failed: QEMU_GONE
  because: fetching pages: read userfaultfd (ESRCH) (QEMU_GONE)
  → repair the cause
  → then the job goes on by itself; to try at once: vmigrate --recover JOB
`,
  ],
  [
    'a region with another length: EIO',
    { 'B.progress': failed('REGION_CHANGED', 5, 'fstat region') },
    `vmigrate: vm1 belongs to B and waits for memory from A (NEEDS_RECOVERY)
  because: no page has arrived for 40 ms (NEEDS_RECOVERY)
  because: the target's page session failed: REGION_CHANGED
  because: fetching pages: fstat region (EIO) (REGION_CHANGED)
  → repair the cause
  → then the job goes on by itself; to try at once: vmigrate --recover JOB
`,
  ],
  [
    'a short read of the data map: EPROTO',
    { 'B.progress': failed('PROTOCOL', 71, 'read data map') },
    `vmigrate: vm1 belongs to B and waits for memory from A (NEEDS_RECOVERY)
  because: no page has arrived for 40 ms (NEEDS_RECOVERY)
  because: the target's page session failed: PEER_PROTOCOL
  because: fetching pages: read data map (EPROTO) (PEER_PROTOCOL)
  → repair the cause
  → then the job goes on by itself; to try at once: vmigrate --recover JOB
`,
  ],
  [
    'connect after a lost connection: ECONNREFUSED',
    {
      'B.progress': () => ({ ...complete, state: 'disconnected', pagesPresent: 20 }),
      'B.reconnect': throwing('DISCONNECTED', 111, 'connect data connection', `${CONNECT} tcp`),
    },
    `vmigrate: vm1 belongs to B and waits for memory from A (NEEDS_RECOVERY)
  because: drain on B keeps failing (NEEDS_RECOVERY)
  because: the target cannot connect again (DISCONNECTED)
  because: connect to the source at 10.0.0.1 over tcp: connect data connection (ECONNREFUSED) (DISCONNECTED)
  → repair the connection between the hosts
  → then the job goes on by itself; to try at once: vmigrate --recover JOB
`,
  ],
  [
    'ibv_reg_mr: ENOMEM',
    {
      'B.connect': throwing('OUT_OF_MEMORY', 12, 'register memory: over memlock', `${CONNECT} rdma`),
    },
    `vmigrate: vm1 runs on A: the migration failed (STEP_FAILED)
  because: connectTarget on B failed (STEP_FAILED)
  because: connect to the source at 10.0.0.1 over rdma: register memory: over memlock (ENOMEM): \
${LIMITS.lockedMemory.text} (OUT_OF_MEMORY)
  → ${LIMITS.lockedMemory.remedy}
`,
  ],
  [
    'ibv_reg_mr: EPERM',
    { 'A.expose': throwing('NOT_PERMITTED', 1, 'register memory', 'open source session') },
    `vmigrate: vm1 runs on A: the migration failed (STEP_FAILED)
  because: exposeSource on A failed (STEP_FAILED)
  because: open source session: register memory (EPERM) (NOT_PERMITTED)
  → run "vmctl doctor" on that host and follow its remedies
`,
  ],
  [
    'open of a region: ENOENT',
    { 'A.expose': throwing('NOT_FOUND', 2, 'open region', 'open source session') },
    `vmigrate: vm1 runs on A: the migration failed (STEP_FAILED)
  because: exposeSource on A failed (STEP_FAILED)
  because: open source session: open region (ENOENT) (NOT_FOUND)
`,
  ],
  [
    'pidfd_getfd: EPERM',
    { 'B.prepare': throwing('NOT_PERMITTED', 1, 'pidfd_getfd', 'take back VM process 4711') },
    `vmigrate: vm1 runs on A: the migration failed (STEP_FAILED)
  because: prepareTarget on B failed (STEP_FAILED)
  because: take back VM process 4711: pidfd_getfd (EPERM) (NOT_PERMITTED)
  → run "vmctl doctor" on that host and follow its remedies
`,
  ],
  [
    'userfaultfd: EPERM',
    { 'B.prepare': throwing('NOT_PERMITTED', 1, 'userfaultfd', 'the preload of vm1') },
    `vmigrate: vm1 runs on A: the migration failed (STEP_FAILED)
  because: prepareTarget on B failed (STEP_FAILED)
  because: the preload of vm1: userfaultfd (EPERM) (NOT_PERMITTED)
  → run "vmctl doctor" on that host and follow its remedies
`,
  ],
];

test.each(MOVES)('%s', async (name, told, text) => {
  const world = worldOverTls();
  Object.assign(world.on, told);
  const { actual, root } = await printed(world, 'migrate');
  expect(actual).toBe(text);
  const { nativeCode, errno } = root.details as Record<string, unknown>;
  expect(Object.values(NATIVE_ERROR)).toContain(nativeCode);
  expect(getSystemErrorName(-Number(errno))).toBe(/: (E[A-Z]+)/.exec(name)?.[1]);
});

test('UFFDIO_WRITEPROTECT of an image: ENOSPC', async () => {
  const world = new Scripted();
  const failure = { code: NATIVE_ERROR.NO_SPACE, errno: 28, what: 'UFFDIO_WRITEPROTECT' };
  const error = failureToError(failure, 'filling the image').toJSON();
  world.on['A.forkProgress'] = () => ({ ...filled, state: 'failed', error });
  const { actual, root } = await printed(world, 'fork');
  expect(root.details).toEqual({ nativeCode: NATIVE_ERROR.NO_SPACE, errno: 28 });
  expect(actual).toBe(`\
vfork: the image of vm1 cannot be completed: its 3 clones ended; vm1 is unaffected (VM_LOST)
  because: the image of vm1 cannot be completed, so its clones have been ended (VM_LOST)
  because: filling the image: UFFDIO_WRITEPROTECT (ENOSPC) (NO_SPACE)
  → free space in the directory of the memory files on that host
  → vm1 is not affected; remove what is left with "vmctl stop --image 00112233445566ff" and \
"vmctl image rm 00112233445566ff"
`);
});
