/**
 * Disks of a fork on two hosts (test/hosts/agent-pair.ts): the clones of both have overlays on the file that the parent
 * has left at the fork point.
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { MigrationError } from '../../../src/domain/errors.js';
import type { DiskAccess } from '../../../src/domain/fork.js';
import type { DiskFormat, VmState } from '../../../src/domain/vm.js';
import type { PrepareForkRequest } from '../../../src/engine/ports/fork.js';
import { findByArgument, type ProcessIdentity } from '../../../src/kit/process.js';
import { type AgentHost, AgentPair } from '../../hosts/agent-pair.js';
import { eventually } from '../../hosts/cluster.js';
import { byteAt, diskContent, latestNumber, writeDisk } from '../../hosts/disk-content.js';
import { forkRequest } from '../../hosts/fork-host.js';

const FILL_MS = 60_000;
const WRITES_MS = 120_000;
const APPEND = 'console=ttyS0 quiet no_timer_check vmg.workload=idle vmg.mb=16 vmg.disk=vda';
/** Where the disk has bytes that no guest writes, and what they are before the fork. */
const [MARK_MIB, MARK] = [32, 0x5a];
const OWN_MIB = 40;
/** What the parent writes there after the clones have been started. */
const [LATE_MIB, LATE] = [48, 0x6b];

let pair: AgentPair;

beforeAll(async () => {
  pair = await AgentPair.start();
});
afterEach(() => pair.clear());
afterAll(() => pair.end());

const code = (expected: string) => expect.objectContaining({ code: expected });
const hashOf = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');
const contentOf = (host: AgentHost, vm: string) => diskContent(host.vms.get(vm), 'disk0');
const overlaysOf = (path: string) => readdirSync(dirname(path)).filter((name) => name.startsWith(`${basename(path)}.`));

function makeDisk(name: string, format: DiskFormat): string {
  const path = join(pair.directory, `${name}.${format}`);
  execFileSync('qemu-img', ['create', '-q', '-f', format, path, '64M']);
  execFileSync('qemu-io', ['-f', format, '-c', `write -P ${MARK} ${MARK_MIB}M 64k`, path]);
  return path;
}

async function boot(name: string, disks: readonly object[]): Promise<void> {
  await pair.boot({ name, extra: { disks, append: APPEND } });
  await writes(pair.a, name);
}

async function writes(host: AgentHost, vm: string): Promise<void> {
  const count = async () => [...(await host.serial(vm)).matchAll(/VMG DISK n=/g)].length;
  const before = await count();
  await eventually(`${vm} writes to its disk`, WRITES_MS, async () =>
    (await count()) >= before + 2 ? true : undefined,
  );
  expect(await host.serial(vm)).not.toMatch(/VMG ERROR/);
}

/** The requests of a fork with one clone on A and two on B. */
async function requestsOf(
  vm: string,
  access: DiskAccess,
  change: Partial<PrepareForkRequest> = {},
): Promise<{ root: PrepareForkRequest; joining: PrepareForkRequest }> {
  const request = forkRequest(vm, { cloneCount: 3, ...change });
  const { spec, accel, qemuVersion } = pair.a.vms.get(vm);
  const disks = spec.disks.map(({ id }) => ({ id, access }));
  const allocatedBytes = spec.memory.sizeBytes;
  const origin = { host: 'A', image: request.fork, spec, accel, qemuVersion, allocatedBytes, disks };
  return {
    root: { ...request, share: { first: 0, count: 1 } },
    joining: { ...request, vm: null, share: { first: 1, count: 2 }, origin },
  };
}

type Requests = Awaited<ReturnType<typeof requestsOf>>;

async function prepare({ root, joining }: Requests): Promise<string> {
  const { a, b } = pair;
  await a.agent.source.reserve(root.vm ?? '', root.job);
  await Promise.all([a.agent.forks.prepareClones(root), b.agent.forks.prepareClones(joining)]);
  await a.agent.forks.armParent(root.fork);
  await b.agent.forks.connectImage(root.fork, 'tcp');
  return root.fork;
}

async function upToLoad(requests: Requests): Promise<string> {
  await prepare(requests);
  return fromPrepared(requests);
}

async function fromPrepared({ root: { fork } }: Requests): Promise<string> {
  const { a, b } = pair;
  await a.agent.forks.forkPoint(fork);
  await a.agent.forks.sendForkState(fork, 'B');
  await Promise.all([a.agent.forks.loadClones(fork), b.agent.forks.loadClones(fork)]);
  return fork;
}

