/** `vmctl state check` and `repair`, run as the program on state directories of an earlier daemon. */
import { cp, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { readRecord, writeRecord } from '../../../src/agent/vm/record.js';
import { FileRegistry } from '../../../src/cluster/file.js';
import type { VmClaims, VmIdentity } from '../../../src/domain/host.js';
import { openStateDirectory } from '../../../src/durable/state-directory.js';
import { openState } from '../../../src/durable/state-format.js';
import { loadNativeBinding } from '../../../src/native/binding.js';
import { readState } from '../../../src/state/records.js';
import { type RepairOptions, type RepairReport, repairState } from '../../../src/state/repair.js';

const KEPT = fileURLToPath(new URL('../../fixtures/records-0.1.0/killed/A', import.meta.url));

let directory: string;
let state: string;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'vmg-state-'));
  state = join(directory, 'state');
  await cp(KEPT, state, { recursive: true });
  await (await openStateDirectory(state, (descriptor) => loadNativeBinding().lockFile(descriptor))).giveBack();
});
afterEach(() => rm(directory, { recursive: true, force: true }));

async function damaged(): Promise<string[]> {
  const { findings } = await readState(state);
  return findings.filter(({ state: how }) => how === 'damaged').map(({ record }) => record);
}

const repair = (
  owners: Record<string, string> = {},
  accepted: readonly string[] = [],
  more: Partial<Pick<RepairOptions, 'hosts' | 'mirrored'>> = {},
): Promise<RepairReport> =>
  repairState(state, {
    ...{ owners: new Map(Object.entries(owners)), accepted, at: '2026-01-01T00:00:00.000Z' },
    ...{ hosts: null, mirrored: [], ...more },
  });

async function flip(name: string, at: (bytes: Buffer) => number): Promise<void> {
  const path = join(state, name);
  const bytes = await readFile(path);
  const index = at(bytes);
  bytes[index] = bytes[index]! ^ 0x04;
  await writeFile(path, bytes);
}

async function ownersNow(): Promise<Record<string, string>> {
  const registry = await FileRegistry.open(state);
  const owners: Record<string, string> = {};
  for (const vm of ['web', 'store', 'db', 'legacy', 'ended', 'late', 'half']) {
    const owner = await registry.owner(vm);
    if (owner !== null) owners[vm] = `${owner.owner} ${owner.epoch}`;
  }
  await registry.close();
  return owners;
}

const aside = async (folder = ''): Promise<string[]> =>
  (await readdir(join(state, folder))).filter((name) => name.includes('.damaged-'));

test('an intact directory has nothing to repair', async () => {
  expect(await damaged()).toEqual([]);
  expect(await repair()).toEqual({ done: [], left: [], answers: [] });
  expect(await aside()).toEqual([]);
});

test('a directory of build 0.1.0 is left to the daemon, which upgrades it', async () => {
  await rm(state, { recursive: true });
  await cp(KEPT, state, { recursive: true });
  const before = await readFile(join(state, 'owners.log'));
  const { done, left } = await repair({ web: 'A' });
  expect(done).toEqual([]);
  expect(left).toEqual([expect.stringContaining('start vmigrated once')]);
  expect(await readFile(join(state, 'owners.log'))).toEqual(before);
});

describe('a damaged line of owners.log', () => {
  test('keeps the daemon from starting, and leaves the VMs without an owner that it may be about', async () => {
    const whole = await ownersNow();
    await flip('owners.log', (bytes) => bytes.length - 1);
    await expect(FileRegistry.open(state)).rejects.toMatchObject({ code: 'CORRUPT' });
    expect(await damaged()).toHaveLength(1);
    const { left } = await repair();
    const owners = await ownersNow();
    for (const [vm, owner] of Object.entries(owners)) expect(owner).toBe(whole[vm]);
    expect(left.join('\n')).toContain('vmctl state repair --owner');
    expect(await aside()).toEqual(['owners.log.damaged-2026-01-01T00-00-00-000Z']);
    expect(await damaged()).toEqual([]);
  });

  test('is replaced by what the user says, and by nothing else', async () => {
    await flip('owners.log', (bytes) => bytes.length - 1);
    const { left } = await repair();
    const doubtful = left.map((line) => line.split(':')[0] ?? '');
    expect(doubtful).toContain('web');
    expect((await ownersNow()).web).toBeUndefined();
    await repair({ web: 'A' });
    expect((await ownersNow()).web).toBe('A 1');
  });

  test('does not put in doubt a VM with a later line', async () => {
    const registry = await FileRegistry.open(state);
    await registry.announceMove('web', 1, 'ab'.repeat(16));
    await registry.close();
    await flip('owners.log', () => 40);
    const { left } = await repair();
    expect(left.some((line) => line.startsWith('web:'))).toBe(false);
    expect((await ownersNow()).web).toBe('A 1');
  });
});

