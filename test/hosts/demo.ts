/**
 * `npm run demo`: a busy guest that checks its memory moves live between two hosts on this machine, there and back.
 * Then it is forked into eight clones on both hosts, and all nine check their whole memory.
 */
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { ForkReport } from '../../src/domain/fork.js';
import type { MigrationReport } from '../../src/domain/migration.js';
import { Cluster, type Program, sleep } from './cluster.js';
import { Guest, type WorkWindow } from './guest.js';

const BARS = ' ▁▂▃▄▅▆▇█';
const MEMORY_MIB = 512;
const TOUCH_MIB = 256;
const CLONES = 8;

function say(line = ''): void {
  process.stdout.write(`${line}\n`);
}

function rates(windows: readonly WorkWindow[]): number[] {
  return windows.map((window) => Math.round((window.ops / window.windowMs) * 1000));
}

function bars(values: readonly number[], full: number): string {
  return values.map((value) => BARS[Math.min(8, Math.round((value / full) * 8))]).join('');
}

/** Runs the command that a user would type, on this terminal. */
function typed(cluster: Cluster, host: string, program: Program, args: string[]): Promise<number> {
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

/** Forks the guest onto both hosts. All clones are busy, so the check takes some time. */
async function fork(cluster: Cluster, guest: Guest): Promise<void> {
  const flags = ['--clones', String(CLONES), '--hosts', 'A,B', guest.name, '--name', 'clone'];
  const code = await typed(cluster, 'A', 'vfork', flags);
  if (code !== 0) throw new Error(`vfork ended with ${code}`);
  for (const host of ['A', 'B']) await typed(cluster, host, 'vmctl', ['ps']);
  const jobs = await cluster.json<{ kind: string; report: ForkReport | null }[]>('A', 'vmctl', 'jobs');
  const report = jobs.find(({ kind }) => kind === 'fork')?.report;
  if (!report) throw new Error('the job left no report');
  say('\nEach of them checks its memory:');
  const verdicts = await Promise.all(
    [{ name: guest.name, host: 'A' }, ...report.clones].map(async ({ name, host }) => ({
      ...{ name, host },
      ...(await new Guest(cluster, name).verify(host)),
    })),
  );
  for (const { name, host, pages, bad } of verdicts) say(`  ${name.padEnd(8)} on ${host}: ${pages} pages, ${bad} bad`);
  for (const host of ['B', 'A']) {
    await typed(cluster, host, 'vmctl', ['stop', '--image', report.image]);
    await typed(cluster, host, 'vmctl', ['image', 'rm', report.image]);
  }
  if (verdicts.some(({ bad }) => bad !== 0)) throw new Error('a guest found bad pages');
}

async function main(): Promise<void> {
  say('Creating two hosts, A and B: each is a network namespace with a daemon. They use mutual TLS.');
  const cluster = await Cluster.create({ hasGuestNetwork: true });
  const interrupted = () => void cluster.destroy().finally(() => process.exit(130));
  process.once('SIGINT', interrupted);
  process.once('SIGTERM', interrupted);
  try {
    say(`Starting a guest with ${MEMORY_MIB} MiB on A. It checks ${TOUCH_MIB} MiB of its memory all the time.`);
    say('The guest is emulated, so this takes some seconds.');
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
    if (bad !== 0) throw new Error('the guest found bad pages');
    say(`\nAt last it is forked into ${CLONES} clones on both hosts; all of them keep working.`);
    await fork(cluster, guest);
    await typed(cluster, 'A', 'vmctl', ['stop', '--force', guest.name]);
    say(`\nThe guest moved twice and was forked into ${CLONES} clones on two hosts while it worked. No page was lost.`);
  } finally {
    await cluster.destroy();
  }
}

await main();
