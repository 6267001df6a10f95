/** `vmctl images`, `image …` and `pool …`: what forks leave behind, and what makes them fast. */

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
  /** Options wherever they stood: the program's own are behind a subcommand's. */
  const act =
    <Options extends CommonOptions>(work: (args: string[], options: Options) => Promise<void>) =>
    (...all: unknown[]): Promise<void> => {
      const command = all.at(-1) as Command;
      return work(command.args, command.optsWithGlobals<Options>());
    };

  program
    .command('images')
    .description('the images on the host')
    .action(
      act(async (_, options) => {
        print(output(options), await client(options).get<ImageView[]>('/v1/images'), imageTable);
      }),
    );

  const image = program.command('image').description('one image: show, rm, save, load');
  image
    .command('show <id>')
    .description('one image')
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
        print(output(options), answer, () => `image ${id} is removed\n`);
      }),
    );
  image
    .command('save <id> <file>')
    .description('write it to a file on the host, memory and device state')
    .action(
      act(async ([id = '', file = ''], options) => {
        const path = absolute(file);
        const answer = await client(options).post<{ fileBytes: number }>(imagePath(id, 'save'), { path });
        print(output(options), { ...answer, path }, () => `${path}: ${bytes(answer.fileBytes)}\n`);
      }),
    );
  image
    .command('load <file>')
    .description('take in a file on the host that save has written')
    .action(
      act(async ([file = ''], options) => {
        const loaded = await client(options).post<ImageView>('/v1/images/load', { path: absolute(file) });
        print(output(options), loaded, (view) => imageTable([view]));
      }),
    );

  const pool = program.command('pool').description('QEMU processes that wait for a fork: list, warm, drain');
  pool
    .command('list', { isDefault: true })
    .description('the sets that wait')
    .action(
      act(async (_, options) => {
        print(output(options), await client(options).get<WarmSetView[]>('/v1/pool'), poolTable);
      }),
    );
  pool
    .command('warm <vm>')
    .description('make a set for a fork of the VM with the same options')
    .option('--clones <n>', 'how many', integer('--clones', 1))
    .addOption(new Option('--parent <what>', 'as of vfork').choices(PARENT_MODES).default('continue'))
    .addOption(new Option('--memory <how>', 'as of vfork').choices(CLONE_MEMORIES).default('cow'))
    .addOption(new Option('--network <how>', 'as of vfork').choices(CLONE_NETWORKS).default('fresh'))
    .addOption(new Option('--disks <how>', 'as of vfork').choices(CLONE_DISKS).default('overlay'))
    .option('--name <prefix>', 'as of vfork')
    .action(
      act<WarmOptions>(async ([vm = ''], options) => {
        if (options.clones === undefined) throw new MigrationError('USAGE', 'say how many: --clones N');
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
    .description('end the processes that wait for the VM, or all')
    .action(
      act(async ([vm], options) => {
        const answer = await client(options).post<{ endedCount: number }>('/v1/pool/drain', { vm: vm ?? null });
        print(output(options), answer, ({ endedCount }) => `${endedCount} processes have ended\n`);
      }),
    );
}

/** The daemon does not stand in the caller's folder. */
function absolute(file: string): string {
  return resolve(file);
}
