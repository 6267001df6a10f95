/**
 * A fork made step by step on a VmHost, without daemon and journal: the parent stops for good, its memory files become
 * the image, and the clones load its device state. It is for tests of the clones themselves.
 */
import { once } from 'node:events';
import { createWriteStream } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { createServer, type Socket } from 'node:net';
import { join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { cloneIdentities, cloneSpec, runningNics } from '../../src/agent/fork/clones/names.js';
import { createImageFiles, imageFiles, removeImageFiles } from '../../src/agent/vm/ram-files.js';
import type { ManagedVm } from '../../src/agent/vm/vms.js';
import { configureIncoming, configureOutgoing } from '../../src/backends/qemu/migration.js';
import { MigrationWatch } from '../../src/backends/qemu/migration-watch.js';
import type { CloneNetwork } from '../../src/domain/fork.js';
import { listenUnix } from '../../src/kit/unix-socket.js';
import { socketDirectoryIn } from '../support/qemu-user.js';
import { eventually } from './cluster.js';
import { qmpOf } from './qmp.js';
import type { VmHost } from './vm-host.js';

const BOOT_MS = 120_000;
const LOAD_MS = 60_000;
export const FORK = '0123456789abcdef';

export class HandFork {
  private constructor(
    private readonly host: VmHost,
    readonly clones: readonly ManagedVm[],
  ) {}

  /** Makes the fork. `parent` must run, without the preload library. */
  static async make(host: VmHost, parent: ManagedVm, cloneCount: number, network: CloneNetwork): Promise<HandFork> {
    const { vms } = host;
    const statePath = join(host.directory, 'device.state');
    await saveState(parent, statePath, join(socketDirectoryIn(parent.directory), 'out.sock'));
    const files = await imageFiles(vms.place, parent.spec.memory, FORK);
    await createImageFiles(vms.place, FORK, files, { native: null, parent: parent.regions });
    const order = { fork: FORK, cloneCount, namePrefix: 'clone', parent: parent.spec, network, macsTaken: new Set('') };
    const clones: ManagedVm[] = [];
    for (const identity of cloneIdentities(order)) {
      const spec = cloneSpec(parent.spec, FORK, identity, network);
      const memory = { ...spec.memory, backing: 'image' } as const;
      const clone = await vms.prepareClone(
        { ...spec, memory },
        {
          image: FORK,
          accel: 'tcg',
          epochMin: 0,
          isRegistered: false,
          isReplacing: false,
          statePath,
          signal: new AbortController().signal,
          beforeLaunch: () => Promise.resolve(),
          nics: runningNics(parent.spec, identity, network),
        },
      );
      await configureIncoming(qmpOf(clone), ['events', 'x-ignore-shared']);
      const watch = new MigrationWatch(qmpOf(clone));
      await qmpOf(clone).execute('migrate-incoming', { uri: 'fd:3' });
      await watch.reached('completed', LOAD_MS);
      watch.end();
      await vms.setState(clone.spec.name, 'running');
      clones.push(clone);
    }
    return new HandFork(host, clones);
  }

  async run(): Promise<void> {
    await Promise.all(this.clones.map((clone) => qmpOf(clone).execute('cont')));
  }

  /** Removes the clones and the files of their image. */
  async remove(): Promise<void> {
    for (const clone of this.clones) await this.host.vms.destroy(clone.spec.name);
    await removeImageFiles(this.host.vms.place, FORK, 4096);
  }
}

/** Returns the output on a guest's console. */
export function consoleOf(host: VmHost, name: string): Promise<string> {
  return readFile(host.vms.serialPaths(name).log, 'utf8').catch(() => '');
}

/** Waits until a guest's console has the wanted text, and returns the match. */
export function heard(host: VmHost, name: string, wanted: RegExp): Promise<RegExpExecArray> {
  return eventually(`${name} says ${wanted.source}`, BOOT_MS, async () => {
    return wanted.exec(await consoleOf(host, name)) ?? undefined;
  });
}

async function saveState(vm: ManagedVm, statePath: string, socketPath: string): Promise<void> {
  const server = createServer();
  await listenUnix(server, socketPath);
  await configureOutgoing(qmpOf(vm), ['events', 'x-ignore-shared']);
  await qmpOf(vm).execute('stop');
  const saved = once(server, 'connection').then(([socket]) => pipeline(socket as Socket, createWriteStream(statePath)));
  const watch = new MigrationWatch(qmpOf(vm));
  await qmpOf(vm).execute('migrate', { uri: `unix:${socketPath}` });
  await watch.reached('completed', LOAD_MS);
  await saved;
  watch.end();
  server.close();
}
