/**
 * Copy-on-write clones that leave their host: real QEMU guests that check themselves, and two agents without daemons
 * (test/hosts/agent-pair.ts). All clones are of one fork. Whatever happens to one of them, its parent and the other
 * clones must not notice.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import {
  AgentPair,
  commit,
  drained,
  type Move,
  moveByPostcopy,
  prepareRequest,
  stopAndTransfer,
  upToConnect,
} from '../hosts/agent-pair.js';
import { eventually } from '../hosts/cluster.js';
import { forkOn, forkRequest } from '../hosts/fork-host.js';
import { qmpOf } from '../hosts/qmp.js';

const PARENT = 'parent';
/** Slow enough that pages are still missing when something happens to the source. */
const SLOW_BYTES_PER_S = 8 << 20;

let pair: AgentPair;
let image: string;

beforeAll(async () => {
  pair = await AgentPair.start();
  await pair.boot({ name: PARENT, memoryMiB: 128, touchMiB: 24, writePercent: 50 });
  ({ image } = await forkOn(pair.a, forkRequest(PARENT, { cloneCount: 5, namePrefix: 'c' })));
  // Each clone has pages of its own by then. Clones that are not checked leave the processors to the others.
  for (const { name } of pair.a.vms.list()) {
    await pair.a.goesOn(name, 2);
    await pair.a.vms.pause(name);
  }
});
afterAll(() => pair?.end());

const code = (expected: string) => expect.objectContaining({ code: expected });
const ownFile = (vm: string): string => join(pair.a.ramDir, vm, 'ram0.own');

async function expectClean(host: AgentPair['a'], vm: string): Promise<void> {
  const { pages, bad } = await host.verify(vm);
  expect(pages).toBeGreaterThan(0);
  expect(bad).toBe(0);
  expect(await host.serial(vm)).not.toMatch(/VMG BAD/);
}

/** The clone is moving: it runs on B, with most of its pages still on the source. */
async function departed(vm: string): Promise<Move> {
  const { a, b } = pair;
  await a.vms.resume(vm);
  const move = pair.move(vm);
  const { session, token, transport } = move;
  await a.agent.source.reserve(vm, move.job);
  await b.agent.target.prepare({ ...(await prepareRequest(move)), bandwidthBytesPerS: SLOW_BYTES_PER_S });
  await b.agent.target.connect(session, await a.agent.source.expose({ session, vm, token, transport, target: 'B' }));
  await stopAndTransfer(move);
  await b.agent.target.resume(session, await commit(move));
  return move;
}

async function allPagesKept({ session }: Move): Promise<void> {
  await eventually('its own pages are in a file', 60_000, async () => {
    const { ownPages, ownPagesKept } = await pair.a.agent.source.sourceCounters(session);
    return ownPages !== undefined && ownPages > 0 && ownPagesKept === ownPages ? true : undefined;
  });
}

async function finished(move: Move): Promise<void> {
  await drained(move);
  await pair.a.agent.source.release(move.vm, move.session);
  await pair.b.agent.target.finish(move.session);
}

/** Checks that the clone has everything that it needs on B, and that nothing of it is left on A. */
async function expectArrived(vm: string): Promise<void> {
  const { a, b } = pair;
  await b.goesOn(vm, 1);
  await expectClean(b, vm);
  expect(a.vms.has(vm)).toBe(false);
  expect(a.traces(vm)).toEqual([]);
  expect(a.agent.images.find(image).clones).not.toContain(vm);
  expect(b.vms.view(b.vms.get(vm))).toMatchObject({ state: 'running', image: null, identityIssue: null });
}

async function removed(vm: string): Promise<void> {
  await pair.b.vms.stop(vm, { isForced: true });
  await pair.b.vms.stop(vm, { isForced: true });
}

