/** `vmctl state …`: checks and repairs the state directory of a daemon that does not run. Needs no daemon. */

import { resolve } from 'node:path';
import type { Command } from 'commander';
import { MigrationError } from '../domain/errors.js';
import type { VmIdentity } from '../domain/host.js';
import type { RecordFinding } from '../state/records.js';
import type { RepairReport } from '../state/repair.js';
import { levelLines } from './error-text.js';
import type { CommonOptions } from './program.js';
import { plain, table } from './render.js';
import { print } from './terminal.js';

interface StateOptions extends CommonOptions {
  readonly state?: string;
  readonly owner?: string[];
  readonly accept?: string[];
  readonly offline?: boolean;
}

export interface StateCheckView {
  readonly directory: string;
  readonly isDamaged: boolean;
  readonly records: readonly RecordFinding[];
}

const STATE_DEFAULT = '/var/lib/vmigrate';

/** `onDamaged` is called if something is damaged, or a repair leaves something to do. */
export function addState(program: Command, onDamaged: () => void): void {
  const state = program.command('state').description('check or repair the state directory of a stopped daemon');
  state
    .command('check [dir]')
    .description('report every record, and what is wrong with it; exit code 1 if one is damaged')
    .option('--state <dir>', `the same as DIR; default: ${STATE_DEFAULT}`)
    .action((dir: string | undefined, _, command: Command) =>
      locked(directoryOf(dir, command), async (directory) => {
        const { readState } = await import('../state/records.js');
        const { findings } = await readState(directory);
        const isDamaged = findings.some(({ state: how }) => how === 'damaged' || how === 'missing');
        print(output(command), { directory, isDamaged, records: findings }, checkText);
        if (isDamaged) onDamaged();
      }),
    );
  state
    .command('repair [dir]')
    .description('repair the records; damaged originals are kept beside, as NAME.damaged-TIME')
    .option('--state <dir>', `the same as DIR; default: ${STATE_DEFAULT}`)
    .option('--owner <vm=host>', 'the host to which a VM belongs; may be repeated', collect)
    .option('--offline', 'do not ask the other hosts to which VMs belong whose owner record is damaged or missing')
    .option(
      '--accept <record>',
      'a damaged record that you have inspected, as check names it; may be repeated',
      collect,
    )
    .action((dir: string | undefined, _, command: Command) =>
      locked(directoryOf(dir, command), async (directory) => {
        const { owner = [], accept = [], offline = false } = command.opts<StateOptions>();
        const owners = ownersOf(owner);
        const { repairState } = await import('../state/repair.js');
        const { mirroredOwners } = await import('../state/mirrored.js');
        const at = new Date().toISOString();
        const mirrored = await mirroredOwners(directory);
        const peers = offline ? null : await peersOf(directory);
        const report = await repairState(directory, {
          ...{ owners, accepted: accept, at, mirrored, hosts: peers },
        }).finally(() => peers?.close());
        print(output(command), report, repairText);
        if (report.left.length > 0) onDamaged();
      }),
    );
}

function output(command: Command): { isJson: boolean } {
  return { isJson: command.optsWithGlobals<CommonOptions>().json === true };
}

function collect(value: string, earlier: string[] | undefined): string[] {
  return [...(earlier ?? []), value];
}

function directoryOf(dir: string | undefined, command: Command): string {
  const { state } = command.opts<StateOptions>();
  if (dir !== undefined && state !== undefined) throw new MigrationError('USAGE', 'name the directory once');
  return resolve(dir ?? state ?? STATE_DEFAULT);
}

function ownersOf(words: readonly string[]): Map<string, string> {
  return new Map(
    words.map((word) => {
      const match = /^([A-Za-z0-9][A-Za-z0-9._-]*)=([A-Za-z0-9][A-Za-z0-9._-]*)$/.exec(word);
      if (match?.[1] === undefined || match[2] === undefined)
        throw new MigrationError('USAGE', `--owner ${word} is not VM=HOST`);
      return [match[1], match[2]];
    }),
  );
}

/** The peers that the last daemon of the directory knew. Null: they cannot be asked, and stderr has the reason. */
async function peersOf(directory: string) {
  const { toMigrationError } = await import('../domain/errors.js');
  try {
    const { readKnownHosts } = await import('../state/known-hosts.js');
    const known = await readKnownHosts(directory);
    if (known === null || known.tls === null || Object.keys(known.peers).length === 0) return null;
    const { TlsStore } = await import('../tls/store.js');
    const { RemoteAgents } = await import('../api/peers/client.js');
    const { askPeers } = await import('../agent/peer-claims.js');
    const store = new TlsStore(known.tls, () => undefined);
    const local = () => {
      throw new MigrationError('INTERNAL', 'there is no daemon');
    };
    const agents = new RemoteAgents({ self: known.name, local, peers: known.peers, store });
    const ask = (vms: readonly VmIdentity[]) =>
      askPeers({ peerNames: () => agents.names, peer: (host) => agents.agent(host) }, vms);
    const close = () => {
      agents.close();
      store.close();
    };
    return { self: known.name, ask, close };
  } catch (error) {
    process.stderr.write(`warning: the other hosts cannot be asked: ${plain(toMigrationError(error).message)}\n`);
    return null;
  }
}

/** Runs the work under the lock that a daemon holds. Throws CONFLICT while a daemon runs there. */
async function locked(directory: string, work: (directory: string) => Promise<void>): Promise<void> {
  const { stat } = await import('node:fs/promises');
  const found = await stat(directory).catch(() => null);
  if (found?.isDirectory() !== true) throw new MigrationError('NOT_FOUND', `no directory ${directory}`);
  const { DirectoryLock } = await import('../durable/directory-lock.js');
  const { loadNativeBinding } = await import('../native/binding.js');
  const lock = await DirectoryLock.take(directory, (descriptor) => loadNativeBinding().lockFile(descriptor));
  try {
    await work(directory);
  } finally {
    await lock.giveBack();
  }
}

function checkText({ directory, records }: StateCheckView): string {
  const rows = records.map(({ record, state, error }) => [
    state,
    plain(record),
    error === null ? '' : plain(levelLines(error).join(': ')),
  ]);
  return `${directory}\n${table(['STATE', 'RECORD', ''], rows)}`;
}

function repairText({ done, left, answers }: RepairReport): string {
  const lines = [
    ...answers.map((line) => `answer: ${plain(line)}`),
    ...done.map((line) => `done: ${plain(line)}`),
    ...left.map((line) => `to do: ${plain(line)}`),
  ];
  return lines.length === 0 ? 'nothing to repair\n' : `${lines.join('\n')}\n`;
}
