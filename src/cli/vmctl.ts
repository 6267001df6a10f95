#!/usr/bin/env node
/** `vmctl`: manages a host and its VMs, except for moving and forking them. Flags → request → answer. */
import { createReadStream } from 'node:fs';
import type { Readable } from 'node:stream';
import type { Command } from 'commander';
import { MigrationError } from '../domain/errors.js';
import type { JobView } from '../domain/job.js';
import type { StopResult, VmView } from '../domain/vm.js';
import type { StoppedOnHosts, VmsOnHosts } from '../schemas/all-hosts.js';
import type { DaemonView, DoctorCheck, HostView } from '../schemas/host.js';
import { addCerts } from './certs.js';
import { reasonText, remedyText } from './error-text.js';
import { EXIT, type ExitCode, exitCodeOfJob } from './exit-codes.js';
import { followJob, jobError } from './follow.js';
import { type CommonOptions, client, main, newProgram } from './program.js';
import { hostTable, jobTable, moveTexts, plain, progressLines, reportText, table, vmTable } from './render.js';
import { forkReportText, recordText } from './render-fork.js';
import { isAnySilent, stoppedText, vmsOnHostsText } from './render-hosts.js';
import { secondsOf, showWait, stopText } from './stop.js';
import { ProgressLine, print, whileWaiting } from './terminal.js';
import { addEvents } from './vmctl-events.js';
import { addImages } from './vmctl-images.js';
import { addState } from './vmctl-state.js';
import { addTokens } from './vmctl-token.js';

interface StopFlags {
  readonly force?: boolean;
  readonly image?: string;
  readonly thisHost?: boolean;
  readonly timeout: string;
}

const SPEC_BYTES_MAX = 1024 * 1024;
/** How many of the latest jobs that went wrong are explained below the list. */
const JOBS_EXPLAINED_MAX = 5;
const outcome: { code: ExitCode } = { code: EXIT.done };
const program = newProgram('vmctl', 'Manages the VMs, jobs and images of a host.');

/** Adds a command. `action` gets the positional argument (if the command has one) and all options. */
function add(
  usage: string,
  description: string,
  action: (argument: string, options: CommonOptions & { isJson: boolean }, command: Command) => Promise<void>,
): Command {
  const command = program.command(usage).description(description);
  return command.action(async (...args: unknown[]) => {
    const argument = typeof args[0] === 'string' ? args[0] : '';
    const options = command.optsWithGlobals<CommonOptions>();
    await action(argument, { ...options, isJson: options.json === true }, command);
  });
}

const path = (kind: 'vms' | 'jobs' | 'images', name: string, verb?: string): string =>
  `/v1/${kind}/${encodeURIComponent(name)}${verb === undefined ? '' : `/${verb}`}`;

add('doctor', 'check what this host can do, and how to mend what it cannot', async (_, options) => {
  const asked = client(options).get<DoctorCheck[]>('/v1/doctor');
  const checks = await whileWaiting(options, 'asking this host and its peers …', asked);
  const remedies = (list: DoctorCheck[]) =>
    list.filter(({ remedy }) => remedy !== '').map(({ name, remedy }) => `  ${plain(name)} → ${plain(remedy)}\n`);
  print(options, checks, (list) => {
    const rows = list.map(({ name, status, text }) => [status, name, text]);
    return `${table(['', 'CHECK', ''], rows)}${remedies(list).join('')}`;
  });
  if (checks.some(({ status }) => status === 'fail')) outcome.code = EXIT.failed;
});

add('host', 'show this host and its daemon', async (_, options) => {
  const { inventory, ...daemon } = await client(options).get<DaemonView>('/v1/host');
  print(options, { ...daemon, inventory }, () => recordText({ ...daemon, ...inventory }));
});

add('run <spec>', 'start a VM that a YAML or JSON file describes (- for stdin)', async (file, options, command) => {
  const text = await readSpec(file);
  const { forceName } = command.opts<{ forceName?: boolean }>();
  const query = forceName === true ? '?forceName=true' : '';
  const view = await client(options).postText<VmView>(`/v1/vms${query}`, text);
  for (const warning of view.warnings ?? []) process.stderr.write(`warning: ${plain(warning)}\n`);
  print(options, view, (vm) => vmTable([vm]));
}).option('--force-name', 'start it although the host to which a VM of this name last belonged does not answer');

add('ps', 'list the VMs on the host', async (_, options, command) => {
  if (command.opts<{ allHosts?: boolean }>().allHosts !== true) {
    print(options, await client(options).get<VmView[]>('/v1/vms'), vmTable);
    return;
  }
  const asked = client(options).get<VmsOnHosts>('/v1/vms?allHosts=true');
  print(options, await whileWaiting(options, 'asking this host and its peers …', asked), vmsOnHostsText);
}).option('--all-hosts', 'also those on the hosts that it knows');

add('show <vm>', 'show one VM', async (name, options) => {
  const vm = await client(options).get<VmView>(path('vms', name));
  print(options, vm, () => recordText({ ...vm, ...moveTexts(vm) }));
});

add('console <vm>', 'connect to the VM’s serial line; leave with Ctrl-]', async (name, options) => {
  const { attachConsole } = await import('./console.js');
  await attachConsole(client(options), name);
});

add('logs <vm>', 'print the serial output that is kept of a VM, also of one that has ended', async (...given) => {
  const [name, options, command] = given;
  const { on } = command.opts<{ on?: string }>();
  const { pipeline } = await import('node:stream/promises');
  const log = on === undefined ? await ownLog(options, name) : await client(options).serialLogOn(on, name);
  if (!options.isJson) return pipeline(log, process.stdout, { end: false });
  const chunks: Buffer[] = [];
  for await (const chunk of log as AsyncIterable<Buffer>) chunks.push(chunk);
  print(options, { name, log: Buffer.concat(chunks).toString('utf8') }, ({ log: text }) => text);
}).option('--on <host>', 'of a VM on another host, which this one asks');

