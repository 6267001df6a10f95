/** The leftovers of a killed run are removed, so the next run finds a machine as clean as the first run did. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { expect, test } from 'vitest';
import { eventually } from '../hosts/cluster.js';

const GONE_MS = 60_000;

/** A run that starts a VM, reports its place, and never ends. */
const RUN = `
  import { VmHost, vmSpec } from './test/hosts/vm-host.ts';
  const host = await VmHost.start();
  await host.vms.run(vmSpec());
  console.log(JSON.stringify({ pid: host.vms.get('vm').pid, paths: [host.directory, host.ramDir] }));
  setInterval(() => undefined, 1000);
`;

test.each(['SIGINT', 'SIGKILL'] as const)('a run that ends by %s', async (signal) => {
  const child = spawn(process.execPath, ['--import', 'tsx', '--input-type=module', '--eval', RUN], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const ended = new Promise((resolve) => child.once('exit', resolve));
  const lines = createInterface({ input: child.stdout });
  const first = await Promise.race([new Promise<string>((resolve) => lines.once('line', resolve)), ended]);
  const { pid, paths } = JSON.parse(String(first)) as { pid: number; paths: string[] };
  // A process that has ended and was not waited for is a zombie, without a program.
  const program = `/proc/${pid}/exe`;
  expect(existsSync(program)).toBe(true);
  child.kill(signal);
  await ended;
  await eventually('QEMU and directories are gone', GONE_MS, () =>
    [program, ...paths].some((path) => existsSync(path)) ? undefined : true,
  );
});
