import { describe, expect, test } from 'vitest';
import { errorText, levelLines, reasonText } from '../../../src/cli/error-text.js';
import { failureText } from '../../../src/cli/render-fork.js';
import { MigrationError, toMigrationError } from '../../../src/domain/errors.js';

const text = (error: MigrationError): string => errorText('vmigrate', error.toJSON());

test('the reasons of a refusal are said once', () => {
  const refusals = [
    { code: 'RAM_NOT_SHARED', reason: 'RAM is private', remedy: 'use --native' },
    { code: 'VM_IN_JOB', reason: 'web is in a job', remedy: '' },
  ];
  const message = 'web cannot move to B: RAM is private; web is in a job';
  expect(errorText('vmigrate', new MigrationError('PREFLIGHT_REFUSED', message, { details: refusals }).toJSON())).toBe(
    'vmigrate: web cannot move to B (PREFLIGHT_REFUSED)\n' +
      '  RAM_NOT_SHARED: RAM is private\n    → use --native\n  VM_IN_JOB: web is in a job\n',
  );
});

test('code, refusals with remedies, cause and remedy', () => {
  const refusals = [{ code: 'RAM_NOT_SHARED', reason: 'RAM is private', remedy: 'use --native' }];
  const error = new MigrationError('PREFLIGHT_REFUSED', 'web cannot move', {
    details: refusals,
    cause: new Error('deep'),
  });
  expect(text(error)).toBe(
    'vmigrate: web cannot move (PREFLIGHT_REFUSED)\n' +
      '  RAM_NOT_SHARED: RAM is private\n    → use --native\n  because: deep\n',
  );
});

describe('a chain', () => {
  const root = new MigrationError('NO_SPACE', '/x is full', { remedy: 'free space there' });
  const step = new MigrationError('STEP_FAILED', 'drain on B failed: /x is full', {
    remedy: 'free space there',
    cause: root,
  });

  test('says each text and each remedy once, the one that helps first at first', () => {
    const job = new MigrationError('NEEDS_RECOVERY', 'web waits', { remedy: 'vmigrate --recover job-1', cause: step });
    expect(text(job)).toBe(
      [
        'vmigrate: web waits (NEEDS_RECOVERY)',
        '  because: drain on B failed (STEP_FAILED)',
        '  because: /x is full (NO_SPACE)',
        '  → free space there',
        '  → vmigrate --recover job-1\n',
      ].join('\n'),
    );
  });

  test('is one line where a level only repeats the one below it, with all that is known', () => {
    const full = Object.assign(new Error('write failed'), { code: 'ENOSPC', errno: -28 });
    expect(text(toMigrationError(full, 'NO_SPACE'))).toBe('vmigrate: write failed (NO_SPACE, ENOSPC)\n');
    const again = new MigrationError('NO_SPACE', '/x is full', { isRetryable: true, cause: root });
    expect(reasonText(again.toJSON())).toBe('  because: /x is full (NO_SPACE)\n  → free space there\n');
  });

  test('leaves out codes that say nothing to a person', () => {
    const usage = Object.assign(new TypeError('Unknown option'), { code: 'ERR_PARSE_ARGS_UNKNOWN_OPTION' });
    expect(text(toMigrationError(usage, 'USAGE'))).toBe('vmigrate: Unknown option (USAGE)\n');
  });

  test('names what has no text', () => {
    const all = Object.assign(new AggregateError([], ''), { code: 'ECONNREFUSED' });
    expect(levelLines(new MigrationError('UNREACHABLE', 'no daemon', { cause: all }).toJSON())).toEqual([
      'no daemon (UNREACHABLE)',
      'AggregateError (ECONNREFUSED)',
    ]);
  });

  test('cannot get control characters to the terminal', () => {
    const hostile = new MigrationError('INTERNAL', 'a\u001b[2Jb', { remedy: 'c\u0007d', cause: new Error('e\nf') });
    expect(text(hostile)).toBe('vmigrate: a [2Jb (INTERNAL)\n  because: e f\n  → c d\n');
  });

  test('is told of each clone that failed', () => {
    expect(
      failureText([
        { index: 0, name: 'web-0', error: step.toJSON() },
        { index: 1, name: 'web-1', error: null },
      ]),
    ).toBe(
      'not running:\n  web-0: drain on B failed (STEP_FAILED): /x is full (NO_SPACE)\n' +
        '  web-1: no reason given (INTERNAL)\n',
    );
  });
});
