/** Owner records of a state directory that has come back from a backup, beside what the peers know. */
import { beforeEach, expect, test } from 'vitest';
import { type OutdatedOptions, OutdatedRecords } from '../../../src/agent/outdated.js';
import { FileRegistry } from '../../../src/cluster/file.js';
import { MigrationError } from '../../../src/domain/errors.js';
import type { VmClaims } from '../../../src/domain/host.js';
import { MemoryStore } from '../durable/memory-store.js';

const [FIRST, SECOND] = ['1'.repeat(32), '2'.repeat(32)];

let registry: FileRegistry;
let vm: { spec: { name: string; uuid: string }; state: string; job: string | null; isMerging: boolean };
let peers: Record<string, VmClaims | null>;
let asked: string[];
let outdated: OutdatedRecords;

beforeEach(async () => {
  registry = await FileRegistry.on(new MemoryStore());
  await registry.swapOwner('web', null, { vm: 'web', owner: 'A', epoch: 7, session: null, incarnation: FIRST });
  vm = { spec: { name: 'web', uuid: 'u' }, state: 'stopped', job: null, isMerging: false };
  peers = { B: nothing(), C: nothing() };
  asked = [];
  outdated = new OutdatedRecords(options());
});

const options = (): OutdatedOptions => ({
  ...{ host: 'A', registry, log: { info() {}, debug() {}, warn() {}, error() {} } },
  vms: {
    all: () => [vm],
    has: () => true,
    get: () => vm,
    setState: async (_: string, state: string) => {
      vm.state = state;
    },
  } as never,
  peerNames: () => Object.keys(peers),
  peer: (host) => ({ inventory: { vmClaims: () => answer(host) } }) as never,
});

const nothing = (): VmClaims => ({ vms: [], lastEpoch: 0, owner: null, incarnation: null });
const running = (lastEpoch: number, incarnation: string): VmClaims => ({
  ...{ vms: [{ name: 'web', uuid: 'u', state: 'running' }], owner: 'B' },
  ...{ lastEpoch, incarnation },
});

async function answer(host: string): Promise<{ claims: VmClaims[] }> {
  asked.push(host);
  const claims = peers[host] ?? null;
  if (claims === null) throw new MigrationError('UNREACHABLE', `${host} does not answer`);
  return { claims: [claims] };
}

test.each(['paused', 'stopped'])('a %s VM that runs on a peer in a later epoch belongs to it', async (state) => {
  vm.state = state;
  peers['B'] = running(8, FIRST);
  await outdated.check();
  expect(await registry.owner('web')).toMatchObject({ owner: 'B', epoch: 8, incarnation: FIRST });
  expect(vm.state).toBe(state === 'paused' ? 'departed' : 'stopped');
  expect(outdated.noticeOf('web')).toMatch(
    /^it is running on B in epoch 8, .* epoch 7: "vmctl stop --force web" removes/,
  );
});

test('a VM that runs here as well is only shown: a person has to end one of the two', async () => {
  vm.state = 'running';
  peers['B'] = running(8, FIRST);
  await outdated.check();
  expect(await registry.owner('web')).toMatchObject({ owner: 'A', epoch: 7 });
  expect(vm.state).toBe('running');
  expect(outdated.noticeOf('web')).toMatch(/runs here and is running on B, too .* one of the two .*--force web/);
});

test.each([SECOND, null])('a later epoch of another start, or of an unknown one (%s), is only shown', async (start) => {
  vm.state = 'paused';
  peers['B'] = { ...running(8, FIRST), incarnation: start };
  await outdated.check();
  expect(await registry.owner('web')).toMatchObject({ owner: 'A', epoch: 7 });
  expect(vm.state).toBe('paused');
  expect(outdated.noticeOf('web')).toMatch(/^a VM of this name is running on B, too .* end one of the two/);
});

test('a record that cannot be written does not end the comparison with that peer', async () => {
  vm.state = 'paused';
  peers = { B: running(8, FIRST) };
  Object.assign(registry, { swapOwner: () => Promise.reject(new MigrationError('NO_SPACE', 'the disk is full')) });
  await outdated.check();
  Reflect.deleteProperty(registry, 'swapOwner');
  await outdated.check();
  expect(await registry.owner('web')).toMatchObject({ owner: 'B', epoch: 8 });
});

test('a VM that is paused for a merge of its disks is left alone', async () => {
  vm = { ...vm, state: 'paused', isMerging: true };
  peers['B'] = running(8, FIRST);
  await outdated.check();
  expect(await registry.owner('web')).toMatchObject({ owner: 'A', epoch: 7 });
});

test('the same epoch with another incarnation is shown, with the same one it is not', async () => {
  vm.state = 'paused';
  peers['B'] = running(7, FIRST);
  await outdated.check();
  expect(outdated.noticeOf('web')).toBeNull();
  peers['B'] = running(7, SECOND);
  const again = new OutdatedRecords(options());
  await again.check();
  expect(again.noticeOf('web')).toContain('has a record of another start');
  expect(await registry.owner('web')).toMatchObject({ owner: 'A', epoch: 7, incarnation: FIRST });
});

test('a later epoch of a VM that has ended there changes nothing: the start here may be forced', async () => {
  vm.state = 'paused';
  peers['B'] = { ...running(8, SECOND), vms: [] };
  await outdated.check();
  expect(await registry.owner('web')).toMatchObject({ owner: 'A', epoch: 7 });
  expect(outdated.noticeOf('web')).toBeNull();
});

test('a VM that is part of a job is left to the job', async () => {
  vm = { ...vm, state: 'paused', job: 'job-1' };
  peers['B'] = running(8, FIRST);
  await outdated.check();
  expect(await registry.owner('web')).toMatchObject({ owner: 'A', epoch: 7 });
});

test('a notice goes when one of the two has ended, or when another VM has the name', async () => {
  vm.state = 'running';
  peers['B'] = running(8, FIRST);
  await outdated.check();
  expect(outdated.noticeOf('web')).not.toBeNull();
  peers['B'] = { ...running(8, FIRST), vms: [] };
  await outdated.check();
  expect(outdated.noticeOf('web')).toBeNull();
  expect(asked).toEqual(['B', 'C', 'B']);
  peers['B'] = running(8, FIRST);
  vm.state = 'stopped';
  outdated = new OutdatedRecords(options());
  await outdated.check();
  expect(outdated.noticeOf('web')).not.toBeNull();
  vm = { ...vm };
  expect(outdated.noticeOf('web')).toBeNull();
});

test('a peer that does not answer is asked again, the others are not', async () => {
  peers['B'] = null;
  vm.state = 'paused';
  await outdated.check();
  expect(outdated.noticeOf('web')).toBeNull();
  peers['B'] = running(8, FIRST);
  outdated.start(1);
  await expect.poll(() => outdated.noticeOf('web')).not.toBeNull();
  expect(asked).toEqual(['B', 'C', 'B']);
  outdated.close();
});