test('a torn append is no damage, and costs no record', async () => {
  const path = join(state, 'owners.log');
  const bytes = await readFile(path);
  await writeFile(path, bytes.subarray(0, bytes.length - 5));
  const { findings } = await readState(state);
  expect(findings.filter(({ state: how }) => how !== 'intact').map(({ state: how }) => how)).toEqual(['torn']);
});

test('an owner record that is missing for a VM is not guessed', async () => {
  await writeFile(join(state, 'owners.log'), '');
  const { left } = await repair();
  expect(left.map((line) => line.split(':')[0])).toEqual(expect.arrayContaining(['web', 'store', 'late']));
  expect(await ownersNow()).toEqual({});
});

describe('a damaged VM record', () => {
  const record = 'vms/web/record.json';

  test('is left for a person, who may accept it', async () => {
    await flip(record, (bytes) => bytes.indexOf('"epoch": 1') + '"epoch": '.length);
    expect(await damaged()).toEqual([record]);
    const { done, left } = await repair();
    expect(done).toEqual([]);
    expect(left).toEqual([expect.stringContaining(`--accept ${record}`)]);
    expect((await repair({}, [record])).done).toEqual([`${record}: accepted as it is`]);
    expect(await readRecord(join(state, 'vms/web'))).toMatchObject({ epoch: 5 });
    expect(await aside('vms/web')).toHaveLength(1);
  });

  test('that is no record any more is not accepted', async () => {
    await writeFile(join(state, record), 'nonsense');
    await expect(repair({}, [record])).rejects.toMatchObject({ code: 'USAGE' });
    await expect(repair({}, ['../../etc/passwd'])).rejects.toMatchObject({ code: 'USAGE' });
  });
});

test('a damaged session record and a damaged mark are set aside', async () => {
  const [session = ''] = (await readdir(join(state, 'sessions'))).filter((name) => name.endsWith('.json'));
  await flip(`sessions/${session}`, () => 20);
  await flip('format', () => 20);
  expect((await damaged()).sort()).toEqual(['format', `sessions/${session}`]);
  await repair();
  expect(await damaged()).toEqual([]);
  expect(await aside('sessions')).toHaveLength(1);
  // The mark is made anew: records without a checksum stay refused.
  const { id } = await openStateDirectory(state, (descriptor) => loadNativeBinding().lockFile(descriptor)).then(
    async (open) => {
      await open.giveBack();
      return open;
    },
  );
  expect(id).toMatch(/^[0-9a-f]{32}$/);
});

