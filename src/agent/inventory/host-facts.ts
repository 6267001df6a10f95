/** Collects the facts about this host that pre-flight asks for. */

import { readFile } from 'node:fs/promises';
import { availableParallelism, hostname } from 'node:os';
import { MigrationError, toMigrationError } from '../../domain/errors.js';
import { listBridges } from '../vm/network.js';
import type { VmManager } from '../vm/vms.js';

export interface HostFacts {
  readonly machineId: string;
  readonly qemuVersion: string | null;
  readonly qemuProblem?: string;
  readonly machines: readonly string[];
  readonly isKvmUsable: boolean;
  readonly memoryAvailableBytes: number;
  readonly ramFileFreeBytes: number;
  readonly stateFreeBytes?: number;
  readonly hugePagesFree: Readonly<Record<string, number>>;
  readonly bridges: readonly string[];
  readonly cpuCount: number;
  /** Names that an incoming VM cannot have. Stopped VMs are not listed, because an incoming VM replaces them. */
  readonly vmNames: readonly string[];
}

export async function hostFacts(vms: VmManager): Promise<HostFacts> {
  const { backend } = vms;
  const [installed, machine, kvm, free, bridges] = await Promise.all([
    backend.installed().catch((error: unknown) => toMigrationError(error)),
    machineId(),
    backend.isKvmUsable(),
    vms.room.free(),
    listBridges().catch(() => []),
  ]);
  const stateFreeBytes = await vms.stateFreeBytes();
  return {
    machineId: machine,
    ...(installed instanceof MigrationError
      ? { qemuVersion: null, machines: [], qemuProblem: installed.message }
      : { qemuVersion: installed.version, machines: installed.machines }),
    isKvmUsable: kvm,
    memoryAvailableBytes: free.hostBytes,
    ramFileFreeBytes: free.fileBytes,
    ...(stateFreeBytes === undefined ? {} : { stateFreeBytes }),
    hugePagesFree: free.hugePages,
    bridges,
    cpuCount: availableParallelism(),
    vmNames: vms
      .list()
      .filter((vm) => vm.state !== 'stopped')
      .map((vm) => vm.name),
  };
}

/** The id is the same for all daemons under one kernel, whatever their network namespaces. It changes with a reboot. */
async function machineId(): Promise<string> {
  const bootId = (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
  const id = await readFile('/etc/machine-id', 'utf8').catch(() => hostname());
  return `${id.trim()}/${bootId}`;
}