async function fromCommit({ root }: Requests): Promise<void> {
  const hosts = [pair.a, pair.b];
  for (const { agent } of hosts) await agent.forks.commitFork(root.fork);
  const outcomes = await Promise.all(hosts.map(({ agent }) => agent.forks.runClones(root.fork)));
  expect(outcomes.flatMap(({ failures }) => failures)).toEqual([]);
  for (const { agent } of hosts.toReversed()) {
    await eventually('the image is complete', FILL_MS, async () => {
      const { state } = await agent.forks.forkProgress(root.fork);
      return state === 'complete' ? true : undefined;
    });
  }
  for (const { agent } of hosts.toReversed()) await agent.forks.finishFork(root.fork);
  await pair.a.agent.source.unreserve(root.vm ?? '', root.job);
}

/** The host that joined hears of it last. Its clones have loaded the state, and leave the parent its file. */
async function undo({ root }: Requests): Promise<void> {
  await pair.a.agent.forks.discardFork(root.fork);
  await pair.b.agent.forks.discardFork(root.fork);
  await pair.a.agent.source.unreserve(root.vm ?? '', root.job);
}

/** The processes that serve the disks of an image. */
async function exportsOf(image: string): Promise<readonly ProcessIdentity[]> {
  const socket = join(pair.directory, 'A', 'disk-server', `${image}.sock`);
  return findByArgument(`addr.type=unix,addr.path=${socket},max-connections=0`);
}

function clonesOn(host: AgentHost, states: readonly VmState[] = ['running']): string[] {
  return host.vms.list().flatMap(({ name, state }) => (name.includes('-') && states.includes(state) ? [name] : []));
}

const removal = { isForced: false, isDroppingSaved: false };

/** Each access to a disk meets both formats: one on the disk that is written to, the other on the one that is not. */
const FORMATS = { shared: ['qcow2', 'raw'], served: ['raw', 'qcow2'] } as const;

async function bootWithDisks(access: DiskAccess): Promise<{ base: string; media: string; format: DiskFormat }> {
  const [format, ofMedia] = FORMATS[access];
  const base = makeDisk(`base-${access}`, format);
  const media = makeDisk(`media-${access}`, ofMedia);
  await boot('web', [
    { path: base, format },
    { path: media, format: ofMedia, readOnly: true },
  ]);
  return { base, media, format };
}

describe('a disk that both hosts see', () => {
  test('is the parent’s alone again when a fork is undone, and the base of the clones of both by another', async () => {
    const { a, b } = pair;
    const { base, media, format } = await bootWithDisks('shared');
    const undone = await requestsOf('web', 'shared');
    await upToLoad(undone);
    await writes(a, 'web');
    await undo(undone);
    expect(a.vms.get('web').spec.disks[0]).toMatchObject({ path: base, format });
    expect([overlaysOf(base), b.vms.list(), b.agent.images.list()]).toEqual([[], [], []]);
    const before = latestNumber(readRaw(base, format));
    await writes(a, 'web');
    await eventually('its writes reach the file', WRITES_MS, () =>
      latestNumber(readRaw(base, format)) > before ? true : undefined,
    );

    const requests = await requestsOf('web', 'shared');
    const image = await upToLoad(requests);
    await fromCommit(requests);
    const hash = hashOf(base);
    const vms = [[a, 'web'] as const, ...clonesOn(a).map((name) => [a, name] as const)];
    vms.push(...clonesOn(b).map((name) => [b, name] as const));
    expect(vms).toHaveLength(4);
    const atFork = latestNumber(readRaw(base, format));
    expect(atFork).toBeGreaterThan(0);
    for (const [index, [host, name]] of vms.entries())
      await writeDisk(host.vms.get(name), 'disk0', 0xa0 + index, OWN_MIB);
    for (const [host, name] of vms) await writes(host, name);
    for (const [index, [host, name]] of vms.entries()) {
      const content = await contentOf(host, name);
      expect([name, byteAt(content, MARK_MIB), byteAt(content, OWN_MIB)]).toEqual([name, MARK, 0xa0 + index]);
      expect(latestNumber(content)).toBeGreaterThan(atFork);
      expect(host.vms.get(name).spec.disks[1]?.path).toBe(media);
    }
    expect(hashOf(base)).toBe(hash);
    expect(b.agent.images.find(image).disks).toEqual([base, media]);

    // What the joined host has is not its own to remove, and keeps what the other has.
    for (const name of clonesOn(a)) await a.vms.stop(name, { isForced: true });
    const [first, last] = clonesOn(b);
    await b.vms.stop(first ?? '', { isForced: true });
    const kept = await a.agent.images.remove(image, removal);
    expect(kept.keptLayers).toMatchObject([{ reason: expect.stringContaining('on B') }, { path: base }]);
    expect(await a.agent.images.flatten('web')).toMatchObject({ mergedDisks: [], keptLayers: [{ path: base }] });
    await writes(b, last ?? '');
    await b.vms.stop(last ?? '', { isForced: true });
    expect(await b.agent.images.remove(image, removal)).toMatchObject({ mergedDisks: [], keptLayers: [] });
    expect(hashOf(base)).toBe(hash);
    expect(overlaysOf(base)).toHaveLength(1);
    expect((await a.agent.images.remove(image, removal)).mergedDisks).toHaveLength(1);
    expect([a.vms.get('web').spec.disks[0]?.path, overlaysOf(base)]).toEqual([base, []]);
    await writes(a, 'web');
    const after = await contentOf(a, 'web');
    expect([byteAt(after, MARK_MIB), byteAt(after, OWN_MIB)]).toEqual([MARK, 0xa0]);
  });
});

