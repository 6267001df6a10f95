/** `npm run demo`: a busy, self-checking guest moves live between two hosts of this machine, there and back, and proves its memory. */
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { MigrationReport } from '../../src/domain.js';
import { Cluster, sleep } from './cluster.js';
import { Guest, type WorkWindow } from './guest.js';

const BARS = ' ▁▂▃▄▅▆▇█';
const MEMORY_MIB = 512;
const TOUCH_MIB = 256;

function say(line = ''): void {
  process.stdout.write(`${line}\n`);
}

function rates(windows: readonly WorkWindow[]): number[] {
  return windows.map((window) => Math.round((window.ops / window.windowMs) * 1000));
}

function bars(values: readonly number[], full: number): string {
  return values.map((value) => BARS[Math.min(8, Math.round((value / full) * 8))]).join('');
}

/** Runs the very command a user would type, on this terminal. */
function typed(cluster: Cluster, host: string, program: 'vmigrate' | 'vmctl', args: string[]): Promise<number> {
  say(`\n${host}$ ${[program, ...args].join(' ')}`);
  const script = fileURLToPath(new URL(`../../dist/cli/${program}.js`, import.meta.url));
  const child = spawn(process.execPath, [script, '--host', `unix:${cluster.apiSocket(host)}`, ...args], {
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  return new Promise((resolve) => child.once('exit', (code) => resolve(code ?? 1)));
}

async function move(cluster: Cluster, guest: Guest, source: string, target: string): Promise<MigrationReport> {
  const before = rates(await guest.work(source)).slice(-20);
  const code = await typed(cluster, source, 'vmigrate', [guest.name, target, '--postcopy']);
  if (code !== 0) throw new Error(`vmigrate ended with ${code}`);
  await sleep(2500);
  const after = rates(await guest.work(target)).slice(0, 20);
  const full = Math.max(...before, ...after);
  say(`\nwork of the guest, pages checked in each 0.1 s   (full bar: ${Math.round(full / 1000)} thousand pages/s)`);
  say(`  on ${source} ${bars(before, full)}│${bars(after, full)} on ${target}`);
  const jobs = await cluster.json<{ report: MigrationReport | null }[]>(source, 'vmctl', 'jobs');
  const report = jobs.map((job) => job.report).find((candidate) => candidate !== null);
  if (!report) throw new Error('the job left no report');
  return report;
}

async function main(): Promise<void> {
  say('Making two hosts, A and B: network namespaces with a daemon each, mutual TLS between them.');
  const cluster = await Cluster.create({ hasGuestNetwork: true });
  const interrupted = () => void cluster.destroy().finally(() => process.exit(130));
  process.once('SIGINT', interrupted);
  process.once('SIGTERM', interrupted);
  try {
    say(
      `Starting a guest with ${MEMORY_MIB} MiB on A; it checks ${TOUCH_MIB} MiB of its memory for ever, in random order. Emulated, so give it some seconds.`,
    );
    const guest = await Guest.start(cluster, 'A', { name: 'worker', memoryMiB: MEMORY_MIB, touchMiB: TOUCH_MIB });
    await typed(cluster, 'A', 'vmctl', ['ps']);
    await sleep(2500);
    await move(cluster, guest, 'A', 'B');
    await typed(cluster, 'B', 'vmctl', ['ps']);
    say('\nAnd back again.');
    await move(cluster, guest, 'B', 'A');
    say('\nNow the guest checks every word of every page:');
    const { pages, bad } = await guest.verify('A');
    say(`  ${pages} pages, ${bad} bad`);
    await typed(cluster, 'A', 'vmctl', ['stop', guest.name]);
    if (bad !== 0) throw new Error('the guest found bad pages');
    say('\nThe guest moved twice while it worked, and lost nothing.');
  } finally {
    await cluster.destroy();
  }
}

await main();
