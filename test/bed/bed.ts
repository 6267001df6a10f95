import { spawn } from 'node:child_process';
import { accessSync, constants, copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { homedir, tmpdir } from 'node:os';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { ForkReport } from '../../src/domain/fork.js';
import type { MigrationReport } from '../../src/domain/migration.js';

const here = dirname(fileURLToPath(import.meta.url));
const root = dirname(dirname(here));

const isExecutable = (path: string): boolean => {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
};

/** What the bed needs of this machine and does not find; empty: it can run. */
export function missingForBed(): string[] {
  const folders = (process.env.PATH ?? '').split(delimiter);
  return ['qemu-system-x86_64', 'apt-get', 'dpkg-deb', 'cpio', 'xz', 'setpriv'].filter(
    (tool) => !folders.some((folder) => isExecutable(join(folder, tool))),
  );
}

/** Kernel and initramfs, unless they are there: a download, which may take longer than any test. */
export async function buildBed(): Promise<void> {
  const child = spawn('bash', [join(here, 'build')], { stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  const collect = (chunk: Buffer): void => void (output += chunk.toString());
  child.stdout.on('data', collect);
  child.stderr.on('data', collect);
  const status = await new Promise<number | null>((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  if (status !== 0) throw new Error(`the bed cannot be built (${status}):\n${output.slice(-4000)}`);
}

export interface BedRun {
  status: number | null;
  /** stdout and stderr, as they came. */
  output: string;
  /** Of the guest's kernel. */
  console: string;
}

export interface BedOptions {
  hosts?: number;
  cpus?: number;
  memory?: string;
  timeoutSeconds?: number;
  /** Files of this machine that the script finds in its working directory. */
  files?: string[];
  /** Called with each line of output as it comes. */
  onLine?: (line: string) => void;
}

/** Runs a script in the bed; the guest is gone when this resolves. */
export async function runInBed(script: string, options: BedOptions = {}): Promise<BedRun> {
  const job = mkdtempSync(join(tmpdir(), 'vmigrate-bed-job-'));
  try {
    for (const file of options.files ?? []) copyFileSync(file, join(job, file.slice(file.lastIndexOf('/') + 1)));
    const timeoutSeconds = options.timeoutSeconds ?? 120;
    const args = ['--job', job, '--timeout', String(timeoutSeconds), '--hosts', String(options.hosts ?? 2)];
    args.push('--cpus', String(options.cpus ?? 1), '--memory', options.memory ?? '1G');
    const child = spawn(join(here, 'bed'), args, { stdio: ['pipe', 'pipe', 'pipe'] });
    let output = '';
    let line = '';
    const collect = (chunk: Buffer): void => {
      output += chunk.toString();
      const lines = (line + chunk.toString()).split('\n');
      line = lines.pop() ?? '';
      for (const whole of lines) options.onLine?.(whole);
    };
    child.stdout.on('data', collect);
    child.stderr.on('data', collect);
    child.stdin.end(script);
    const status = await new Promise<number | null>((resolve, reject) => {
      child.once('error', reject);
      child.once('close', resolve);
    });
    return {
      status,
      output,
      console: existsSync(join(job, 'console')) ? readFileSync(join(job, 'console'), 'utf8') : '',
    };
  } finally {
    rmSync(job, { recursive: true, force: true });
  }
}

/** What inside/moves.ts tells of a move. */
export interface MoveFacts {
  readonly move: string;
  readonly report: MigrationReport;
  /** The guest's own verdict on its memory afterwards, and what it saw while it worked. */
  readonly pages: number;
  readonly bad: number;
  readonly badSeen: number;
  readonly ms: number;
}

/** What inside/forks.ts tells of a fork. */
export interface ForkFacts {
  readonly fork: string;
  readonly report: ForkReport;
  /** Each clone's verdict on its memory. */
  readonly clones: readonly {
    readonly clone: string;
    readonly host: string;
    readonly pages: number;
    readonly bad: number;
  }[];
  readonly ms: number;
  /** What the reader of the host whose daemon was killed had of the image then; null if none was. */
  readonly killedAtPercent: number | null;
}

/** A shell's status of a program that SIGSEGV has ended. */
const SEGMENTATION_FAULT = 139;

/**
 * Runs a TypeScript program of ours in the bed. Rarely, not once in 60 starts in a row, the emulated Node dies at its
 * start. It is started once more then: its process has no native code of ours, which the daemons load. What the kernel
 * says of such an end is printed.
 */
export async function runProgramInBed(
  path: string,
  args: readonly string[],
  options: BedOptions = {},
): Promise<BedRun> {
  const cache = process.env.VMIGRATE_CACHE ?? join(homedir(), '.cache/vmigrate');
  const words = [process.execPath, '--import', 'tsx', path, ...args].map((word) => `'${word}'`);
  const enter = `echo 8 >/proc/sys/kernel/printk; cd '${root}'`;
  const script = `${enter} && VMIGRATE_CACHE='${cache}' exec ${words.join(' ')}`;
  const run = await runInBed(script, options);
  if (run.status !== SEGMENTATION_FAULT) return run;
  process.stderr.write(`${path} has ended by a segmentation fault in the bed:\n${run.console.slice(-2000)}\n`);
  return hasBegun(run) ? run : runInBed(script, options);
}

/** A program of ours prints nothing but lines of JSON of its own accord. */
function hasBegun({ output }: BedRun): boolean {
  return output.includes('{');
}

/** A program of the native build. */
export const nativeProgram = (name: string): string => join(root, 'build', 'native', name);
