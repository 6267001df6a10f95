/**
 * The content of a VM's disk as its QEMU reads it, wherever the files below are, and writes through that QEMU that the
 * guest does not make.
 */
import { execFile } from 'node:child_process';
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { ManagedVm } from '../../src/agent/vm/vms.js';
import { QmpClient } from '../../src/backends/qemu/qmp/client.js';
import { socketDirectoryIn } from '../support/qemu-user.js';
import { qmpOf } from './qmp.js';

const run = promisify(execFile);
const SECTORS = 2048;
const SECTOR_BYTES = 512;
const READ_MS = 60_000;

export async function diskContent(vm: ManagedVm, disk: string): Promise<Buffer> {
  const node = (await vm.process.disks.active()).get(disk) as { node?: string } | undefined;
  if (node?.node === undefined) throw new Error(`${vm.spec.name} has no disk ${disk}`);
  return nodeContent(qmpOf(vm), node.node, vm.directory);
}

/** The same of a VM of a daemon in another process. `directory` is the VM's. */
export async function diskContentIn(directory: string, disk: string): Promise<Buffer> {
  const qmp = await QmpClient.connect(join(socketDirectoryIn(directory), 'monitor.sock'), { timeoutMs: READ_MS });
  try {
    const drives = (await qmp.executeUntyped('query-block')) as Drive[];
    const drive = drives.find(({ qdev }) => qdev?.startsWith(`/machine/peripheral/${disk}/`) === true);
    const node = drive?.inserted?.['node-name'];
    if (node === undefined) throw new Error(`the VM at ${directory} has no disk ${disk}`);
    return await nodeContent(qmp, node, directory);
  } finally {
    qmp.close();
  }
}

interface Drive {
  readonly qdev?: string;
  readonly inserted?: { readonly 'node-name'?: string };
}

async function nodeContent(qmp: QmpClient, node: string, directory: string): Promise<Buffer> {
  const [socket, copy] = [join(socketDirectoryIn(directory), 'export.sock'), join(directory, 'export.raw')];
  await qmp.executeUntyped('nbd-server-start', { addr: { type: 'unix', data: { path: socket } } });
  try {
    await qmp.executeUntyped('block-export-add', {
      type: 'nbd',
      id: 'content',
      'node-name': node,
      name: 'content',
    });
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', `nbd:unix:${socket}:exportname=content`, copy], {
      timeout: READ_MS,
    });
    return await readFile(copy);
  } finally {
    await qmp.executeUntyped('nbd-server-stop');
    await rm(copy, { force: true });
  }
}

/** Fills 64 KiB of the disk with one byte. */
export async function writeDisk(vm: ManagedVm, disk: string, byte: number, offsetMiB: number): Promise<void> {
  const command = `qemu-io -d /machine/peripheral/${disk}/virtio-backend "write -P ${byte} ${offsetMiB}M 64k"`;
  const answer = await qmpOf(vm).executeUntyped('human-monitor-command', { 'command-line': command });
  if (answer !== '') throw new Error(`${vm.spec.name}: ${String(answer)}`);
}

/** The byte that fills 64 KiB of the disk, or null if they are not all equal. */
export function byteAt(content: Buffer, offsetMiB: number): number | null {
  const part = content.subarray(offsetMiB << 20, (offsetMiB << 20) + 65_536);
  return part.every((byte) => byte === part[0]) ? (part[0] ?? null) : null;
}

/** The latest number that the guest has written (guest/init, vmg.disk). Throws if a sector has another one's number. */
export function latestNumber(content: Buffer): number {
  let latest = 0;
  for (let sector = 0; sector < SECTORS; sector++) {
    const text = content.toString('latin1', sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES).replaceAll('\0', '');
    if (text === '') continue;
    if (Number(text) % SECTORS !== sector) throw new Error(`sector ${sector} holds ${text.trim()}`);
    latest = Math.max(latest, Number(text));
  }
  return latest;
}
