// Adds up the results that scripts/test collected in a folder: NAME.json from test/support/results-reporter.ts,
// NAME.xml from `ctest --output-junit`, NAME.rc with the exit status of the suite's command. Prints a line per suite,
// what was skipped by its reason, each failure with the end of what it said, then the failures' names, and `N passed, N
// failed` last; exits 1 when something failed. What matters most comes last because of a long log only the end may be
// kept.
//
// In CI a skip counts as a failure, unless its reason reads `needs CAPABILITY` and this machine lacks that.

import { accessSync, constants, readdirSync, readFileSync, writeFileSync } from 'node:fs';
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
  // So many as native/tests/support/huge_pages.hpp takes for a test.
  'huge-pages': () => {
    const knob = '/proc/sys/vm/nr_hugepages';
    try {
      const before = Number(readFileSync(knob, 'utf8'));
      writeFileSync(knob, `${before + 8}`);
      const now = Number(readFileSync(knob, 'utf8'));
      writeFileSync(knob, `${before}`);
      return now >= before + 8;
    } catch {
      return false;
    }
  },
  fuse: () => canAccess('/dev/fuse'),
  root: () => process.getuid?.() === 0,
  'kernel-6.7': () => kernelIsAtLeast(6, 7),
};

const isExcused = (reason) => {
  const needed = /^needs ([\w.-]+)/.exec(reason)?.[1];
  return needed !== undefined && Object.hasOwn(capabilities, needed) && !capabilities[needed]();
};

const unescapeXml = (text) =>
  text.replace(/&(lt|gt|quot|apos|amp);/g, (_, name) => ({ lt: '<', gt: '>', quot: '"', apos: "'", amp: '&' })[name]);

/**
 * ctest's JUnit: `fail` and `notrun` stand in status; the reason of GTEST_SKIP is in the output, on the line after its
 * place.
 */
const readJunit = (suite, xml) => {
  const results = { suite, passed: 0, failures: [], skipped: [] };
  for (const [, attributes, body] of xml.matchAll(/<testcase ([^>]*?)(?:\/>|>(.*?)<\/testcase>)/gs)) {
    const status = /status="(\w+)"/.exec(attributes)?.[1];
    const name = unescapeXml(/name="([^"]*)"/.exec(attributes)?.[1] ?? '?');
    const output = unescapeXml((body ?? '').replace(/<[^>]*>/g, ''));
    if (status === 'run') results.passed++;
    else if (status === 'notrun' && body?.includes('SKIP_REGULAR_EXPRESSION_MATCHED')) {
      const reason = /: Skipped\n(.*)/.exec(output)?.[1] ?? '';
      results.skipped.push({ name, reason });
    } else results.failures.push({ name, message: output });
  }
  return results;
};

const suiteThatFailed = (suite, message) => ({ suite, passed: 0, failures: [{ name: suite, message }], skipped: [] });

const LINES_PER_FAILURE = 25;
const endOf = (text) => {
  const lines = text.trimEnd().split('\n');
  const kept = lines.slice(-LINES_PER_FAILURE).map((line) => `    ${line.slice(0, 300)}`);
  return (kept.length < lines.length ? ['    ...', ...kept] : kept).join('\n');
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
  const brokeOff = status !== '0' && own.every(({ failures }) => failures.length === 0);
  if (brokeOff) suites.push(suiteThatFailed(name, `broke off with exit status ${status}`));
  for (const member of members.filter((suite) => !own.some((found) => found.suite === suite)))
    suites.push(suiteThatFailed(member, 'no tests found'));
}

console.log(`\ntime: ${seconds.join(', ')}`);
console.log('suite                           passed  failed  skipped');
let passed = 0;
const failures = [];
const skips = new Map();
for (const suite of suites) {
  const excused = suite.skipped.filter(({ reason }) => !inCi || isExcused(reason));
  for (const { name, reason } of suite.skipped.filter((skip) => !excused.includes(skip)))
    suite.failures.push({ name, message: `skipped, which CI refuses: ${reason || 'no reason given'}` });
  for (const { name, reason } of excused) skips.set(reason, [...(skips.get(reason) ?? []), `${suite.suite}: ${name}`]);
  passed += suite.passed;
  failures.push(...suite.failures.map((failure) => ({ ...failure, suite: suite.suite })));
  const counts = [suite.passed, suite.failures.length, suite.skipped.length];
  console.log(`${suite.suite.padEnd(30)}${counts.map((count) => String(count).padStart(8)).join('')}`);
}
for (const [reason, names] of skips) {
  const others = names.length > 1 ? ` and ${names.length - 1} more` : '';
  console.log(`skipped: ${reason || 'no reason given'}: ${names[0]}${others}`);
}
for (const { suite, name, message } of failures) console.log(`\nFAILED ${suite}: ${name}\n${endOf(message)}`);
if (failures.length > 0) console.log('');
for (const { suite, name } of failures) console.log(`failed: ${suite}: ${name}`);
console.log(`\n${passed} passed, ${failures.length} failed`);
process.exit(failures.length > 0 || passed === 0 ? 1 : 0);