describe('an owner that is not known', () => {
  const nothing: VmClaims = { vms: [], lastEpoch: 0, owner: null, incarnation: null };
  /** B and C answer for all VMs; `null` does not answer. */
  const hosts = (B: (vm: string) => VmClaims | null, C: (vm: string) => VmClaims | null = () => nothing) => ({
    self: 'A',
    ask: async (vms: readonly VmIdentity[]) =>
      Object.entries({ B, C }).map(([peer, say]) => {
        const claims = vms.flatMap(({ name, uuid }) => {
          const said = say(name);
          // `x` stands for the VM that is asked for.
          return said === null ? [] : { ...said, vms: said.vms.map((vm) => (vm.uuid === 'x' ? { ...vm, uuid } : vm)) };
        });
        return { peer, claims: claims.length < vms.length ? null : claims, failure: null };
      }),
  });
  const running =
    (lastEpoch: number, owner = 'B') =>
    (vm: string): VmClaims =>
      vm === 'web' ? { ...nothing, vms: [{ name: vm, uuid: 'x', state: 'running' }], lastEpoch, owner } : nothing;
  beforeEach(() => writeFile(join(state, 'owners.log'), ''));

  test('is that of the peer that has the VM', async () => {
    const { done, answers } = await repair({}, [], { hosts: hosts(running(2)) });
    expect((await ownersNow()).web).toBe('B 2');
    expect(done).toContain('web: belongs to B in epoch 2: B has it');
    expect(answers).toContain('web: B has it running, knows epoch 2 with owner B');
    expect(answers).toContain('web: C does not have it, knows no epoch of it');
  });

  test('is this host if the VM is here, and all peers say that they have not got it', async () => {
    await repair({}, [], { hosts: hosts(() => nothing) });
    const owners = await ownersNow();
    expect([owners.web, owners.store]).toEqual(['A 1', 'A 1']);
    // Unfinished moves ask their targets.
    expect([owners.half, owners.late]).toEqual([undefined, undefined]);
  });

  test('is asked for again when the peers answer, and check says that it is missing', async () => {
    await openState(state);
    await cp(join(KEPT, 'owners.log'), join(state, 'owners.log'));
    await rm(join(state, 'format'));
    await openState(state);
    await flip('owners.log', (bytes) => bytes.length - 1);
    await repair();
    expect((await ownersNow()).web).toBeUndefined();
    const { findings } = await readState(state);
    expect(findings.filter(({ state: how }) => how === 'missing').map(({ record }) => record)).toContain(
      'owners.log (web)',
    );
    const { left } = await repair();
    expect(left.some((line) => line.startsWith('web:'))).toBe(true);
    await repair({}, [], { hosts: hosts(() => nothing) });
    expect((await ownersNow()).web).toBe('A 1');
  });

  test('is where a peer knows that it went', async () => {
    const went = (vm: string) => (vm === 'web' ? { ...nothing, lastEpoch: 5, owner: 'C' } : nothing);
    await repair({}, [], { hosts: hosts(went) });
    expect((await ownersNow()).web).toBe('C 5');
  });

  test.each<[string, RepairOptions['hosts']]>([
    [
      'a peer does not answer',
      hosts(
        () => nothing,
        () => null,
      ),
    ],
    ['two peers have it', hosts(running(2), running(2, 'C'))],
    ['it is here and at a peer in one epoch', hosts(running(1))],
    [
      'a peer has another VM of that name',
      hosts((vm) => ({ ...nothing, vms: [{ name: vm, uuid: 'y', state: 'running' }], lastEpoch: 9, owner: 'B' })),
    ],
    ['the peer that has it knows an older epoch', hosts(running(0))],
    ['the peer that has it does not call it its own', hosts(running(2, 'C'))],
    [
      'a peer knows a later epoch, but no owner',
      hosts((vm) => (vm === 'web' ? { ...nothing, lastEpoch: 5 } : nothing)),
    ],
    [
      'a peer knows an owner, and another one a later epoch without',
      hosts(
        (vm) => (vm === 'web' ? { ...nothing, lastEpoch: 5, owner: 'C' } : nothing),
        (vm) => (vm === 'web' ? { ...nothing, lastEpoch: 6 } : nothing),
      ),
    ],
    ['it is arriving', hosts((vm) => ({ ...nothing, vms: [{ name: vm, uuid: 'x', state: 'incoming' }] }))],
    ['nobody is asked', null],
  ])('stays unknown if %s', async (_, asked) => {
    const { left } = await repair({}, [], { hosts: asked });
    expect((await ownersNow()).web).toBeUndefined();
    expect(left.find((line) => line.startsWith('web:'))).toContain('--owner web=HOST');
  });

  test('is what the user says, whatever the peers say', async () => {
    await repair({ web: 'A' }, [], { hosts: hosts(running(2)) });
    expect((await ownersNow()).web).toBe('A 1');
  });

  test('is in the copy of this boot, which needs no peer', async () => {
    const record = { vm: 'web', owner: 'B', epoch: 2, session: 'ab'.repeat(16) };
    const { done } = await repair({}, [], { mirrored: [record] });
    expect(done).toContain('web: belongs to B in epoch 2, as the copy in the memory directory says');
    const registry = await FileRegistry.open(state);
    expect(await registry.owner('web')).toEqual(record);
    await registry.close();
  });
});

test('a VM whose start ended with the daemon needs no owner record', async () => {
  await openState(state);
  const path = join(state, 'vms', 'web');
  const record = await readRecord(path);
  await writeRecord(path, { ...record!, state: 'starting', process: null });
  await writeFile(join(state, 'owners.log'), '');
  const { findings } = await readState(state);
  const missing = findings.filter(({ state: how }) => how === 'missing').map(({ record: what }) => what);
  expect(missing).toContain('owners.log (store)');
  expect(missing).not.toContain('owners.log (web)');
});