describe('a disk that only the parent’s host sees', () => {
  test('is the parent’s alone again when a fork is undone, and served as of the fork point of another', async () => {
    const { a, b } = pair;
    const { base, media, format } = await bootWithDisks('served');
    const undone = await requestsOf('web', 'served');
    const undoneImage = await upToLoad(undone);
    await undo(undone);
    expect(a.vms.get('web').spec.disks[0]).toMatchObject({ path: base, format });
    expect([overlaysOf(base), b.vms.list(), b.agent.images.list()]).toEqual([[], [], []]);
    expect(await exportsOf(undoneImage)).toEqual([]);

    const requests = await requestsOf('web', 'served');
    await prepare(requests);
    // What it writes now, after the clones of B have been started, is in the image.
    await writes(a, 'web');
    await writeDisk(a.vms.get('web'), 'disk0', LATE, LATE_MIB);
    const image = await fromPrepared(requests);
    await fromCommit(requests);
    const hash = hashOf(base);
    const atFork = latestNumber(readRaw(base, format));
    await writeDisk(a.vms.get('web'), 'disk0', 0xa0, LATE_MIB);
    const clones = clonesOn(b);
    expect(clones).toHaveLength(2);
    for (const [index, name] of clones.entries()) {
      const vm = b.vms.get(name);
      expect([await vm.process.disks.isOpen(base), await vm.process.disks.isOpen(media)]).toEqual([false, false]);
      expect(vm.spec.disks.map(({ served }) => served)).toEqual([
        { host: 'A', image },
        { host: 'A', image },
      ]);
      await writeDisk(vm, 'disk0', 0xb0 + index, OWN_MIB);
    }
    for (const name of clones) await writes(b, name);
    await writes(a, 'web');
    for (const [index, name] of clones.entries()) {
      const content = await contentOf(b, name);
      const bytes = [MARK_MIB, LATE_MIB, OWN_MIB].map((offsetMiB) => byteAt(content, offsetMiB));
      expect([name, ...bytes]).toEqual([name, MARK, LATE, 0xb0 + index]);
      expect(latestNumber(content)).toBeGreaterThan(atFork);
      expect(byteAt(await diskContent(b.vms.get(name), 'disk1'), MARK_MIB)).toBe(MARK);
    }
    expect(hashOf(base)).toBe(hash);

    for (const name of clonesOn(a)) await a.vms.stop(name, { isForced: true });
    const kept = await a.agent.images.remove(image, removal);
    expect(kept.keptLayers[0]?.reason).toContain('on B');
    await expect(b.agent.images.remove(image, removal)).rejects.toThrow(code('CONFLICT'));
    // Its record is enough to serve the disk.
    for (const name of clones) await writes(b, name);
    await expect(b.agent.images.save(image, join(pair.directory, 'b.image'))).rejects.toThrow(code('UNSUPPORTED'));

    const request = forkRequest(null, { image, cloneCount: 1, namePrefix: 'later' });
    await b.agent.forks.prepareClones(request);
    expect(b.vms.get('later-0').spec.disks[0]?.served).toEqual({ host: 'A', image });
    await b.agent.forks.discardFork(request.fork);

    for (const name of clones) await b.vms.stop(name, { isForced: true });
    expect(await b.agent.images.remove(image, removal)).toMatchObject({ mergedDisks: [], keptLayers: [] });
    expect((await a.agent.images.remove(image, removal)).mergedDisks).toHaveLength(1);
    expect([a.vms.get('web').spec.disks[0]?.path, overlaysOf(base)]).toEqual([base, []]);
    await writes(a, 'web');
    expect(await exportsOf(image)).toEqual([]);
  });
});

