/**
 * Handles may be closed, dropped or abandoned in any order, at any moment, and in every way in which a process or
 * thread can end.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { loadNativeBinding } from '../../src/native/binding.js';
import type { RegionFile, SourceAddress, VmMemorySnapshot } from '../../src/native/types.js';
import { expectToWait, FakeVm, openSource, Scene, until } from '../support/fake-vm.js';

const childProgram = fileURLToPath(new URL('../support/addon-child.ts', import.meta.url));
const binding = loadNativeBinding();
const lengthMiB = 32;
/** The page before the last page. It is a hole, and the sweep reaches it last. */
const touchLastDataPage = `touch 0 ${(lengthMiB << 20) - 2 * 4096}`;
let scene: Scene;

beforeEach(() => {
  scene = new Scene();
});
afterEach(async () => {
  await scene.dispose();
});

class Child {
  readonly lines: string[] = [];
  readonly exited: Promise<{ code: number | null; signal: string | null }>;
  readonly #process: ChildProcess;

  constructor(mode: string, address: SourceAddress) {
    const input = JSON.stringify({ scene: scene.directory, address, lengthMiB });
    this.#process = spawn(process.execPath, ['--expose-gc', '--import', 'tsx', childProgram, mode, input], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    createInterface({ input: this.#process.stdout! }).on('line', (line) => this.lines.push(line));
    // The exit itself is too early, because the last output may still be in the pipe.
    this.exited = new Promise((resolve) => this.#process.once('close', (code, signal) => resolve({ code, signal })));
    scene.later(() => this.#process.kill('SIGKILL'));
  }

  async line(start: string): Promise<string> {
    await until(`the child's '${start}'`, () => this.lines.some((line) => line.startsWith(start)));
    return this.lines.find((line) => line.startsWith(start)) ?? '';
  }

  async kill(): Promise<void> {
    this.#process.kill('SIGKILL');
    await this.exited;
  }
}

/**
 * The source is in this process, the target's daemon in a child, and the VM beside that child, so it outlives the
 * child.
 */
async function daemon(mode: string) {
  const sourceRegions = await scene.filledRegions('source', [lengthMiB]);
  const source = await openSource(binding, scene, 'tcp', sourceRegions);
  scene.later(async () => {
    await source.session.close();
    source.listener.close();
  });
  source.session.scan();
  const regions: RegionFile[] = scene.regions('target', [lengthMiB]);
  const child = new Child(mode, source.address);
  await child.line('listening');
  const vm = FakeVm.withPreload(scene.path('preload.sock'), regions);
  scene.later(async () => vm.kill());
  expect(await vm.mapAll(regions)).toEqual(['mapped 0']);
  const ready = await child.line('ready ');
  const snapshot = JSON.parse(ready.slice('ready '.length), (_, value: unknown) =>
    typeof value === 'string' && /^\d+n$/.test(value) ? BigInt(value.slice(0, -1)) : value,
  ) as VmMemorySnapshot;
  return { source, regions, child, vm, snapshot };
}

async function localSession() {
  const sourceRegions = await scene.filledRegions('source', [lengthMiB]);
  const source = await openSource(binding, scene, 'tcp', sourceRegions);
  const { regions, memory, vm } = await scene.incomingVm(binding, [lengthMiB]);
  const target = binding.openTargetSession(memory, {
    regions: scene.withPresence(regions),
    bandwidthBytesPerS: 2 << 20,
    isResume: false,
    onEdge: () => undefined,
  });
  await target.connect(source.address, 5000);
  source.session.scan();
  target.start();
  await until('some pages', () => target.snapshot().counters.pagesPresent > 50n);
  return { source, memory, vm, target, regions };
}

describe('explicit close', () => {
  test('a target session may be closed in the middle, twice, and at the same time', async () => {
    const { source, memory, vm, target } = await localSession();
    await Promise.all([target.close(), target.close()]);
    await target.close();
    const { state, counters } = target.snapshot();
    expect(state).toBe('closed');
    expect(counters.pagesPresent).toBeGreaterThan(50n);
    expect(() => target.start()).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
    await expectToWait(vm.ask(touchLastDataPage));
    await Promise.all([source.session.close(), source.session.close()]);
    await source.session.close();
    expect(source.session.snapshot().counters.readCount).toBeGreaterThan(0n);
    expect(() => source.session.scan()).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
    source.listener.close();
    source.listener.close();
    memory.close();
    memory.close();
    expect(() => memory.snapshot()).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
  });

  test('what others stand on refuses to be closed', async () => {
    const { source, memory, target } = await localSession();
    expect(() => memory.close()).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
    expect(() => source.listener.close()).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
    const closing = target.close();
    expect(() => memory.close()).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
    await closing;
    memory.close();
    await source.session.close();
    source.listener.close();
  });

  test('a session that is closed while it connects settles both promises', async () => {
    const { source, memory, target } = await localSession();
    await source.session.close();
    await until('disconnected', () => target.snapshot().state === 'disconnected');
    const connecting = target.connect(source.address, 3000).then(
      () => 'connected',
      (error: unknown) => (error as { code: string }).code,
    );
    await target.close();
    expect(await connecting).toBe('UNAUTHENTICATED');
    memory.close();
    source.listener.close();
  });

  test('a closed VM is not a base for a session', async () => {
    const { regions, memory } = await scene.incomingVm(binding, [2]);
    memory.close();
    const options = {
      regions: scene.withPresence(regions),
      bandwidthBytesPerS: 0,
      isResume: false,
      onEdge: () => undefined,
    };
    expect(() => binding.openTargetSession(memory, options)).toThrow(expect.objectContaining({ code: 'CONFLICT' }));
  });
});

describe('the end of a process or thread', () => {
  test.each([
    ['exit', 7],
    ['end', 0],
    ['exit-connecting', 7],
    ['collect', 0],
    ['worker', 0],
    ['worker-exit-connecting', 0],
  ])('%s: with everything open, code %i and no crash', async (mode, code) => {
    const { child, vm } = await daemon(mode);
    expect(await child.exited).toEqual({ code, signal: null });
    if (mode === 'collect') expect(child.lines).toContain('collected');
    if (mode === 'worker') expect(child.lines).toContain('worker ended true');
    if (mode === 'worker-exit-connecting') expect(child.lines).toContain('worker ended 7');
    // The guest waits for a page that never arrives. It never reads a zero.
    await expectToWait(vm.ask(touchLastDataPage));
  });

  test('a killed daemon loses no page: the next one takes the VM back and finishes', async () => {
    const { source, regions, child, vm, snapshot } = await daemon('run');
    const verified = vm.badPages(regions);
    await child.kill();
    await expectToWait(verified);

    const memory = binding.adoptVm({ snapshot, regions });
    expect(memory.snapshot()).toMatchObject({ state: 'complete', pid: vm.pid });
    const target = binding.openTargetSession(memory, {
      regions: scene.withPresence(regions),
      bandwidthBytesPerS: 0,
      isResume: true,
      onEdge: () => undefined,
    });
    expect(target.snapshot().counters.pagesPresent).toBeGreaterThan(100n);
    await target.connect(source.address, 5000);
    target.start();
    expect(await verified).toEqual([0]);
    await until('complete', () => target.snapshot().state === 'complete');
    await target.close();
    memory.close();
    expect(await vm.badPages(regions)).toEqual([0]);
    await vm.kill();
    expect(() => binding.adoptVm({ snapshot, regions })).toThrow(expect.objectContaining({ code: 'QEMU_GONE' }));
  });
});
