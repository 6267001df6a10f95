/** `vmctl images`, `vmctl image …` and `vmctl pool …`: the images of forks, and the processes that wait for forks. */

import { resolve } from 'node:path';
import { type Command, Option } from 'commander';
import { MigrationError } from '../domain/errors.js';
import { CLONE_DISKS, CLONE_MEMORIES, CLONE_NETWORKS, PARENT_MODES, type WarmSetView } from '../domain/fork.js';
import type { ImageView } from '../domain/image.js';
import type { WarmBody } from '../schemas/fork.js';
import { type CommonOptions, client, integer } from './program.js';
import { bytes } from './render.js';
import { imageTable, poolTable, recordText } from './render-fork.js';
import { print } from './terminal.js';

interface WarmOptions extends CommonOptions {
  readonly clones?: number;
  readonly parent: 'continue' | 'stop';
  readonly memory: 'cow' | 'private';
  readonly network: 'fresh' | 'isolated' | 'none';
  readonly disks: 'overlay' | 'scratch';
  readonly name?: string;
}

const imagePath = (id: string, verb?: string): string =>
  `/v1/images/${encodeURIComponent(id)}${verb === undefined ? '' : `/${verb}`}`;

export function addImages(program: Command): void {
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
    .action(
      act(async (_, options) => {
        print(output(options), await client(options).get<ImageView[]>('/v1/images'), imageTable);
      }),
    );

  const image = program.command('image').description('show, remove, save or load an image');
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
    .description('remove an image on which no clone runs')
    .action(
      act(async ([id = ''], options) => {
        const answer = await client(options).delete<{ id: string }>(imagePath(id));
        print(output(options), answer, () => `removed image ${id}\n`);
      }),
    );
  image
    .command('save <id> <file>')
    .description('write the image (memory and device state) to a file on the host')
    .action(
      act(async ([id = '', file = ''], options) => {
        const path = absolute(file);
        const answer = await client(options).post<{ fileBytes: number }>(imagePath(id, 'save'), { path });
        print(output(options), { ...answer, path }, () => `${path}: ${bytes(answer.fileBytes)}\n`);
      }),
    );
  image
    .command('load <file>')
    .description('load an image from a file on the host that "save" has written')
    .action(
      act(async ([file = ''], options) => {
        const loaded = await client(options).post<ImageView>('/v1/images/load', { path: absolute(file) });
        print(output(options), loaded, (view) => imageTable([view]));
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