async function ownLog(options: CommonOptions, name: string): Promise<Readable> {
  const log = await client(options).serialLog(name);
  log.end();
  return log;
}

for (const [verb, description] of [
  ['pause', 'stop the VM’s vCPUs'],
  ['resume', 'let the VM’s vCPUs run again'],
  ['reset', 'restart the guest at once, as its reset button does'],
] as const)
  add(`${verb} <vm>`, description, async (name, options) => {
    print(options, await client(options).post<VmView>(path('vms', name, verb)), (vm) => vmTable([vm]));
  });

add('stop [vm]', 'shut a VM down by its power button, and free its memory', async (name, options, command) => {
  const { force = false, image, thisHost = false, timeout } = command.opts<StopFlags>();
  if ((name === '') === (image === undefined)) throw new MigrationError('USAGE', 'name a VM, or an image with --image');
  if (image !== undefined) {
    const body = { force, allHosts: !thisHost };
    const stopping = client(options).post<StoppedOnHosts>(path('images', image, 'stop'), body);
    const ended = await whileWaiting(options, 'ending clones …', stopping);
    print(options, ended, stoppedText);
    if (ended.failures.length > 0 || isAnySilent(ended.unanswered)) outcome.code = EXIT.failed;
    return;
  }
  if (thisHost) throw new MigrationError('USAGE', '--this-host needs --image: a VM is stopped on this host anyway');
  const timeoutS = secondsOf(timeout);
  const stopping = client(options).post<StopResult>(path('vms', name, 'stop'), { force, timeoutMs: timeoutS * 1000 });
  const result = force ? await stopping : await showWait(name, timeoutS, options, stopping);
  print(options, result, (stopped) => stopText(stopped, timeoutS));
})
  .option(
    '--timeout <seconds>',
    'how long the guest may take to shut down before it is ended; 0: its power button is not pressed',
    '30',
  )
  .option('--force', 'kill it at once, even if it belongs to a job or has not all of its memory')
  .option('--image <id>', 'end all clones that run on the image at once, on all hosts, instead of one VM')
  .option('--this-host', 'with --image: only those on this host');

add('hosts', 'list this host and the hosts it knows', async (_, options) => {
  const asked = client(options).get<HostView[]>('/v1/hosts');
  print(options, await whileWaiting(options, 'asking this host and its peers …', asked), hostTable);
});

add('jobs', 'list the migrations and forks that the host coordinates or receives', async (_, options) => {
  print(options, await client(options).get<JobView[]>('/v1/jobs'), jobsText);
});

add('job <id>', 'show one job', async (id, options, command) => {
  const api = client(options);
  let job = await api.get<JobView>(path('jobs', id));
  if (command.opts<{ follow?: boolean }>().follow === true) {
    const progress = new ProgressLine(options);
    job = await followJob(api, job.id, (view) => progress.show(view));
    progress.clear();
    outcome.code = exitCodeOfJob(job.state);
  }
  print(options, job, jobText);
}).option('--follow', 'watch the job until it ends, or nothing has advanced for long (exit code 4; the job goes on)');

add('cancel <id>', 'cancel and undo a job that is not committed', async (id, options) => {
  print(options, await client(options).post<JobView>(path('jobs', id, 'cancel')), jobText);
});

program.addHelpText(
  'after',
  '\nExit codes: 0 done; 1 failed; 2 usage; 3 refused by pre-flight; 5 daemon unreachable; of\n' +
    '"job --follow" and "image copy" also 4 the job needs recovery, and goes on by itself when the cause is gone;\n' +
    '6 the VM, the clones or the copy are lost.',
);
addEvents(program);
addImages(program, outcome);
addCerts(program);
addTokens(program);
addState(program, () => {
  outcome.code = EXIT.failed;
});

function jobText(job: JobView): string {
  return `${jobTable([job])}${bodyText(job)}${isWell(job) ? '' : reasonText(jobError(job).toJSON())}`;
}

function isWell({ state, error }: JobView): boolean {
  return state !== 'needsRecovery' && (error === null || error === undefined);
}

/** The remedies of the jobs that somebody may still do something about stand below the table. */
function jobsText(jobs: readonly JobView[]): string {
  const lines = jobs
    .filter((job) => job.state !== 'cancelled' && !isWell(job))
    .slice(-JOBS_EXPLAINED_MAX)
    .map((job) => {
      const remedies = remedyText(jobError(job).toJSON());
      return remedies === '' ? '' : `${plain(`${job.id}: ${job.vm}, ${job.state}`)}\n${remedies}`;
    });
  return `${jobTable(jobs)}${lines.join('')}`;
}

function bodyText(job: JobView): string {
  if (job.report === null)
    return progressLines(job)
      .map((line) => `${line}\n`)
      .join('');
  return job.kind === 'fork' ? forkReportText(job.report) : reportText(job.report);
}

async function readSpec(file: string): Promise<string> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  try {
    const input = file === '-' ? process.stdin : createReadStream(file);
    for await (const chunk of input as AsyncIterable<Buffer>) {
      bytes += chunk.length;
      if (bytes > SPEC_BYTES_MAX)
        throw new MigrationError('SPEC_INVALID', `${file} is not a VM spec: it is longer than ${SPEC_BYTES_MAX} bytes`);
      chunks.push(chunk);
    }
  } catch (cause) {
    if (cause instanceof MigrationError) throw cause;
    throw new MigrationError('USAGE', `cannot read ${file}: ${(cause as Error).message}`, { cause });
  }
  return Buffer.concat(chunks).toString('utf8');
}

await main(program, outcome);
