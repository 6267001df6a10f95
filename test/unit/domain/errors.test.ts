import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import {
  CAUSE_DETAILS_CHARS_MAX,
  CAUSES_MAX,
  type CauseJson,
  ERROR_CODES,
  ERROR_TEXT_CHARS_MAX,
  type ErrorCode,
  type ErrorJson,
  MigrationError,
  toMigrationError,
} from '../../../src/domain/errors.js';
import { errorJson } from '../../../src/schemas/error.js';

const parsed = (error: MigrationError): ErrorJson => JSON.parse(JSON.stringify(error)) as ErrorJson;
const hop = (json: unknown): ErrorJson => parsed(MigrationError.fromJSON(json, 'host B'));

function levelsOf(json: CauseJson): CauseJson[] {
  const levels: CauseJson[] = [];
  for (let level: CauseJson | undefined = json; level !== undefined; level = level.cause) levels.push(level);
  return levels;
}

const optional = (name: string, value: fc.Arbitrary<unknown>) =>
  fc.option(value, { nil: undefined }).map((some) => (some === undefined ? {} : { [name]: some }));
const code = fc.constantFrom(...(Object.keys(ERROR_CODES) as ErrorCode[]));
const details = fc
  .jsonValue({ maxDepth: 2 })
  .filter((value) => JSON.stringify(value).length <= CAUSE_DETAILS_CHARS_MAX);

/** An error of this project, on top of `cause`. */
const ownLevel = (cause: fc.Arbitrary<Error | undefined>): fc.Arbitrary<MigrationError> =>
  fc
    .tuple(
      ...([code, fc.string(), cause] as const),
      ...([optional('remedy', fc.string()), optional('step', fc.string())] as const),
      ...([optional('session', fc.string()), optional('isRetryable', fc.boolean())] as const),
      optional('details', details),
    )
    .map(([word, message, below, ...context]) => {
      const some = below === undefined ? {} : { cause: below };
      return new MigrationError(word, message, Object.assign(some, ...context) as object);
    });

/** An error of Node or of a library. */
const foreignLevel = (cause: fc.Arbitrary<Error | undefined>): fc.Arbitrary<Error> =>
  fc
    .record({
      message: fc.string(),
      name: fc.constantFrom('Error', 'TypeError', 'FastifyError'),
      facts: fc.constantFrom(
        {},
        { code: 'ECONNREFUSED', errno: -111, syscall: 'connect' },
        { code: 'ERR_INVALID_ARG_TYPE' },
      ),
      cause,
    })
    .map(({ message, name, facts, cause: below }) =>
      Object.assign(new Error(message, { cause: below }), { name }, facts),
    );

function chain(levels: number): fc.Arbitrary<MigrationError> {
  const below = (left: number): fc.Arbitrary<Error | undefined> => {
    if (left === 0) return fc.constant(undefined);
    const next = below(left - 1);
    return fc.oneof(fc.constant(undefined), ownLevel(next), foreignLevel(next));
  };
  return ownLevel(below(levels));
}

describe('a chain of causes', () => {
  test('comes through JSON as it was, however often', () => {
    fc.assert(
      fc.property(chain(CAUSES_MAX), (error) => {
        const sent = parsed(error);
        expect(hop(sent)).toEqual(sent);
        expect(hop(hop(sent))).toEqual(sent);
        expect(errorJson.parse(sent)).toEqual(sent);
        let original: unknown = error;
        for (const level of levelsOf(sent)) {
          const { message, cause } = original as Error;
          expect(level.message).toBe(message);
          if (original instanceof MigrationError) expect(level).toMatchObject({ code: original.code });
          original = cause;
        }
        expect(original).toBeUndefined();
      }),
    );
  });

  test('is cut below its last level, and still an error', () => {
    const deep = Array.from({ length: 10 }, (_, index) => `level ${index}`).reduceRight<Error | undefined>(
      (cause, message) => new MigrationError('STEP_FAILED', message, cause === undefined ? {} : { cause }),
      undefined,
    );
    const sent = parsed(deep as MigrationError);
    expect(levelsOf(sent).map(({ message }) => message)).toEqual([0, 1, 2, 3, 4].map((index) => `level ${index}`));
    const circle = new MigrationError('INTERNAL', 'round');
    Object.assign(circle, { cause: circle });
    expect(levelsOf(parsed(circle))).toHaveLength(CAUSES_MAX + 1);
  });

  test('keeps what the system said of a failed call', () => {
    const refused = Object.assign(new Error('connect ECONNREFUSED 10.0.0.2:7400'), {
      ...{ code: 'ECONNREFUSED', errno: -111, syscall: 'connect', address: '10.0.0.2' },
    });
    expect(hop(parsed(toMigrationError(refused, 'UNREACHABLE'))).cause).toEqual({
      name: 'Error',
      message: 'connect ECONNREFUSED 10.0.0.2:7400',
      details: { code: 'ECONNREFUSED', errno: -111, syscall: 'connect' },
    });
  });

  test('has no long details below its top, where they are lists that somebody asked for', () => {
    const list = Array.from({ length: 1000 }, (_, index) => ({ index, name: `clone-${index}` }));
    const cause = new MigrationError('QEMU_FAILED', 'a clone failed', { details: list });
    const unprintable = new MigrationError('INTERNAL', 'odd', { details: { big: 1n } });
    const sent = parsed(new MigrationError('STEP_FAILED', 'startClones failed', { details: list, cause }));
    expect(sent.details).toEqual(list);
    expect(sent.cause).toEqual({ code: 'QEMU_FAILED', message: 'a clone failed' });
    expect(hop({ ...sent, cause: { ...sent.cause, details: list } }).cause).toEqual(sent.cause);
    expect(parsed(new MigrationError('STEP_FAILED', 'x', { cause: unprintable })).cause).not.toHaveProperty('details');
  });
});

