import type { HostInventory, TargetChecks, VmInventory } from '../../domain/host.js';
import type { RdmaPlace } from '../../domain/transport.js';
import type { VmSpec } from '../../domain/vm.js';

/** What pre-flight asks of a host. Nothing is changed, and everything is looked at anew each time. */
export interface InventoryPort {
  inventory(): Promise<HostInventory>;
  /** NOT_FOUND if the VM is not here. */
  vmInventory(vm: string): Promise<VmInventory>;
  /** `source`: where it listens for RDMA, if it is to be found out whether this host gets there. */
  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks>;
}
