import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname } from 'node:path';
import type { Reporter, SerializedError, TestModule } from 'vitest/node';

/** The results that scripts/test-summary.mjs reads, for a vitest project or a ctest run. */
export interface SuiteResults {
  suite: string;
  passed: number;
  failures: { name: string; message: string }[];
  /** Skipped tests, with the reason given to `ctx.skip(reason)`. */
  skipped: { name: string; reason: string }[];
}

const describe = (errors: readonly SerializedError[]): string =>
  errors
    .map(({ message, stack = '' }) => {
      const places = stack.split('\n').filter((line) => /^\s+at /.test(line) && !line.includes('node_modules'));
      return [message, ...places.slice(0, 5)].join('\n');
    })
    .join('\n');

const errorsOutsideTests = (module: TestModule): SerializedError[] => [
  ...module.errors(),
  ...[...module.children.allSuites()].flatMap((suite) => suite.errors()),
];

/**
 * Writes the results of a run to the file named by VMIGRATE_TEST_RESULTS. Vitest's own JSON lacks the reasons of skips,
 * which CI needs in order to refuse a skip without a reason.
 */
export default class ResultsReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[], unhandledErrors: readonly SerializedError[]): void {
    const path = process.env.VMIGRATE_TEST_RESULTS;
    if (path === undefined) return;
    const suites = new Map<string, SuiteResults>();
    const suiteNamed = (name: string): SuiteResults => {
      const known = suites.get(name);
      if (known !== undefined) return known;
      const created: SuiteResults = { suite: name, passed: 0, failures: [], skipped: [] };
      suites.set(name, created);
      return created;
    };
    for (const module of modules) {
      const suite = suiteNamed(module.project.name);
      const failures = suite.failures.length;
      for (const test of module.children.allTests()) {
        const result = test.result();
        if (result.state === 'passed') suite.passed++;
        else if (result.state === 'failed')
          suite.failures.push({
            name: `${module.relativeModuleId}: ${test.fullName}`,
            message: describe(result.errors),
          });
        else suite.skipped.push({ name: test.fullName, reason: result.state === 'skipped' ? (result.note ?? '') : '' });
      }
      // A file fails without a failed test if it does not load or if a hook throws.
      if (suite.failures.length === failures && module.state() === 'failed')
        suite.failures.push({ name: module.relativeModuleId, message: describe(errorsOutsideTests(module)) });
    }
    for (const error of unhandledErrors)
      suiteNamed('unhandled errors').failures.push({ name: error.name ?? 'error', message: describe([error]) });
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, JSON.stringify([...suites.values()]));
  }
}
