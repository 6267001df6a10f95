import { execFileSync } from 'node:child_process';
import { expect, test } from 'vitest';

/** The program runs in a process of its own, because the process keeps the raised priority. */
const PROGRAM = `
  import { spawn } from 'node:child_process';
  import { getPriority } from 'node:os';
  import {
    raiseDaemonPriority, raisePriority, resetChildPriority, restorePriority,
  } from './src/agent/vm/priority.ts';
  const before = getPriority();
  raiseDaemonPriority();
  const child = spawn('sleep', ['60']);
  const seen = { before, own: getPriority() };
  resetChildPriority(child.pid);
  seen.child = getPriority(child.pid);
  raisePriority(child.pid);
  seen.raised = getPriority(child.pid);
  restorePriority(child.pid);
  seen.restored = getPriority(child.pid);
  child.kill('SIGKILL');
  console.log(JSON.stringify(seen));
`;

test('the daemon has a raised priority, its QEMUs have not, except a clone before its first instruction', (context) => {
  if (process.getuid?.() !== 0) context.skip('needs root');
  const args = ['--import', 'tsx', '--input-type=module', '--eval', PROGRAM];
  const seen = JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' })) as Record<string, number>;
  const before = seen['before'] ?? Number.NaN;
  const ahead = Math.max(-20, before - 10);
  expect(seen).toEqual({ before, own: ahead, child: before, raised: ahead, restored: before });
});