test('clones of a stopped parent go on when a daemon ends, and wait for a host that does not answer', async () => {
  const { a, b } = pair;
  const base = makeDisk('lasting', 'qcow2');
  await boot('web', [{ path: base }]);
  const undone = await requestsOf('web', 'served', { parentMode: 'stop' });
  await upToLoad(undone);
  await undo(undone);
  expect([overlaysOf(base), b.agent.images.list()]).toEqual([[], []]);
  await writes(a, 'web');
  const requests = await requestsOf('web', 'served', { parentMode: 'stop' });
  const image = await upToLoad(requests);
  await fromCommit(requests);
  const hash = hashOf(base);
  const [name = ''] = clonesOn(b);
  const kill = async () => {
    for (const { pid } of await exportsOf(image)) process.kill(pid, 'SIGKILL');
  };
  // None has been needed before the first read.
  await eventually('the disk is served', WRITES_MS, async () =>
    (await exportsOf(image)).length > 0 ? true : undefined,
  );
  await kill();
  await writes(b, name);
  await a.restart();
  await writes(b, name);
  await b.restart();
  await writes(b, name);

  // The host does not answer: the clone stands still at its next read.
  pair.onOpenDisk = () => {
    throw new MigrationError('UNREACHABLE', 'A has no power');
  };
  await kill();
  await eventually('the clone says why it stands still', WRITES_MS, () => {
    const notice = b.agent.userVms.find(name).notice ?? '';
    return notice.includes('reads disk disk0 from A') && notice.includes('A has no power') ? true : undefined;
  });
  expect(b.vms.get(name).state).toBe('paused');
  pair.onOpenDisk = () => undefined;
  await writes(b, name);
  expect(b.agent.userVms.find(name).notice).toBeUndefined();
  const content = await contentOf(b, name);
  expect([byteAt(content, MARK_MIB), latestNumber(content) > 0]).toEqual([MARK, true]);

  for (const host of [b, a]) {
    // Another one than `name` may still wait for its next read.
    for (const clone of clonesOn(host, ['running', 'paused'])) await host.vms.stop(clone, { isForced: true });
    expect(await host.agent.images.remove(image, removal)).toMatchObject({ mergedDisks: [], keptLayers: [] });
  }
  expect([hashOf(base), await exportsOf(image), a.vms.get('web').state]).toEqual([hash, [], 'stopped']);
});

test('a host that was told of another disk than the image has does not join', async () => {
  const base = makeDisk('planned', 'qcow2');
  const other = makeDisk('other', 'qcow2');
  await boot('web', [{ path: base }]);
  const { root, joining } = await requestsOf('web', 'shared');
  const { origin } = joining;
  if (origin === undefined) throw new Error('the request has no origin');
  const spec = { ...origin.spec, disks: origin.spec.disks.map((disk) => ({ ...disk, path: other })) };
  const requests = { root, joining: { ...joining, origin: { ...origin, spec } } };
  await expect(prepare(requests)).rejects.toThrow(code('CONFLICT'));
  await undo(requests);
  expect(overlaysOf(base)).toEqual([]);

  const { disks: _, ...untold } = origin;
  const request = { ...joining, fork: '00000000000000aa', origin: { ...untold, image: '00000000000000aa' } };
  await expect(pair.b.agent.forks.prepareClones(request)).rejects.toThrow(code('UNSUPPORTED'));
  // What lies in the directory of the image's disks goes with the image.
  const { fork } = request;
  const own = join(pair.directory, 'B', 'images', `${fork}.disks`, '0-0.qcow2');
  const within = { ...spec, disks: spec.disks.map((disk) => ({ ...disk, path: own })) };
  const risky = { ...request, origin: { ...origin, image: fork, spec: within } };
  await expect(pair.b.agent.forks.prepareClones(risky)).rejects.toThrow(code('UNSUPPORTED'));
  expect(existsSync(base)).toBe(true);
});

function readRaw(path: string, format: DiskFormat): Buffer {
  const raw = join(pair.directory, 'read.raw');
  execFileSync('qemu-img', ['convert', '-U', '-f', format, '-O', 'raw', path, raw]);
  return readFileSync(raw);
}
