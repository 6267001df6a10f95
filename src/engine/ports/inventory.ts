import type { HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import type { RdmaPlace } from '../../domain/transport.js';
import type { VmSpec } from '../../domain/vm.js';

/** The calls of pre-flight to a host. They change nothing, and each call reads the current facts. */
export interface InventoryPort {
  inventory(): Promise<HostInventory>;
  /** Throws NOT_FOUND if the VM is not here. */
  vmInventory(vm: string): Promise<VmInventory>;
  /** `source` is the RDMA address of the source, if this host shall check whether it can connect to it; else null. */
  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks>;
}
