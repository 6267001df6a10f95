import type { HostInventory, TargetChecks, VmClaims, VmInventory } from '../../domain/host.js';
import type { RdmaPlace } from '../../domain/transport.js';
import type { VmSpec } from '../../domain/vm.js';

/** The questions of other hosts, most of them of pre-flight. They change nothing, and read the current facts. */
export interface InventoryPort {
  inventory(): Promise<HostInventory>;
  /** Throws NOT_FOUND if the VM is not here. */
  vmInventory(vm: string): Promise<VmInventory>;
  /** Says what this host knows of a VM's name and UUID. Hosts of build 0.1.0 do not know this call. */
  vmClaims(name: string, uuid: string): Promise<VmClaims>;
  /** `source` is the RDMA address of the source, if this host shall check whether it can connect to it; else null. */
  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks>;
}
