#!/usr/bin/env node
/** `vfork --clones N VM`: flags → request → report; with --wait also how the clones ended. */
import { readFile } from 'node:fs/promises';
import { Option } from 'commander';
import { MigrationError, toMigrationError } from '../domain/errors.js';
import { FANOUT_CHOICES, type FanoutChoice, type TopologyFile } from '../domain/fanout.js';
import {
  CLONE_DISKS,
  CLONE_MEMORIES,
  CLONE_NETWORKS,
  type CloneDisks,
  type CloneMemory,
  type CloneNetwork,
  type ForkReport,
  type HostWish,
  IMAGE_FETCHES,
  type ImageFetchMode,
  PARENT_MODES,
  PLACEMENTS,
  type Placement,
} from '../domain/fork.js';
import type { ForkJobView, JobView } from '../domain/job.js';
import { SHARED_STORAGES, type SharedStorage } from '../domain/storage.js';
import { TRANSPORTS, transportRow } from '../domain/transport.js';
import type { ForkBody } from '../schemas/fork.js';
import { attend } from './attend.js';
import { awaitClones } from './await-clones.js';
import { removeFork } from './clones.js';
import { EXIT, type ExitCode } from './exit-codes.js';
import { type CommonOptions, client, integer, main, newProgram } from './program.js';
import { refusalText } from './render.js';
import { type DryRunAnswer, forkPlanText, forkReportText } from './render-fork.js';
import { endsText, removedText } from './render-hosts.js';
import { print, printError } from './terminal.js';
import { addTransportOptions, chosenSecurity, chosenTransport, type TransportOptions } from './transport-options.js';

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
  readonly placement?: Placement;
  readonly fetch?: ImageFetchMode;
  readonly sharedStorage?: SharedStorage;
  readonly topology?: string;
  readonly fanout?: FanoutChoice;
  readonly wait?: boolean;
  readonly logs?: string;
  readonly replace?: boolean;
  readonly rm?: boolean;
  readonly dryRun?: boolean;
  readonly detach?: boolean;
  readonly recover?: string;
}

const outcome: { code: ExitCode } = { code: EXIT.done };

/** Refuses options that say nothing without --hosts. */
function refuseUseless(options: Options): void {
  const { hosts, topology, fanout, placement, fetch, sharedStorage, dataSecurity } = options;
  if (hosts !== undefined) return;
  const flags: readonly (readonly [string, unknown])[] = [
    ['--placement', placement],
    ['--fetch', fetch],
    ['--shared-storage', sharedStorage],
    ['--data-security', dataSecurity],
    ['--fanout', fanout],
    ['--topology', topology],
    ...TRANSPORTS.map((transport) => [`--${transport}`, options[transport]] as const),
  ];
  for (const [flag, value] of flags) {
    if (value !== undefined) throw new MigrationError('USAGE', `${flag} needs --hosts`);
  }
}

/** Parses `a,b:16,c`. */
function parseHosts(text: string): HostWish[] {
  return text.split(',').map((part) => {
    const [host = '', count, ...rest] = part.trim().split(':');
    const isCount = count === undefined || /^\d{1,4}$/.test(count);
    if (host === '' || !isCount || rest.length > 0) {
      throw new MigrationError('USAGE', `--hosts: "${part}" is neither HOST nor HOST:CLONES`);
    }
    return { host, cloneCount: count === undefined ? null : Number(count) };
  });
}

/** The number of clones, which need not be given if every host has its own. */
function cloneCountOf({ clones }: Options, wishes: readonly HostWish[]): number {
  if (clones !== undefined) return clones;
  const counts = wishes.map(({ cloneCount }) => cloneCount);
  if (counts.length === 0 || counts.includes(null)) {
    throw new MigrationError('USAGE', 'give the number of clones: --clones N');
  }
  return counts.reduce<number>((sum, count) => sum + (count ?? 0), 0);
}

async function topologyOf({ topology }: Options): Promise<TopologyFile | null> {
  if (topology === undefined) return null;
  const text = await readFile(topology, 'utf8').catch((cause: unknown) => {
    throw new MigrationError('USAGE', `cannot read the topology ${topology}: ${toMigrationError(cause).message}`, {
      cause,
    });
  });
  return { name: topology, text };
}

async function bodyOf(vm: string | undefined, options: Options): Promise<ForkBody> {
  if ((vm === undefined) === (options.image === undefined))
    throw new MigrationError('USAGE', 'name a VM, or an image with --image: vfork --clones N VM');
  refuseUseless(options);
  const isAll = options.hosts?.trim() === 'all';
  const wishes = options.hosts === undefined || isAll ? [] : parseHosts(options.hosts);
  if (options.wait === true && options.detach === true)
    throw new MigrationError('USAGE', '--wait and --detach exclude each other');
  if (options.rm === true && options.wait !== true) throw new MigrationError('USAGE', '--rm needs --wait');
  if (options.logs !== undefined && options.wait !== true) throw new MigrationError('USAGE', '--logs needs --wait');
  return {
    vm: vm ?? null,
    image: options.image ?? null,
    cloneCount: cloneCountOf(options, wishes),
    namePrefix: options.name ?? null,
    parentMode: options.parent,
    memory: options.memory,
    network: options.network,
    disks: options.disks,
    isPartialAllowed: options.partial === true,
    replace: options.replace === true,
    hosts: isAll
      ? 'all'
      : wishes.map((wish) => (wish.cloneCount === null ? wish.host : { host: wish.host, cloneCount: wish.cloneCount })),
    placement: options.placement ?? 'spread',
    fetch: options.fetch ?? 'all',
    transport: chosenTransport(options),
    ...chosenSecurity(options),
    sharedStorage: options.sharedStorage ?? 'prove',
    fanout: options.fanout ?? 'auto',
    topology: await topologyOf(options),
  };
}

