/** QEMU as a back end for VMs. Each VM is a QEMU process that the daemon starts and controls over QMP. */

import { existsSync } from 'node:fs';
import { MigrationError } from '../../domain/errors.js';
import type { ArgumentFile } from '../../domain/storage.js';
import type { Accel, AccelChoice, VmSpec } from '../../domain/vm.js';
import { findByArgument, type ProcessIdentity } from '../../kit/process.js';
import type { SpecDevices, VmBackend, VmPlace } from '../backend.js';
import type { DiskFiles } from '../disk-files.js';
import { argumentFiles } from './argument-files.js';
import { qmpSocketArgument } from './command-line.js';
import { QemuConnection, socketsIn } from './connection.js';
import { storageDaemon } from './export/storage-daemon.js';
import { devicesIn } from './facts.js';
import {
  chain,
  chainLinks,
  commitOverlay,
  createOverlay,
  isWritten,
  layer,
  openProblem,
  rebase,
  virtualSizeBytes,
} from './img.js';
import { askQemu, type InstalledQemu, isKvmUsable, resolveAccel, resolveMachine } from './installed.js';
import { LAUNCHER } from './launcher/launcher.js';
import { containmentProblem } from './launcher/probe.js';
import { QemuProcess } from './process.js';

const PROGRAM_DEFAULT = 'qemu-system-x86_64';
/** A unix socket's path has at most this many bytes. */
const SOCKET_PATH_BYTES_MAX = 107;

export class QemuBackend implements VmBackend {
  readonly diskFiles: DiskFiles = {
    ...{ virtualSizeBytes, createOverlay, commitOverlay, openProblem },
    ...{ chain, chainLinks, isWritten, layer, rebase },
  };
  readonly diskExports = storageDaemon;
  readonly #program: string;
  #containment: Promise<string | null> | null = null;
  #installed: Promise<InstalledQemu> | null = null;

  /** `program` is a name in PATH, or a path. */
  constructor(program: string = PROGRAM_DEFAULT) {
    this.#program = program;
  }

  installed(): Promise<InstalledQemu> {
    this.#installed ??= askQemu(this.#program).catch((error: unknown) => {
      this.#installed = null;
      throw error;
    });
    return this.#installed;
  }

  async resolveMachine(machine: string): Promise<string> {
    return resolveMachine(await this.installed(), machine);
  }

  isKvmUsable(): Promise<boolean> {
    return isKvmUsable();
  }

  resolveAccel(accel: AccelChoice): Promise<Accel> {
    return resolveAccel(accel);
  }

  devicesIn(spec: VmSpec): SpecDevices {
    return devicesIn(spec);
  }

  filesIn(spec: VmSpec): readonly ArgumentFile[] {
    return argumentFiles(spec);
  }

  checkPlace({ socketDirectory }: VmPlace): void {
    // The monitor has the longest path of all sockets in the directory.
    const { monitor } = socketsIn(socketDirectory);
    if (Buffer.byteLength(monitor) <= SOCKET_PATH_BYTES_MAX) return;
    throw new MigrationError('SPEC_INVALID', `the path ${monitor} is too long for a socket`, {
      remedy: 'shorten the name of the VM, or the state directory of the daemon',
    });
  }

  /** Returns why a QEMU of that user cannot be contained on this host, or null. An answer of null is kept. */
  containmentProblem(uid: number): Promise<string | null> {
    this.#containment ??= containmentProblem(uid).then((problem) => {
      if (problem !== null) this.#containment = null;
      return problem;
    });
    return this.#containment;
  }

  /** False if a part of the native build is missing. Then a guest's output can fill the disk. */
  get isOutputBounded(): boolean {
    return existsSync(LAUNCHER);
  }

  processAt(place: VmPlace): QemuProcess {
    const hasLauncher = this.isOutputBounded;
    return new QemuProcess(new QemuConnection(place), { program: this.#program, hasLauncher });
  }

  findStray({ socketDirectory }: VmPlace): Promise<readonly ProcessIdentity[]> {
    return findByArgument(qmpSocketArgument(socketsIn(socketDirectory).qmp));
  }
}
