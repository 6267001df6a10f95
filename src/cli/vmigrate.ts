#!/usr/bin/env node
/** `vmigrate VM HOST`: flags → request → report. */
import { Option } from 'commander';
import { MigrationError } from '../domain/errors.js';
import type { JobView } from '../domain/job.js';
import { type MigrationMode, type MigrationPlan, MODE_TRAITS } from '../domain/migration.js';
import type { Refusal } from '../domain/refusal.js';
import { SHARED_STORAGES, type SharedStorage } from '../domain/storage.js';
import type { MigrationBody } from '../schemas/migration.js';
import { attend } from './attend.js';
import { EXIT, type ExitCode } from './exit-codes.js';
import { type CommonOptions, client, integer, main, newProgram } from './program.js';
import { planText, refusalText, reportText } from './render.js';
import { print, whileWaiting } from './terminal.js';
import { addTransportOptions, chosenSecurity, chosenTransport, type TransportOptions } from './transport-options.js';

const MIB = 2 ** 20;

interface Options extends CommonOptions, TransportOptions {
  readonly precopy?: boolean;
  readonly postcopy?: boolean;
  readonly hybrid?: boolean;
  readonly native?: boolean;
  readonly bandwidth?: number;
  readonly maxDowntime?: number;
  readonly sharedStorage?: SharedStorage;
  readonly verifyMemory?: boolean;
  readonly dryRun?: boolean;
  readonly detach?: boolean;
  readonly recover?: string;
}

const outcome: { code: ExitCode } = { code: EXIT.done };

function mode(options: Options): MigrationMode {
  if (options.precopy === true) return 'precopy';
  if (options.hybrid === true) return 'hybrid';
  if (options.native === true) return options.postcopy === true ? 'native-postcopy' : 'native-precopy';
  return 'postcopy';
}

async function migrate(vm: string | undefined, host: string | undefined, options: Options): Promise<void> {
  const output = { isJson: options.json === true };
  const api = client(options);
  if (options.recover !== undefined) {
    if (vm !== undefined) throw new MigrationError('USAGE', '--recover takes a job ID and nothing else');
    const job = await api.post<JobView>(`/v1/jobs/${encodeURIComponent(options.recover)}/recover`);
    await follow(job, options);
    return;
  }
  if (vm === undefined || host === undefined)
    throw new MigrationError('USAGE', 'give a VM and a host: vmigrate VM HOST');
  const chosen = mode(options);
  if (options.maxDowntime !== undefined && MODE_TRAITS[chosen].mover === 'pager' && MODE_TRAITS[chosen].fetches)
    throw new MigrationError('USAGE', `--max-downtime is for pre-copies; a ${chosen} does not wait for memory`, {
      remedy: 'leave it out, or use --precopy or --native',
    });
  const body: MigrationBody = {
    vm,
    target: host,
    mode: chosen,
    transport: chosenTransport(options),
    ...chosenSecurity(options),
    ...(options.bandwidth === undefined ? {} : { bandwidthBytesPerS: options.bandwidth * MIB }),
    ...(options.maxDowntime === undefined ? {} : { downtimeMsMax: options.maxDowntime }),
    ...(options.sharedStorage === undefined ? {} : { sharedStorage: options.sharedStorage }),
    ...(options.verifyMemory === true ? { verifyMemory: true } : {}),
  };
  const waiting = `asking ${host} and the source what they can do …`;
  if (options.dryRun === true) {
    const asked = api.post<{ plan: MigrationPlan | null; refusals: Refusal[] }>('/v1/migrations', {
      ...body,
      dryRun: true,
    });
    const answer = await whileWaiting(output, waiting, asked);
    print(output, answer, ({ plan, refusals }) =>
      plan === null ? `refused:\n${refusalText(refusals)}` : planText(plan),
    );
    if (answer.refusals.length > 0) outcome.code = EXIT.refused;
    return;
  }
  await follow(await whileWaiting(output, waiting, api.post<JobView>('/v1/migrations', body)), options);
}

function follow(started: JobView, options: Options): Promise<void> {
  return attend('vmigrate', started, options, outcome, (job) => {
    if (job.kind === 'migrate' && job.report !== null) print({ isJson: options.json === true }, job.report, reportText);
  });
}

const program = newProgram('vmigrate', 'Moves a running VM to another host.')
  .argument('[vm]')
  .argument('[host]')
  .option('--postcopy', 'switch over at once, then fetch memory on demand (default); with --native: QEMU’s post-copy')
  .addOption(
    new Option(
      '--precopy',
      'fetch all memory first, and switch over when the rest fits in --max-downtime; else the VM stays',
    ).conflicts(['postcopy', 'hybrid', 'native']),
  )
  .addOption(
    new Option(
      '--hybrid',
      'fetch memory while the VM runs on, and again what it writes, while that pays; then post-copy',
    ).conflicts(['postcopy', 'native']),
  )
  .option('--native', 'QEMU’s own migration: pre-copy, or post-copy with --postcopy');

addTransportOptions(program)
  .option('--bandwidth <mib_s>', 'limit of the prefetch rate in MiB/s', integer('--bandwidth', 1))
  .addOption(
    new Option(
      '--shared-storage <how>',
      'prove: refuse unless both hosts see the same disks (default); assume: take your word that they do',
    ).choices(SHARED_STORAGES),
  )
  .option(
    '--verify-memory',
    'prove in the end that the memory is what it was on the source; if it is not, the VM is stopped for good',
  )
  .option(
    '--max-downtime <ms>',
    'longest downtime of --precopy and --native in ms (default 300)',
    integer('--max-downtime', 1),
  )
  .option('--dry-run', 'print the plan and start nothing')
  .option('--detach', 'start the job, print its ID and return')
  .option('--recover <job>', 'try at once to go on with a migration that needs recovery')
  .addHelpText(
    'after',
    '\nExit codes: 0 done; 1 failed, the VM still runs on the source; 2 usage; 3 refused by pre-flight;\n' +
      '4 the VM has moved and waits for memory: the job goes on by itself when the cause is gone;\n' +
      '5 daemon unreachable; 6 the VM is lost.',
  )
  .action(migrate);

await main(program, outcome);
