/** One name in one place: two hosts and their peers, each with a real registry. */
import { beforeEach, describe, expect, test } from 'vitest';
import { UniqueNames } from '../../../src/agent/unique-names.js';
import { FileRegistry } from '../../../src/cluster/file.js';
import { MigrationError } from '../../../src/domain/errors.js';
import type { VmIdentity } from '../../../src/domain/host.js';
import type { HostPort } from '../../../src/engine/ports/host.js';
import { parseSpec } from '../../../src/schemas/vm-spec.js';
import { MemoryStore } from '../durable/memory-store.js';

const SPEC = parseSpec({ name: 'web', memory: { size: '64M' } });

interface Host {
  readonly registry: FileRegistry;
  readonly vms: { name: string; uuid: string; state: string }[];
  readonly names: UniqueNames;
  /** away: does not answer · old: is of build 0.1.0, which does not know the question */
  mode: 'up' | 'away' | 'old';
}

let hosts: Record<string, Host>;
/** The questions, as "B 3": peer, number of VMs. */
let calls: string[];

async function addHost(name: string, peerNames: readonly string[]): Promise<void> {
  const registry = await FileRegistry.on(new MemoryStore());
  const vms: Host['vms'] = [];
  const names = new UniqueNames({
    ...{ host: name, registry },
    vms: { list: () => vms } as never,
    peerNames: () => peerNames,
    peer: (peer) => portOf(peer),
  });
  hosts[name] = { registry, vms, names, mode: 'up' };
}

function portOf(peer: string): HostPort {
  const host = hosts[peer];
  if (host === undefined || host.mode === 'away')
    throw new MigrationError('UNREACHABLE', `${peer} does not answer`, { isRetryable: true });
  const inventory = {
    vmClaims: async (asked: readonly VmIdentity[]) => {
      calls.push(`${peer} ${asked.length}`);
      if (host.mode === 'old') throw new MigrationError('NOT_FOUND', 'no route');
      return host.names.claims(asked);
    },
    inventory: async () => ({ vmNames: host.vms.map(({ name }) => name) }),
  };
  return { host: peer, inventory } as never;
}

beforeEach(async () => {
  hosts = {};
  calls = [];
  await addHost('A', ['B', 'C']);
  await addHost('B', ['A', 'C']);
  await addHost('C', ['A', 'B']);
});

const host = (name: string): Host => hosts[name]!;
const start = (isForced = false) => host('A').names.guard(SPEC, isForced, async (found) => found);

describe('a name', () => {
  test('that nobody has is given, without warnings', async () => {
    expect(await start()).toEqual({ epochMin: 0, warnings: [] });
  });

  test.each([
    ['the name', { name: 'web', uuid: 'other' }, 'VM web is running on B'],
    ['the UUID', { name: 'other', uuid: SPEC.uuid }, 'VM other, which has the same UUID, is running on B'],
  ])('is refused if a peer has %s', async (_, vm, message) => {
    host('B').vms.push({ ...vm, state: 'running' });
    await expect(start()).rejects.toMatchObject({ code: 'CONFLICT', message });
    await expect(start(true)).rejects.toMatchObject({ code: 'CONFLICT', message });
  });

  test('is free again when the VM of that name has ended', async () => {
    host('B').vms.push({ name: 'web', uuid: 'x', state: 'stopped' });
    await start();
  });

  test('is refused if a peer of build 0.1.0 has it', async () => {
    host('B').mode = 'old';
    expect((await start()).warnings).toEqual([]);
    host('B').vms.push({ name: 'web', uuid: 'x', state: 'running' });
    await expect(start()).rejects.toMatchObject({ code: 'CONFLICT', message: 'VM web is running on B' });
  });

  test('that two hosts start at once, neither of which has it yet, does not become two VMs', async () => {
    const starts = ['A', 'B'].map((name) => host(name).names.guard(SPEC, false, async () => name));
    const ends = await Promise.allSettled(starts);
    expect(ends.filter(({ status }) => status === 'fulfilled').length).toBeLessThanOrEqual(1);
    await start();
  });
});

