#!/usr/bin/env node
import { Option } from 'commander';
import { MigrationError } from '../domain/errors.js';
import {
  CLONE_DISKS,
  CLONE_MEMORIES,
  CLONE_NETWORKS,
  type CloneDisks,
  type CloneMemory,
  type CloneNetwork,
  type ForkReport,
  PARENT_MODES,
} from '../domain/fork.js';
import type { ForkJobView, JobView } from '../domain/job.js';
import { TRANSPORTS } from '../domain/transport.js';
import type { ForkBody } from '../schemas/fork.js';
import { attend } from './attend.js';
import { awaitClones } from './await-clones.js';
import { EXIT, type ExitCode } from './exit-codes.js';
import { type CommonOptions, client, integer, main, newProgram } from './program.js';
import { refusalText } from './render.js';
import { type DryRunAnswer, endTable, forkPlanText, forkReportText } from './render-fork.js';
import { print } from './terminal.js';
/** `vfork --clones N VM`: flags → request → report; with --wait also what became of the clones. */
import { addTransportOptions, type TransportOptions } from './transport-options.js';

interface Options extends CommonOptions, TransportOptions {
  readonly clones?: number;
  readonly image?: string;
  readonly parent: 'continue' | 'stop';
  readonly memory: CloneMemory;
  readonly network: CloneNetwork;
  readonly disks: CloneDisks;
  readonly name?: string;
  readonly partial?: boolean;
  readonly hosts?: string;
  readonly topology?: string;
  readonly fanout?: string;
  readonly wait?: boolean;
  readonly logs?: string;
  readonly dryRun?: boolean;
  readonly detach?: boolean;
  readonly recover?: string;
}

const outcome: { code: ExitCode } = { code: EXIT.done };

/** What several hosts will need; on one there is nothing to send. */
function refuseFanOut(options: Options): void {
  const { topology, fanout } = options;
  const flags: readonly (readonly [string, unknown])[] = [
    ['--topology', topology],
    ['--fanout', fanout === 'auto' ? undefined : fanout],
    ...TRANSPORTS.map((transport) => [`--${transport}`, options[transport]] as const),
  ];
  for (const [flag, value] of flags) {
    if (value === undefined) continue;
    throw new MigrationError('USAGE', `${flag} is not there yet: clones run on the host of the VM`, {
      remedy: 'leave it out',
    });
  }
}

function bodyOf(vm: string | undefined, options: Options): ForkBody {
  if ((vm === undefined) === (options.image === undefined))
    throw new MigrationError('USAGE', 'name a VM, or an image with --image: vfork --clones N VM');
  if (options.clones === undefined) throw new MigrationError('USAGE', 'say how many: --clones N');
  refuseFanOut(options);
  if (options.wait === true && options.detach === true)
    throw new MigrationError('USAGE', '--wait waits for the clones, --detach for nothing: choose one');
  if (options.logs !== undefined && options.wait !== true)
    throw new MigrationError('USAGE', '--logs collects what --wait has waited for: add --wait');
  return {
    vm: vm ?? null,
    image: options.image ?? null,
    cloneCount: options.clones,
    namePrefix: options.name ?? null,
    parentMode: options.parent,
    memory: options.memory,
    network: options.network,
    disks: options.disks,
    isPartialAllowed: options.partial === true,
    hosts: options.hosts === undefined ? [] : options.hosts.split(',').map((host) => host.trim()),
  };
}

async function fork(vm: string | undefined, options: Options): Promise<void> {
  const output = { isJson: options.json === true };
  const api = client(options);
  if (options.recover !== undefined) {
    if (vm !== undefined) throw new MigrationError('USAGE', '--recover takes a job and nothing else');
    await follow(await api.post<JobView>(`/v1/jobs/${encodeURIComponent(options.recover)}/recover`), options);
    return;
  }
  const body = bodyOf(vm, options);
  if (options.dryRun === true) {
    const answer = await api.post<DryRunAnswer>('/v1/forks', { ...body, dryRun: true });
    print(output, answer, ({ plan, refusals }) =>
      plan === null ? `refused:\n${refusalText(refusals)}` : forkPlanText(plan),
    );
    if (answer.refusals.length > 0) outcome.code = EXIT.refused;
    return;
  }
  await follow(await api.post<ForkJobView>('/v1/forks', body), options);
}

function follow(started: JobView, options: Options): Promise<void> {
  return attend('vfork', started, options, outcome, async (job) => {
    if (job.kind === 'fork' && job.report !== null) await show(job.report, options);
  });
}

/** A partial fork that has started some clones has done what it was asked for. */
async function show(report: ForkReport, options: Options): Promise<void> {
  const output = { isJson: options.json === true };
  if (options.wait !== true) {
    print(output, report, forkReportText);
    return;
  }
  if (!output.isJson) process.stdout.write(forkReportText(report));
  const ends = await awaitClones(client(options), report.clones, options.logs ?? null);
  if (ends.some(({ exitCode }) => exitCode !== 0)) outcome.code = EXIT.failed;
  print(output, { ...report, ends }, () => endTable(ends));
}

const program = newProgram('vfork', 'Turns a running VM into copies that run on, and lets it run on itself.')
  .argument('[vm]')
  .option('--clones <n>', 'how many', integer('--clones', 0))
  .option('--image <id>', 'run an image that is there already (vmctl images), instead of a VM')
  .addOption(
    new Option('--parent <what>', 'the VM runs on, or stays stopped and its memory is the image')
      .choices(PARENT_MODES)
      .default('continue'),
  )
  .addOption(
    new Option('--memory <how>', 'cow: shared with the image until written; private: its own, so that it can migrate')
      .choices(CLONE_MEMORIES)
      .default('cow'),
  )
  .addOption(
    new Option(
      '--network <how>',
      'fresh: NICs with MACs of their own; isolated: a network each; none: connected to nothing',
    )
      .choices(CLONE_NETWORKS)
      .default('fresh'),
  )
  .addOption(
    new Option('--disks <how>', 'overlay: each writes to its own; scratch: writes are dropped at the end')
      .choices(CLONE_DISKS)
      .default('overlay'),
  )
  .option('--name <prefix>', 'clones are called PREFIX-0, PREFIX-1, … (default: the VM’s name and the image’s id)')
  .option('--partial', 'some clones are enough: those that cannot be started are named')
  .option('--wait', 'until all clones have ended; exit code 0 only if all of theirs are')
  .option('--logs <dir>', 'with --wait: write each clone’s serial log there')
  .option('--dry-run', 'show the plan, start nothing')
  .option('--detach', 'start it and print its job')
  .option('--recover <job>', 'go on with a fork whose image could not be completed')
  .option('--hosts <list>', 'hosts for the clones (this host only, in this build)')
  .addOption(new Option('--topology <file>', 'the network’s tree (not there yet)'))
  .addOption(
    new Option('--fanout <how>', 'how the image gets to the hosts (not there yet)').choices([
      'auto',
      'unicast',
      'multicast',
    ]),
  );

addTransportOptions(program, () => 'between hosts (not there yet)')
  .addHelpText(
    'after',
    '\nExit codes: 0 done, 1 failed: the VM runs and there is no clone (with --wait: a clone ended otherwise than by 0),\n' +
      '2 usage, 3 refused by pre-flight, 4 the clones run and their image needs --recover, 5 no daemon.',
  )
  .action(fork);

await main(program, outcome);
