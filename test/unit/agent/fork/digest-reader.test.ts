/** From whom a host gets the digests of an image; with fakes of the other hosts. */
import { expect, test, vi } from 'vitest';
import { DigestReader, hashOf } from '../../../../src/agent/fork/pages/digest-reader.js';
import { MigrationError } from '../../../../src/domain/errors.js';

const IMAGE = '3'.repeat(16);
const PAGES = 3;
const DIGESTS = Buffer.alloc(16 * PAGES, 7);
const WRONG = Buffer.alloc(16 * PAGES, 8);

type Answer = Buffer | null | Error;

function scene(relays: Readonly<Record<string, () => Answer>>, known: number | null = PAGES) {
  const asked: string[] = [];
  const peers = {
    isPeer: (host: string) => host !== 'stranger',
    agent: (host: string) => ({
      fanout: {
        heldDigests: async () => {
          asked.push(host);
          const answer = relays[host]?.() ?? null;
          if (answer instanceof Error) throw answer;
          return { digests: answer?.toString('base64') ?? null };
        },
      },
    }),
  };
  const log = { debug: vi.fn(), info: vi.fn(), warn: vi.fn(), error: vi.fn() };
  const origin = {
    digests: async () => {
      asked.push('root');
      return DIGESTS.toString('base64');
    },
    digestsHash: async () => ({ pageCount: known, sha256: known === null || known === 0 ? '' : hashOf(DIGESTS) }),
  };
  const context = { host: 'self', peers, log } as never;
  const reader = new DigestReader(context, {
    image: IMAGE,
    relays: ['self', 'stranger', ...Object.keys(relays)],
    origin,
  });
  return { asked, log, ask: () => reader.ask(0, 0) };
}

const ALL = DIGESTS.toString('base64');

test('the nearest relay that has a piece is asked for it, and the root for its hash only', async () => {
  const { ask, asked } = scene({ near: () => DIGESTS, far: () => DIGESTS });
  expect(await ask()).toBe(ALL);
  expect(asked).toEqual(['near']);
});

test('a relay may know more than the piece', async () => {
  const { ask } = scene({ near: () => Buffer.concat([DIGESTS, WRONG]) });
  expect(await ask()).toBe(ALL);
});

test.each([
  ['says that it has none yet', Buffer.alloc(0)],
  ['has only a part', DIGESTS.subarray(16)],
  ['never has any', null],
  ['does not answer', new MigrationError('UNREACHABLE', 'gone')],
  ['has others than the root', WRONG],
])('a relay that %s is passed by', async (_, answer) => {
  const { ask, asked } = scene({ near: () => answer, far: () => DIGESTS });
  expect(await ask()).toBe(ALL);
  expect(asked).toEqual(['near', 'far']);
});

test('a relay that has said something wrong is not asked again', async () => {
  const { ask, asked, log } = scene({ near: () => WRONG, far: () => DIGESTS });
  await ask();
  await ask();
  expect(asked).toEqual(['near', 'far', 'far']);
  expect(log.warn).toHaveBeenCalledTimes(1);
});

test('the root gives what no relay has, after some patience', async () => {
  const { ask, asked } = scene({ near: () => Buffer.alloc(0) });
  const answers: (string | null)[] = [];
  for (let n = 0; n < 4; n++) answers.push(await ask());
  expect(answers).toEqual(['', '', '', ALL]);
  expect(asked.at(-1)).toBe('root');
  asked.length = 0;
  expect(await ask()).toBe(ALL);
  expect(asked).toEqual(['root']);
});

test('a relay that has one piece in between is asked on', async () => {
  const answers = [...Array.from({ length: 3 }, () => Buffer.alloc(0)), DIGESTS, Buffer.alloc(0)];
  const { ask, asked } = scene({ near: () => answers.shift() ?? null });
  for (let n = 0; n < 3; n++) expect(await ask()).toBe('');
  expect(await ask()).toBe(ALL);
  expect(await ask()).toBe('');
  expect(asked).not.toContain('root');
});

test.each([WRONG, null])('the root is asked at once if nobody else can be', async (answer) => {
  const { ask, asked } = scene({ near: () => answer });
  expect(await ask()).toBe(ALL);
  expect(await ask()).toBe(ALL);
  expect(asked).toEqual(['near', 'root', 'root']);
});

test('no relay is asked before the root knows them, or if it never will', async () => {
  for (const known of [0, null]) {
    const { ask, asked } = scene({ near: () => DIGESTS }, known);
    expect(await ask()).toBe(known === null ? null : '');
    expect(asked).toEqual([]);
  }
});