describe('a peer that does not answer', () => {
  test('is named in a warning', async () => {
    host('C').mode = 'away';
    expect((await start()).warnings).toEqual(['C does not answer: whether it has a VM web is not known']);
  });

  test('keeps the VM from starting if it was the last owner by the record of this host', async () => {
    await host('A').registry.swapOwner('web', null, { vm: 'web', owner: 'B', epoch: 2, session: 'ab'.repeat(16) });
    expect((await start()).warnings).toEqual([]);
    host('B').mode = 'away';
    await expect(start()).rejects.toMatchObject({
      code: 'CONFLICT',
      message: 'web last belonged to B, which does not answer',
      remedy: expect.stringContaining('--force-name') as string,
    });
    expect((await start(true)).warnings).toHaveLength(1);
  });

  test('or by the record of another host, newer than that of this one', async () => {
    await host('A').registry.swapOwner('web', null, { vm: 'web', owner: 'B', epoch: 2, session: null });
    await host('B').registry.swapOwner('web', null, { vm: 'web', owner: 'C', epoch: 3, session: null });
    host('C').mode = 'away';
    await expect(start()).rejects.toMatchObject({ message: 'web last belonged to C, which does not answer' });
  });

  test('or if it is no peer any more', async () => {
    await host('A').registry.swapOwner('web', null, { vm: 'web', owner: 'Z', epoch: 2, session: null });
    await expect(start()).rejects.toMatchObject({ message: 'web last belonged to Z, which does not answer' });
  });
});

test('an owner record from a backup is recognised: the VM begins above every epoch that a peer knows', async () => {
  await host('A').registry.swapOwner('web', null, { vm: 'web', owner: 'A', epoch: 7, session: null });
  await host('B').registry.swapOwner('web', null, { vm: 'web', owner: 'B', epoch: 8, session: null });
  await host('B').registry.removeOwner('web', 8);
  expect((await start()).epochMin).toBe(8);
});

test('a paused VM does not run on if it runs on a peer, but if it has only left there', async () => {
  const resume = () => host('A').names.refuseIfElsewhere('web', SPEC.uuid);
  host('C').mode = 'away';
  host('B').vms.push({ name: 'web', uuid: SPEC.uuid, state: 'departed' });
  await resume();
  host('B').vms[0]!.state = 'running';
  await expect(resume()).rejects.toMatchObject({ code: 'CONFLICT', message: 'VM web is running on B, too' });
});

describe('the names of clones', () => {
  const CLONES = Array.from({ length: 64 }, (_, index) => ({ name: `job-${index}`, uuid: `uuid-${index}` }));
  const fork = () => host('A').names.guardClones(CLONES, async (epochs) => epochs);

  test('cost one call for each peer, and begin above the epochs that peers know', async () => {
    await host('B').registry.swapOwner('job-7', null, { vm: 'job-7', owner: 'B', epoch: 5, session: null });
    await host('B').registry.removeOwner('job-7', 5);
    const epochs = await fork();
    expect(calls).toEqual(['B 64', 'C 64']);
    expect([epochs.get('job-6'), epochs.get('job-7')]).toEqual([0, 5]);
  });

  test('are refused if a peer has one of them, and pre-flight names it', async () => {
    host('B').vms.push({ name: 'job-3', uuid: 'x', state: 'running' });
    await expect(fork()).rejects.toMatchObject({ code: 'CONFLICT', message: 'VM job-3 is running on B' });
    expect(await host('A').names.namesElsewhere(CLONES)).toEqual(['job-3 (running on B)']);
    host('B').mode = 'old';
    await expect(fork()).rejects.toMatchObject({ code: 'CONFLICT', message: 'VM job-3 is running on B' });
  });

  test('are not waited for if a peer is away', async () => {
    host('B').mode = 'away';
    host('C').mode = 'away';
    expect((await fork()).get('job-1')).toBe(0);
    expect(await host('A').names.namesElsewhere(CLONES)).toEqual([]);
  });

  test('that two hosts start at once are seen by each other', async () => {
    const ends = await Promise.allSettled(
      ['A', 'B'].map((name) => host(name).names.guardClones(CLONES, async () => name)),
    );
    expect(ends.filter(({ status }) => status === 'fulfilled').length).toBeLessThanOrEqual(1);
    await fork();
  });
});
