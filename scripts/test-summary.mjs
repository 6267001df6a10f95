// Adds up the results that scripts/test collected in a folder: NAME.json from test/support/results-reporter.ts,
// NAME.xml from `ctest --output-junit`, NAME.rc with the exit status of the suite's command. Prints a line per suite and
// `N passed, N failed` last; exits 1 when something failed.
//
// In CI a skip counts as a failure, unless its reason reads `needs CAPABILITY` and this machine lacks that.

import { accessSync, constants, readdirSync, readFileSync } from 'node:fs';
import { release } from 'node:os';
import { basename, join } from 'node:path';

const folder = process.argv[2];
const inCi = process.env.CI !== undefined && process.env.CI !== '' && process.env.CI !== 'false';

const canAccess = (path) => {
  try {
    accessSync(path, constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
};
const hasEntries = (path) => {
  try {
    return readdirSync(path).length > 0;
  } catch {
    return false;
  }
};
const kernelIsAtLeast = (major, minor) => {
  const [hasMajor, hasMinor] = release().split('.').map(Number);
  return hasMajor > major || (hasMajor === major && hasMinor >= minor);
};

const capabilities = {
  rdma: () => hasEntries('/sys/class/infiniband'),
  // A /dev/kvm without the CPU flag opens, and hangs ordinary kernels.
  kvm: () => canAccess('/dev/kvm') && /\b(vmx|svm)\b/.test(readFileSync('/proc/cpuinfo', 'utf8')),
  root: () => process.getuid?.() === 0,
  'kernel-6.7': () => kernelIsAtLeast(6, 7),
};

const isExcused = (reason) => {
  const needed = /^needs ([\w.-]+)/.exec(reason)?.[1];
  return needed !== undefined && Object.hasOwn(capabilities, needed) && !capabilities[needed]();
};

const unescapeXml = (text) =>
  text.replace(/&(lt|gt|quot|apos|amp);/g, (_, name) => ({ lt: '<', gt: '>', quot: '"', apos: "'", amp: '&' })[name]);

/** ctest's JUnit: `fail` and `notrun` stand in status; the reason of GTEST_SKIP is in the output, on the line after its place. */
const readJunit = (suite, xml) => {
  const results = { suite, passed: 0, failed: 0, skipped: [] };
  for (const [, attributes, body] of xml.matchAll(/<testcase ([^>]*?)(?:\/>|>(.*?)<\/testcase>)/gs)) {
    const status = /status="(\w+)"/.exec(attributes)?.[1];
    const output = unescapeXml(body ?? '');
    if (status === 'run') results.passed++;
    else if (status === 'notrun' && output.includes('SKIP_REGULAR_EXPRESSION_MATCHED')) {
      const reason = /: Skipped\n(.*)/.exec(output)?.[1] ?? '';
      results.skipped.push({ name: unescapeXml(/name="([^"]*)"/.exec(attributes)?.[1] ?? '?'), reason });
    } else results.failed++;
  }
  return results;
};

const files = readdirSync(folder);
const suites = [];
for (const file of files.filter((name) => name.endsWith('.json') || name.endsWith('.xml')).sort()) {
  const text = readFileSync(join(folder, file), 'utf8');
  if (file.endsWith('.json')) suites.push(...JSON.parse(text));
  else suites.push(readJunit(file.slice(0, -4), text));
}
// A command that failed without a failed test to show for it (it did not build, crashed) is a failure too, and so is a
// suite in which no test was found.
const seconds = [];
for (const file of files.filter((name) => name.endsWith('.rc')).sort()) {
  const name = basename(file, '.rc');
  const [status, duration] = readFileSync(join(folder, file), 'utf8').trim().split(' ');
  seconds.push(`${name} ${duration} s`);
  const members = name.split('+');
  const own = suites.filter(({ suite }) => members.includes(suite) || suite === 'unhandled errors');
  const failures = own.reduce((sum, { failed }) => sum + failed, 0);
  if (status !== '0' && failures === 0) suites.push({ suite: `${name}: broke off`, passed: 0, failed: 1, skipped: [] });
  for (const member of members.filter((suite) => !own.some((found) => found.suite === suite)))
    suites.push({ suite: `${member}: no tests found`, passed: 0, failed: 1, skipped: [] });
}

console.log(`\ntime: ${seconds.join(', ')}`);
console.log('suite                           passed  failed  skipped');
let passed = 0;
let failed = 0;
for (const suite of suites) {
  const refused = inCi ? suite.skipped.filter(({ reason }) => !isExcused(reason)) : [];
  suite.failed += refused.length;
  passed += suite.passed;
  failed += suite.failed;
  const columns = [suite.passed, suite.failed, suite.skipped.length].map((count) => String(count).padStart(8)).join('');
  console.log(`${suite.suite.padEnd(30)}${columns}`);
  for (const skip of suite.skipped) {
    const verdict = refused.includes(skip) ? 'refused skip' : 'skipped';
    console.log(`  ${verdict}: ${skip.name}: ${skip.reason || 'no reason given'}`);
  }
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed > 0 || passed === 0 ? 1 : 0);