describe('JSON of a peer', () => {
  test('never throws, and makes a bounded error', () => {
    const word = fc.oneof(fc.string(), code);
    const { json } = fc.letrec<{ json: unknown }>((tie) => ({
      json: fc.oneof(
        { depthSize: 'large' },
        fc.jsonValue(),
        fc.record(
          {
            ...{ code: word, name: word, message: fc.oneof(word, fc.string({ minLength: 5000, maxLength: 9000 })) },
            ...{ remedy: fc.jsonValue(), step: fc.jsonValue(), session: fc.jsonValue(), isRetryable: fc.jsonValue() },
            ...{ details: fc.jsonValue(), cause: tie('json') },
          },
          { requiredKeys: ['message'] },
        ),
      ),
    }));
    fc.assert(
      fc.property(json, (hostile) => {
        const got = hop(hostile);
        expect(Object.hasOwn(ERROR_CODES, got.code)).toBe(true);
        const levels = levelsOf(got);
        expect(levels.length).toBeLessThanOrEqual(CAUSES_MAX + 1);
        for (const { message, remedy = '', name = '' } of levels) {
          for (const text of [message, remedy, name]) expect(text.length).toBeLessThanOrEqual(ERROR_TEXT_CHARS_MAX);
        }
        for (const { details: facts } of levels.slice(1)) {
          expect((JSON.stringify(facts) ?? '').length).toBeLessThanOrEqual(CAUSE_DETAILS_CHARS_MAX);
        }
        expect(hop(got)).toEqual(got);
      }),
    );
  });

  test('of the previous build has one cause without more than code and message', () => {
    const outer = { code: 'STEP_FAILED', message: 'drain failed' };
    expect(hop({ ...outer, cause: { code: 'DISCONNECTED', message: 'no line' } })).toEqual({
      ...outer,
      cause: { code: 'DISCONNECTED', message: 'no line' },
    });
    expect(hop({ ...outer, cause: { message: 'no line' } })).toMatchObject({ ...outer, cause: { message: 'no line' } });
  });

  test.each([['text'], [null], [7], [[]], [{ code: 'NO_SPACE' }], [{ message: 3 }]])(
    'with the cause %j keeps its error',
    (cause) => {
      const outer = { code: 'NO_SPACE', message: 'full', remedy: 'make room' };
      expect(hop({ ...outer, cause })).toEqual(outer);
    },
  );

  test('with a code of a newer peer is a protocol error that says what came', () => {
    const newer = { code: 'QUOTA', message: 'the quota of B is used up', cause: { code: 'QUOTA_2', message: 'all' } };
    const got = hop(newer);
    expect(got).toMatchObject({ code: 'PEER_PROTOCOL', message: expect.stringContaining('host B') as string });
    expect(got.cause).toEqual({
      ...{ name: 'QUOTA', message: newer.message },
      cause: { name: 'QUOTA_2', message: 'all' },
    });
  });
});

test('an error that was thrown here stays itself, and JSON becomes one', () => {
  const own = new MigrationError('NO_SPACE', 'full');
  expect(MigrationError.from(own, 'B')).toBe(own);
  expect(MigrationError.from(new Error('oops'), 'B')).toMatchObject({ code: 'INTERNAL', message: 'oops' });
  expect(MigrationError.from({ code: 'NO_SPACE', message: 'full' }, 'B')).toMatchObject({ code: 'NO_SPACE' });
});
