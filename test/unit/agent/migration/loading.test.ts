/** What waits until pages that were written since they were fetched are given up. */
import { PassThrough, Readable } from 'node:stream';
import { buffer } from 'node:stream/consumers';
import { describe, expect, test } from 'vitest';
import { Loading } from '../../../../src/agent/migration/loading.js';
import { MigrationError } from '../../../../src/domain/errors.js';
import type { MigrationMode } from '../../../../src/domain/migration.js';
import { gate } from '../../engine/scripted.js';

const code = (expected: string) => expect.objectContaining({ code: expected });
const STATE = Buffer.alloc(3 * 2 ** 20, 'state');

/** A load whose QEMU and whose pages do what the test says, and what happened, in order. */
function loadingOf(mode: MigrationMode) {
  const happened: string[] = [];
  const loaded = gate();
  let taking: (round: number) => Promise<{ pages: number }> = async (round) => ({ pages: 10 * round });
  const state = {
    accept: async (body: Readable) => {
      happened.push('accept');
      expect((await buffer(body)).equals(STATE)).toBe(true);
      happened.push('accepted');
      loaded.open();
    },
    loaded: () => loaded.passed,
    end: () => void happened.push('end'),
  };
  const pages = {
    fetchAhead: async () => ({ isDone: true, isHeld: true }),
    serveDemand: () => void happened.push('serveDemand'),
    takeBack: async (round: number) => {
      happened.push(`takeBack ${round}`);
      return taking(round);
    },
  };
  const vm = { spec: { name: 'web' }, process: { explain: async (error: unknown) => error } };
  const loading = new Loading(vm as never, state as never, pages as never, mode);
  return {
    ...{ loading, happened },
    onTake: (take: typeof taking) => {
      taking = take;
    },
  };
}

/** The device state as it comes, in pieces, and whether all of it has been read. */
function arriving(): { body: Readable; isRead: () => boolean } {
  const body = Readable.from([STATE.subarray(0, 2 ** 20), STATE.subarray(2 ** 20)]);
  let isRead = false;
  body.on('end', () => {
    isRead = true;
  });
  return { body, isRead: () => isRead };
}

describe('the device state of a VM whose memory was fetched while it ran', () => {
  test('is read at once, and QEMU gets no byte of it before the last round has been taken back', async () => {
    const { loading, happened, onTake } = loadingOf('hybrid');
    const { body, isRead } = arriving();
    const accepting = loading.accept(body);
    await expect.poll(isRead).toBe(true);
    await loading.takeBack(1);
    const took = gate();
    onTake(async () => {
      await took.passed;
      return { pages: 3 };
    });
    const awaiting = loading.awaitLoaded(2);
    await new Promise((resolve) => setImmediate(resolve));
    expect(happened).toEqual(['takeBack 1', 'takeBack 2']);
    took.open();
    await Promise.all([accepting, awaiting]);
    expect(happened).toEqual(['takeBack 1', 'takeBack 2', 'serveDemand', 'accept', 'accepted']);
    // The coordinator has lost the answer.
    await loading.awaitLoaded(2);
    expect(happened.filter((what) => what.startsWith('take'))).toHaveLength(2);
  });

  test.each([
    ['cannot be taken back', 1, 'DISCONNECTED'],
    ['is not named', undefined, 'CONFLICT'],
    ['does not follow the one before', 2, 'CONFLICT'],
  ])('is refused if the last round %s', async (_, round, expected) => {
    const { loading, happened, onTake } = loadingOf('hybrid');
    onTake(() => Promise.reject(new MigrationError('DISCONNECTED', 'the source is gone')));
    const { body, isRead } = arriving();
    const accepting = expect(loading.accept(body)).rejects.toEqual(code(expected));
    await expect(loading.awaitLoaded(round)).rejects.toEqual(code(expected));
    await accepting;
    // The sender is still read, so that it gets the answer.
    await expect.poll(isRead).toBe(true);
    expect(happened).not.toContain('accept');
    expect(happened).not.toContain('serveDemand');
  });

  test('is refused if the session ends', async () => {
    const { loading, happened } = loadingOf('hybrid');
    const accepting = expect(loading.accept(arriving().body)).rejects.toEqual(code('CANCELLED'));
    loading.end(new MigrationError('CANCELLED', 'the session has ended'));
    await accepting;
    expect(happened).toEqual(['end']);
  });

  test('that has broken off meanwhile breaks off where it is passed on', async () => {
    const { loading } = loadingOf('hybrid');
    const body = new PassThrough();
    const accepting = expect(loading.accept(body)).rejects.toThrow('cable');
    body.destroy(new Error('cable'));
    await new Promise((resolve) => setImmediate(resolve));
    void loading.awaitLoaded(1).catch(() => undefined);
    await accepting;
  });

  test('of a post-copy waits for nothing', async () => {
    const { loading, happened } = loadingOf('postcopy');
    await loading.accept(arriving().body);
    await loading.awaitLoaded();
    expect(happened).toEqual(['accept', 'accepted', 'serveDemand']);
    await expect(loading.takeBack(1)).rejects.toEqual(code('CONFLICT'));
    await expect(loading.fetchAhead(1, true)).rejects.toEqual(code('CONFLICT'));
  });
});

describe('a round', () => {
  test('that was taken is not taken again, and none is left out', async () => {
    const { loading, happened } = loadingOf('hybrid');
    await expect(loading.takeBack(2)).rejects.toEqual(code('CONFLICT'));
    expect(await Promise.all([loading.takeBack(1), loading.takeBack(1)])).toEqual([{ pages: 10 }, { pages: 10 }]);
    expect(await loading.takeBack(1)).toEqual({ pages: 10 });
    await expect(loading.takeBack(3)).rejects.toEqual(code('CONFLICT'));
    expect(await loading.takeBack(2)).toEqual({ pages: 20 });
    await expect(loading.takeBack(1)).rejects.toEqual(code('CONFLICT'));
    expect(happened).toEqual(['takeBack 1', 'takeBack 2']);
  });

  test('whose taking has failed may be taken again', async () => {
    const { loading, onTake } = loadingOf('hybrid');
    onTake(() => Promise.reject(new MigrationError('DISCONNECTED', 'the source is gone')));
    await expect(loading.takeBack(1)).rejects.toEqual(code('DISCONNECTED'));
    onTake(async () => ({ pages: 4 }));
    expect(await loading.takeBack(1)).toEqual({ pages: 4 });
  });
});
