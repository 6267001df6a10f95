/** One host in the simulation, during one life of its daemon. */

import type { HostInventory, TargetChecks, VmClaims, VmInventory } from '../../src/domain/host.js';
import type { FileView, StorageOffer } from '../../src/domain/storage.js';
import type { HostPort } from '../../src/engine/ports/host.js';
import type { InventoryPort } from '../../src/engine/ports/inventory.js';
import { unreachableHost } from '../../src/jobs/unreachable-host.js';
import { NO_RDMA } from '../unit/planner/planner-facts.js';
import { type HalfParts, SimHalf } from './half.js';
import { SimSource } from './source.js';
import { INCARNATION } from './spec.js';
import { SimTarget } from './target.js';

export class SimAgent implements HostPort {
  readonly host: string;
  readonly inventory: InventoryPort;
  readonly source: SimSource;
  readonly target: SimTarget;
  /** Migrations do not call these. */
  readonly forks: HostPort['forks'];
  readonly fanout: HostPort['fanout'];
  readonly images: HostPort['images'];

  /** `peer`: the other host, if its daemon lives and the network is up. */
  constructor(parts: HalfParts, peer: () => SimAgent | null) {
    this.host = parts.state.name;
    this.inventory = new SimInventory(parts);
    this.source = new SimSource(parts, () => peer()?.target ?? null);
    this.target = new SimTarget(parts, () => peer()?.source ?? null);
    const { forks, fanout, images } = unreachableHost(this.host, null);
    this.forks = forks;
    this.fanout = fanout;
    this.images = images;
  }
}

class SimInventory extends SimHalf implements InventoryPort {
  async inventory(): Promise<HostInventory> {
    return {
      host: this.state.name,
      machineId: this.state.name,
      protocolVersion: 1,
      dataSecurity: 'integrity',
      ...{ canVerifyMemory: true, canFetchAhead: true, canTrackWrites: true },
      qemuVersion: '7.2.22',
      machines: ['pc-q35-7.2'],
      isKvmUsable: false,
      isUserfaultfdPermitted: true,
      hasMinorFaults: true,
      isPreloadPresent: true,
      memoryAvailableBytes: 2 ** 34,
      ramFileFreeBytes: 2 ** 34,
      hugePagesFree: {},
      dataAddress: '10.0.0.1',
      rdma: NO_RDMA,
      vmNames: [...this.state.vms.keys()],
      bridges: [],
      certificateExpiresAt: null,
      clockMs: 0,
    };
  }

  async vmInventory(vm: string): Promise<VmInventory> {
    const record = this.vm(vm);
    return {
      spec: record.spec,
      state: record.qemu?.isAlive === true && record.qemu.state === 'running' ? 'running' : 'paused',
      epoch: record.epoch,
      owner: (await this.registry.owner(vm))?.owner ?? '',
      incarnation: INCARNATION,
      job: record.job,
      qemuVersion: '7.2.22',
      accel: 'tcg',
      ...{ isRamShared: true, isRamNamedFile: true },
      migrationBlockers: [],
      ramAllocatedBytes: record.spec.memory.sizeBytes,
      discardingDevices: [],
      ...{ image: null, identityIssue: null, fleetingDisks: [], exitCode: null },
    };
  }

  async vmClaims(): Promise<{ claims: VmClaims[] }> {
    return { claims: [] };
  }

  async layerHolders(): Promise<{ holders: string[] }> {
    return { holders: [] };
  }

  async vmViews(): Promise<{ vms: [] }> {
    return { vms: [] };
  }

  async checkTarget(): Promise<TargetChecks> {
    return { disks: [], files: [], rdma: null };
  }

  async offerStorage(): Promise<StorageOffer> {
    return { proof: '0'.repeat(32), files: [], views: [] };
  }

  async viewStorage(): Promise<readonly FileView[]> {
    return [];
  }

  async endStorage(): Promise<void> {}
}
