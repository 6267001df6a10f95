/** `vmctl images`, `vmctl image …` and `vmctl pool …`: the images of forks, and the processes that wait for forks. */

import { resolve } from 'node:path';
import { type Command, Option } from 'commander';
import { MigrationError } from '../domain/errors.js';
import { CLONE_DISKS, CLONE_MEMORIES, CLONE_NETWORKS, PARENT_MODES, type WarmSetView } from '../domain/fork.js';
import type { FlattenReport, ImageRemoval, ImageView, PruneReport } from '../domain/image.js';
import type { ForkJobView } from '../domain/job.js';
import type { ImagesOnHosts, RemovedOnHosts } from '../schemas/all-hosts.js';
import type { WarmBody } from '../schemas/fork.js';
import { type AttendOptions, attend } from './attend.js';
import { EXIT, type ExitCode } from './exit-codes.js';
import { fetchImage } from './fetch-image.js';
import { type CommonOptions, client, integer } from './program.js';
import { bytes } from './render.js';
import { flattenText, imageTable, poolTable, pruneText, recordText, removalText } from './render-fork.js';
import { imagesOnHostsText, isAnySilent, removedText } from './render-hosts.js';
import { print, whileWaiting } from './terminal.js';

interface WarmOptions extends CommonOptions {
  readonly clones?: number;
  readonly parent: 'continue' | 'stop';
  readonly memory: 'cow' | 'private';
  readonly network: 'fresh' | 'isolated' | 'none';
  readonly disks: 'overlay' | 'scratch';
  readonly name?: string;
}

interface RemoveOptions extends CommonOptions {
  readonly dropSaved?: boolean;
  readonly force?: boolean;
  readonly allHosts?: boolean;
}

const imagePath = (id: string, verb?: string): string =>
  `/v1/images/${encodeURIComponent(id)}${verb === undefined ? '' : `/${verb}`}`;

