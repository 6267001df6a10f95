import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { SuiteResults } from '../support/results-reporter.ts';

describe('scripts/test-summary.mjs', () => {
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'vmigrate-summary-'));
  });
  afterEach(() => {
    rmSync(folder, { recursive: true });
  });

  const give = (name: string, results: string, status = 0) => {
    const [suite = ''] = name.split('.');
    writeFileSync(join(folder, name), results);
    writeFileSync(join(folder, `${suite}.rc`), `${status} 3`);
  };
  const results = (given: Partial<SuiteResults>): string =>
    JSON.stringify([{ suite: 'unit', passed: 0, failures: [], skipped: [], ...given }]);
  const summarize = (environment: Record<string, string> = {}) => {
    const { CI: _, ...inherited } = process.env;
    const { stdout, status } = spawnSync(process.execPath, ['scripts/test-summary.mjs', folder], {
      env: { ...inherited, ...environment },
      encoding: 'utf8',
    });
    return { status, lines: stdout.trimEnd().split('\n'), stdout };
  };

  it('adds up what both runners counted', () => {
    give('unit.json', results({ passed: 3 }));
    give(
      'native.xml',
      '<testsuite><testcase name="A.B" status="run"><system-out>fine</system-out></testcase></testsuite>',
    );
    const { status, lines } = summarize();
    expect(lines.at(-1)).toBe('4 passed, 0 failed');
    expect(status).toBe(0);
  });

  it('names each failure after all else, with the end of what it said', () => {
    const said = Array.from({ length: 100 }, (_, index) => `line ${index}`).join('\n');
    give('unit.json', results({ passed: 1, failures: [{ name: 'a.test.ts: adds', message: 'expected 3' }] }), 1);
    give(
      'native.xml',
      `<testcase name="A.B" status="fail"><failure message=""/><system-out>${said} &lt;end&gt;</system-out></testcase>`,
      1,
    );
    const { status, stdout, lines } = summarize();
    expect(stdout).toContain('FAILED unit: a.test.ts: adds\n    expected 3\n');
    expect(stdout).toContain('FAILED native: A.B\n    ...\n');
    expect(stdout).toContain('    line 99 <end>\n');
    expect(stdout).not.toContain('line 10\n');
    expect(lines.slice(-4)).toEqual(['failed: native: A.B', 'failed: unit: a.test.ts: adds', '', '1 passed, 2 failed']);
    expect(status).toBe(1);
  });

  it('counts a suite that broke off, or in which no test was found, as failed', () => {
    give('unit.json', results({ passed: 1 }), 139);
    give('native.json', '[]');
    const { stdout, lines } = summarize();
    expect(stdout).toContain('FAILED unit: unit\n    broke off with exit status 139\n');
    expect(stdout).toContain('FAILED native: native\n    no tests found\n');
    expect(lines.at(-1)).toBe('1 passed, 2 failed');
  });

  it('gathers skips by their reason, and refuses those in CI that need nothing the machine lacks', () => {
    const skipped = [
      { name: 'one', reason: 'too slow' },
      { name: 'two', reason: 'too slow' },
      { name: 'three', reason: 'needs nothing-known' },
    ];
    give('unit.json', results({ passed: 1, skipped }));
    expect(summarize().stdout).toContain('skipped: too slow: unit: one and 1 more\n');
    expect(summarize().status).toBe(0);
    const inCi = summarize({ CI: 'true' });
    expect(inCi.stdout).toContain('FAILED unit: two\n    skipped, which CI refuses: too slow\n');
    expect(inCi.lines.at(-1)).toBe('1 passed, 3 failed');
  });
});
