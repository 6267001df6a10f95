import { execFileSync } from 'node:child_process';
import { expect, test } from 'vitest';

/** Runs in a process of its own, because the process keeps the priority that it takes. */
const PROGRAM = `
  import { spawn } from 'node:child_process';
  import { getPriority } from 'node:os';
  import { goAhead, hasten, standInLine, unhasten } from './src/agent/vm/priority.ts';
  const before = getPriority();
  goAhead();
  const child = spawn('sleep', ['60']);
  const seen = { before, own: getPriority() };
  standInLine(child.pid);
  seen.child = getPriority(child.pid);
  hasten(child.pid);
  seen.hastened = getPriority(child.pid);
  unhasten(child.pid);
  seen.unhastened = getPriority(child.pid);
  child.kill('SIGKILL');
  console.log(JSON.stringify(seen));
`;

test('the daemon goes ahead, its QEMUs do not, but for a clone on its way to its first instruction', (context) => {
  if (process.getuid?.() !== 0) context.skip('needs root');
  const args = ['--import', 'tsx', '--input-type=module', '--eval', PROGRAM];
  const seen = JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' })) as Record<string, number>;
  const before = seen['before'] ?? Number.NaN;
  const ahead = Math.max(-20, before - 10);
  expect(seen).toEqual({ before, own: ahead, child: before, hastened: ahead, unhastened: before });
});