async function fork(vm: string | undefined, options: Options): Promise<void> {
  const output = { isJson: options.json === true };
  const api = client(options);
  if (options.recover !== undefined) {
    if (vm !== undefined) throw new MigrationError('USAGE', '--recover takes a job ID and nothing else');
    await follow(await api.post<JobView>(`/v1/jobs/${encodeURIComponent(options.recover)}/recover`), options);
    return;
  }
  const body = await bodyOf(vm, options);
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

/** Prints the report and the clones' ends. A fork whose clones run counts as a success, also if some have failed. */
async function show(report: ForkReport, options: Options): Promise<void> {
  const output = { isJson: options.json === true };
  // A fork without clones brings an image to other hosts.
  if (report.clones.length === 0 && options.clones !== 0) outcome.code = EXIT.failed;
  if (options.wait !== true) {
    print(output, report, forkReportText);
    return;
  }
  if (!output.isJson) process.stdout.write(forkReportText(report));
  const ends = await awaitClones(client(options), report.clones, options.logs ?? null);
  // Without --partial a clone that has never run counts as failed.
  const isAnyMissing = report.failures.length > 0 && options.partial !== true;
  if (isAnyMissing || ends.some(({ exitCode }) => exitCode !== 0)) outcome.code = EXIT.failed;
  print(output, { ...report, ends }, () => endsText(ends));
  if (options.rm !== true) return;
  try {
    const removed = await removeFork(client(options), report, options.image !== undefined);
    if (!output.isJson) process.stdout.write(removedText(removed));
  } catch (error) {
    // The clones' ends are told already, and with --json there is one document only.
    printError('vfork', { isJson: false }, error);
    outcome.code = EXIT.failed;
  }
}

const program = newProgram('vfork', 'Starts copies (clones) of a running VM, which itself keeps running.')
  .argument('[vm]')
  .option('--clones <n>', 'number of clones', integer('--clones', 0))
  .option('--image <id>', 'start clones of an existing image (vmctl images) instead of a VM')
  .addOption(
    new Option(
      '--parent <what>',
      'continue: the VM keeps running; stop: it stays stopped and its memory becomes the image',
    )
      .choices(PARENT_MODES)
      .default('continue'),
  )
  .addOption(
    new Option(
      '--memory <how>',
      'cow: share the image’s memory until it is written; private: a memory file for each clone',
    )
      .choices(CLONE_MEMORIES)
      .default('cow'),
  )
  .addOption(
    new Option(
      '--network <how>',
      'fresh: NICs with new MACs; isolated: a network namespace for each clone; none: NICs without a network',
    )
      .choices(CLONE_NETWORKS)
      .default('fresh'),
  )
  .addOption(
    new Option(
      '--disks <how>',
      'overlay: each clone writes to its own overlay; scratch: writes are dropped when the clone ends',
    )
      .choices(CLONE_DISKS)
      .default('overlay'),
  )
  .option('--name <prefix>', 'name the clones PREFIX-0, PREFIX-1, … (default: the VM’s name and the image’s ID)')
  .option('--partial', 'succeed if some clones start, and list those that do not; a host that fails is left out')
  .option('--wait', 'wait until all clones have ended; exit code 0 only if theirs all are 0')
  .option('--logs <dir>', 'with --wait: write the serial log of each clone, on whichever host it runs, to this folder')
  .option('--rm', 'with --wait: then remove the clones on all hosts, and the image unless it was there before')
  .option('--replace', 'remove ended VMs that have names of the clones, with their exit codes and logs')
  .option('--dry-run', 'print the plan and start nothing')
  .option('--detach', 'start the job, print its ID and return')
  .option('--recover <job>', 'try at once to go on with a fork that needs recovery')
  .option(
    '--hosts <list>',
    'hosts for the clones: a,b,c or a:16,b:16, or all; the VM’s host makes clones only if it is among them',
  )
  .addOption(
    new Option(
      '--placement <how>',
      'with --hosts: spread (default): as many clones for each processor on all hosts; pack: fill hosts in their order',
    ).choices(PLACEMENTS),
  )
  .addOption(
    new Option(
      '--fetch <what>',
      'with --hosts: all (default): each host reads the whole image; demand: only what its clones touch',
    ).choices(IMAGE_FETCHES),
  )
  .addOption(
    new Option(
      '--shared-storage <how>',
      'with --hosts: prove: serve a disk to a host that is not proven to see it (default); assume: take your word',
    ).choices(SHARED_STORAGES),
  )
  .addOption(
    new Option(
      '--fanout <how>',
      'with --hosts: how the image gets to them. unicast: each reads it from the VM’s host; multicast: it is sent ' +
        'once; tree: hosts relay it to others; auto (default): the plan says which, and why',
    ).choices(FANOUT_CHOICES),
  )
  .option('--topology <file>', 'with --hosts: which hosts share a switch: a topology.conf of Slurm, or YAML');

addTransportOptions(program, (transport) => `with --hosts: ${transportRow(transport).help}`)
  .addHelpText(
    'after',
    '\nExit codes: 0 done; 1 failed, the VM runs and no clone exists (with --wait also: a clone failed); 2 usage;\n' +
      '3 refused by pre-flight; 4 the clones run, and their image waits for memory; 5 daemon unreachable;\n' +
      '6 the image cannot be completed, and its clones have been ended.',
  )
  .action(fork);

await main(program, outcome);