test('it arrives as an ordinary VM, and goes back as one', async () => {
  const { a, b } = pair;
  await a.vms.resume('c-0');
  const { image: use, identityIssue, fleetingDisks } = await a.agent.inventory.vmInventory('c-0');
  expect(use).toMatchObject({ id: image, isComplete: true });
  expect(use?.ownBytes).toBeGreaterThan(1 << 20);
  expect([identityIssue, fleetingDisks]).toEqual([null, []]);
  const move = pair.move('c-0');
  const { progress } = await moveByPostcopy(move);
  expect(progress.counters['pagesZero']).toBeGreaterThan(0);
  expect(b.vms.get('c-0').spec).toMatchObject({ memory: { backing: 'shared' }, clone: { index: 0, cloneCount: 5 } });
  await expectArrived('c-0');
  const back = pair.move('c-0', { from: b, to: a });
  await moveByPostcopy(back);
  await expectClean(a, 'c-0');
  expect(a.agent.images.find(image).clones).not.toContain('c-0');
  await a.vms.stop('c-0', { isForced: true });
});

test('undone before the commit it runs on where it was, on its image, and can go later', async () => {
  const { a, b } = pair;
  await a.vms.resume('c-1');
  const move = pair.move('c-1');
  await upToConnect(move);
  await stopAndTransfer(move);
  await allPagesKept(move);
  expect(existsSync(ownFile('c-1'))).toBe(true);
  await a.agent.source.continueVm('c-1', move.session);
  await b.agent.target.discard(move.session);
  await a.agent.source.unexpose(move.session);
  await a.agent.source.unreserve('c-1', move.job);
  expect(existsSync(ownFile('c-1'))).toBe(false);
  await a.goesOn('c-1', 2);
  expect(a.agent.images.find(image).clones).toContain('c-1');
  await moveByPostcopy(pair.move('c-1'));
  await expectArrived('c-1');
  await removed('c-1');
});

test('a restarted source continues from the process, or, if that has ended, from the pages saved of it', async () => {
  const { a, b } = pair;
  const move = await departed('c-2');
  const { session, token, transport, vm } = move;
  await a.restart();
  expect(a.vms.get(vm).state).toBe('departed');
  await expect(a.agent.images.remove(image)).rejects.toEqual(code('CONFLICT'));
  const reconnect = async () => {
    await eventually('the target notices', 60_000, async () =>
      ['disconnected', 'failed'].includes((await b.agent.target.progress(session)).state) ? true : undefined,
    );
    await b.agent.target.reconnect(
      session,
      await a.agent.source.expose({ session, vm, token, transport, target: 'B' }),
    );
  };
  await reconnect();
  await allPagesKept(move);
  process.kill(a.vms.get(vm).pid, 'SIGKILL');
  await eventually('the end of QEMU is noticed', 60_000, () => (a.vms.exitOf(vm) === null ? undefined : true));
  const { pagesPresent, pagesTotal } = await b.agent.target.progress(session);
  expect(pagesPresent).toBeLessThan(pagesTotal);
  await a.restart();
  await reconnect();
  await finished(move);
  await expectArrived(vm);
  await removed(vm);
});

test("QEMU's own migration brings it too, as an ordinary VM", async () => {
  const { a, b } = pair;
  await a.vms.resume('c-3');
  const move = pair.move('c-3', { mode: 'native-precopy' });
  const { session } = move;
  await b.agent.target.prepare(await prepareRequest(move));
  const options = { target: 'B', bandwidthBytesPerS: 0, downtimeMsMax: 2000, isPostcopy: false };
  // The VM is stopped, because this does not test QEMU's pre-copy of a busy guest under TCG.
  await qmpOf(a.vms.get('c-3')).execute('stop');
  await a.agent.source.nativeMigrate('c-3', session, options);
  await b.agent.target.awaitLoaded(session);
  await b.agent.target.resume(session, await commit(move));
  expect(b.vms.get('c-3').spec.memory.backing).toBe('shared');
  await finished(move);
  await expectArrived('c-3');
  await removed('c-3');
});

test('its parent and its sisters have noticed nothing of all that', async () => {
  const { a } = pair;
  for (const name of [PARENT, 'c-4']) {
    await a.vms.resume(name);
    await a.goesOn(name, 2);
    await expectClean(a, name);
  }
  expect(a.agent.images.find(image).clones).toEqual(['c-4']);
  await a.vms.stop('c-4', { isForced: true });
  await a.agent.images.remove(image);
});
