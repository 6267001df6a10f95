import { statSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { TargetSessionHandle } from '../../src/native/types.js';
import { expectToWait, openSource, Scene, until } from '../support/fake-vm.js';

const binding = loadNativeBinding();
let scene: Scene;

beforeEach(() => {
  scene = new Scene();
});
afterEach(async () => {
  await scene.dispose();
});

describe.each(['tcp', 'shm'] as const)('over %s', (transport) => {
  test('every byte of two regions arrives, holes are not fetched, and the finished session costs nothing', async () => {
    const lengthsMiB = [96, 160];
    const source = await scene.filledRegions('source', lengthsMiB);
    const { regions, memory, vm, edges: vmEdges } = await scene.incomingVm(binding, lengthsMiB, 2);
    expect(memory.snapshot()).toMatchObject({ state: 'complete', pid: vm.pid });
    await until('an edge of the VM', () => vmEdges.count > 0);

    const { listener, session, address } = await openSource(binding, scene, transport, source);
    let edges = 0;
    const target = binding.openTargetSession(memory, {
      regions: scene.withPresence(regions),
      bandwidthBytesPerS: 0,
      isResume: false,
      onEdge: () => edges++,
    });
    expect(target.snapshot().state).toBe('idle');
    await target.connect(address, 5000);
    session.scan();
    target.start();
    expect(await vm.badPages(regions)).toEqual([0, 0]);
    await until('complete', () => target.snapshot().state === 'complete');
    await until('an edge', () => edges > 0);
    expect(edges).toBeLessThan(10);

    const { counters, failure } = target.snapshot();
    const pageCount = (256n << 20n) / 4096n;
    expect(failure).toBeNull();
    expect(counters.pageCount).toBe(pageCount);
    expect(counters.pagesPresent + counters.pagesZero).toBe(pageCount);
    // A hole that faulted before the data map was ready has been fetched like any page.
    expect(counters.pagesZero).toBeLessThanOrEqual(pageCount / 4n);
    expect(counters.pagesZero).toBeGreaterThan(pageCount / 8n);
    expect(counters.demandBytes + counters.prefetchBytes).toBe(counters.pagesPresent * 4096n);
    expect(counters.faultCount).toBeGreaterThan(0n);
    const sourceCounters = session.snapshot().counters;
    const dataPages = (pageCount * 3n) / 4n;
    if (transport === 'tcp') expect(sourceCounters.dataPages).toBe(dataPages);
    // Over shm the target reads by itself, so the source counts nothing. The target reads through a mapping, which
    // fills a hole that faulted before the source has scanned for data.
    expect(sourceCounters.dataPages).toBeGreaterThanOrEqual(dataPages);
    expect(sourceCounters.dataPages).toBeLessThanOrEqual(counters.pagesPresent);
    const fetchedBytes = counters.demandBytes + counters.prefetchBytes;
    if (transport === 'tcp') expect(sourceCounters.readBytes).toBeGreaterThanOrEqual(fetchedBytes);

    // Nothing is registered any more. The bytes are read again after all sessions have closed.
    await target.close();
    await session.close();
    listener.close();
    memory.close();
    expect(await vm.badPages(regions)).toEqual([0, 0]);
  });

  test('a lost source makes the faults wait; a new one finishes the work', async () => {
    const source = await scene.filledRegions('source', [32]);
    const { regions, memory, vm } = await scene.incomingVm(binding, [32]);
    const first = await openSource(binding, scene, transport, source);
    const target = open(memory, regions, 4 << 20);
    await target.connect(first.address, 5000);
    first.session.scan();
    target.start();
    await until('some pages', () => target.snapshot().counters.pagesPresent > 100n);
    await first.session.close();
    first.listener.close();
    await until('disconnected', () => target.snapshot().state === 'disconnected');
    const verified = vm.badPages(regions);
    await expectToWait(verified);

    const second = await openSource(binding, scene, transport, source);
    second.session.scan();
    await target.connect(second.address, 5000);
    expect(await verified).toEqual([0]);
    expect(target.snapshot().counters.reconnectCount).toBe(1n);
    await target.close();
    await second.session.close();
    second.listener.close();
    memory.close();
  });

  test('the VM that dies in the middle ends the session, not the process', async () => {
    const source = await scene.filledRegions('source', [32]);
    const { regions, memory, vm } = await scene.incomingVm(binding, [32]);
    const { listener, session, address } = await openSource(binding, scene, transport, source);
    const target = open(memory, regions, 2 << 20);
    await target.connect(address, 5000);
    session.scan();
    target.start();
    await until('some pages', () => target.snapshot().counters.pagesPresent > 100n);
    await vm.kill();
    await until('the VM is gone', () => memory.snapshot().state === 'gone');
    await until('failed', () => target.snapshot().state === 'failed');
    expect(target.snapshot().failure).toMatchObject({ code: 14 });
    await target.close();
    expect(target.snapshot().state).toBe('closed');
    await session.close();
    listener.close();
    memory.close();
  });

  test('what a peer may not do is refused by its name', async () => {
    const source = await scene.filledRegions('source', [4]);
    const { regions, memory } = await scene.incomingVm(binding, [4]);
    const { listener, session, address } = await openSource(binding, scene, transport, source);
    const target = open(memory, regions, 0);
    const codeOf = async (changed: Partial<typeof address>) =>
      target.connect({ ...address, ...changed }, 3000).then(
        () => 'connected',
        (error: unknown) => (error as { code: string }).code,
      );
    expect(await codeOf({ token: 'f'.repeat(64) })).toBe('UNAUTHENTICATED');
    expect(await codeOf({ session: '0'.repeat(32) })).toBe('UNAUTHENTICATED');
    expect(await codeOf({ keys: [] })).toBe('PEER_PROTOCOL');
    expect(await codeOf({ keys: [...address.keys, ...address.keys] })).toBe('PEER_PROTOCOL');
    const good = address.keys[0]!;
    for (const ram of ['', 'zz'.repeat(24), `${good.ram}0`, good.ram.slice(1), good.ram.toUpperCase() + 'X']) {
      expect(await codeOf({ keys: [{ ...good, ram }] })).toBe('PEER_PROTOCOL');
    }
    // A region of another length does not belong to this VM.
    const longer = `${good.ram.slice(0, 32)}${'0'.repeat(8)}ffff0000`;
    expect(await codeOf({ keys: [{ ...good, ram: longer }] })).not.toBe('connected');
    expect(target.snapshot().state).toBe('idle');
    const both = [target.connect(address, 3000), codeOf({})];
    expect(await both[1]).toBe('CONFLICT');
    await both[0];
    expect(session.snapshot().counters.rejectedHellos).toBeGreaterThanOrEqual(2n);
    await target.close();
    expect(await codeOf({})).toBe('CONFLICT');
    await session.close();
    listener.close();
    expect(statSync(source[0]!.path).size).toBe(4 << 20);
    memory.close();
  });
});

function open(
  memory: Parameters<typeof binding.openTargetSession>[0],
  regions: Parameters<Scene['withPresence']>[0],
  bandwidthBytesPerS: number,
): TargetSessionHandle {
  return binding.openTargetSession(memory, {
    regions: scene.withPresence(regions),
    bandwidthBytesPerS,
    isResume: false,
    onEdge: () => undefined,
  });
}