export function addImages(program: Command, outcome: { code: ExitCode }): void {
  const output = (options: CommonOptions) => ({ isJson: options.json === true });
  /** Collects all options: commander keeps the program's own apart from those of a subcommand. */
  const act =
    <Options extends CommonOptions>(work: (args: string[], options: Options) => Promise<void>) =>
    (...all: unknown[]): Promise<void> => {
      const command = all.at(-1) as Command;
      return work(command.args, command.optsWithGlobals<Options>());
    };

  program
    .command('images')
    .description('list the images on the host')
    .option('--all-hosts', 'also those on the hosts that it knows, and how much of them each has')
    .action(
      act<CommonOptions & { allHosts?: boolean }>(async (_, options) => {
        if (options.allHosts !== true) {
          print(output(options), await client(options).get<ImageView[]>('/v1/images'), imageTable);
          return;
        }
        const asked = client(options).get<ImagesOnHosts>('/v1/images?allHosts=true');
        const answer = await whileWaiting(output(options), 'asking this host and its peers …', asked);
        print(output(options), answer, imagesOnHostsText);
      }),
    );

  const image = program.command('image').description('show, remove, prune, save, load, copy or fetch images');
  image
    .command('show <id>')
    .description('show one image')
    .action(
      act(async ([id = ''], options) => {
        print(output(options), await client(options).get<ImageView>(imagePath(id)), recordText);
      }),
    );
  image
    .command('rm <id>')
    .description('remove an image on which no clone runs; disk layers that somebody needs are kept')
    .option('--drop-saved', 'give up the files that it was saved to without disks: they cannot be loaded any more')
    .option('--force', 'remove it although another host reads it, may need its disk layers, or cannot be asked')
    .option('--all-hosts', 'remove it on the other hosts too')
    .action(
      act<RemoveOptions>(async ([id = ''], options) => {
        const body = { force: options.force === true, dropSaved: options.dropSaved === true };
        if (options.allHosts === true) {
          const removed = await client(options).delete<RemovedOnHosts>(imagePath(id), { ...body, allHosts: true });
          print(output(options), removed, removedText);
          if (removed.failures.length > 0 || isAnySilent(removed.unanswered)) outcome.code = EXIT.failed;
          return;
        }
        const answer = await client(options).delete<ImageRemoval>(imagePath(id), body);
        print(output(options), answer, removalText);
      }),
    );
  image
    .command('prune')
    .description('remove the images that no clone, fork or saved file needs')
    .option('--dry-run', 'only say which')
    .action(
      act<CommonOptions & { dryRun?: boolean }>(async (_, options) => {
        const dryRun = options.dryRun === true;
        const report = await client(options).post<PruneReport>('/v1/images/prune', { dryRun });
        print(output(options), report, () => pruneText(report, dryRun));
      }),
    );
  image
    .command('save <id> <file>')
    .description('write the image (memory, device state, checksums of its disks) to a file on the host')
    .option('--with-disks', 'put the writable disks into the file: it needs no disk when it is loaded')
    .action(
      act<CommonOptions & { withDisks?: boolean }>(async ([id = '', file = ''], options) => {
        const path = absolute(file);
        const body = { path, withDisks: options.withDisks === true };
        const answer = await client(options).post<{ fileBytes: number }>(imagePath(id, 'save'), body);
        print(output(options), { ...answer, path }, () => `${path}: ${bytes(answer.fileBytes)}\n`);
      }),
    );
  image
    .command('load <file>')
    .description('load an image from a file on the host that "save" has written')
    .addOption(
      new Option('--disks <how>', 'check: refuse disks with another content; assume: take them as they are').choices([
        'check',
        'assume',
      ]),
    )
    .option('--trust', 'take a file that no host of this cluster has signed, whatever it names')
    .action(
      act<CommonOptions & { disks?: 'check' | 'assume'; trust?: boolean }>(async ([file = ''], options) => {
        const body = { path: absolute(file), assumeDisks: options.disks === 'assume', trust: options.trust === true };
        const loaded = await client(options).post<ImageView>('/v1/images/load', body);
        print(output(options), loaded, (view) => imageTable([view]));
      }),
    );
  image
    .command('copy <id> <host>')
    .description('copy memory and device state of the image to another host; its disks stay here')
    .option('--detach', 'start the job, print its ID and return')
    .action(
      act<AttendOptions>(async ([id = '', host = ''], options) => {
        const body = { image: id, cloneCount: 0, hosts: [{ host, cloneCount: 0 }] };
        const job = await client(options).post<ForkJobView>('/v1/forks', body);
        await attend('vmctl', job, options, outcome, async () => {
          const { images, unanswered } = await client(options).get<ImagesOnHosts>('/v1/images?allHosts=true');
          print(output(options), { images: images.filter((view) => view.id === id), unanswered }, imagesOnHostsText);
        });
      }),
    );

  image
    .command('fetch <id>')
    .description('read the rest of an image that was forked with --fetch demand')
    .option('--on <host>', 'on another host, which this one asks')
    .option('--detach', 'do not wait until all of it is there')
    .action(
      act<AttendOptions & { on?: string }>(async ([id = ''], options) => {
        const how = { isDetached: options.detach === true, output: output(options) };
        const view = await fetchImage(client(options), { image: id, host: options.on }, how);
        print(output(options), view, (one) => imageTable([one]));
      }),
    );

  program
    .command('flatten <vm>')
    .description('merge the disk overlays that forks of the VM have left, as far as nobody needs them')
    .action(
      act(async ([vm = ''], options) => {
        const path = `/v1/vms/${encodeURIComponent(vm)}/flatten`;
        print(output(options), await client(options).post<FlattenReport>(path), flattenText);
      }),
    );

  const pool = program.command('pool').description('list, start or end the QEMU processes that wait for a fork');
  pool
    .command('list', { isDefault: true })
    .description('list the sets of waiting processes')
    .action(
      act(async (_, options) => {
        print(output(options), await client(options).get<WarmSetView[]>('/v1/pool'), poolTable);
      }),
    );
  pool
    .command('warm <vm>')
    .description('start the processes for a fork of the VM with the same options')
    .option('--clones <n>', 'number of clones', integer('--clones', 1))
    .addOption(new Option('--parent <what>', 'as of vfork').choices(PARENT_MODES).default('continue'))
    .addOption(new Option('--memory <how>', 'as of vfork').choices(CLONE_MEMORIES).default('cow'))
    .addOption(new Option('--network <how>', 'as of vfork').choices(CLONE_NETWORKS).default('fresh'))
    .addOption(new Option('--disks <how>', 'as of vfork').choices(CLONE_DISKS).default('overlay'))
    .option('--name <prefix>', 'as of vfork')
    .action(
      act<WarmOptions>(async ([vm = ''], options) => {
        if (options.clones === undefined) throw new MigrationError('USAGE', 'give the number of clones: --clones N');
        const body: WarmBody = {
          vm,
          cloneCount: options.clones,
          namePrefix: options.name ?? null,
          parentMode: options.parent,
          memory: options.memory,
          network: options.network,
          disks: options.disks,
        };
        print(output(options), await client(options).post<WarmSetView>('/v1/pool', body), (set) => poolTable([set]));
      }),
    );
  pool
    .command('drain [vm]')
    .description('end the waiting processes of the VM, or of all VMs')
    .action(
      act(async ([vm], options) => {
        const answer = await client(options).post<{ endedCount: number }>('/v1/pool/drain', { vm: vm ?? null });
        print(output(options), answer, ({ endedCount }) => `ended ${endedCount} processes\n`);
      }),
    );
}

/** Makes the path absolute, because the daemon runs in another folder than the caller. */
function absolute(file: string): string {
  return resolve(file);
}
