import type { HostInventory, TargetChecks, VmClaims, VmIdentity, VmInventory } from '../../domain/host.js';
import type { FileView, StorageFile, StorageOffer } from '../../domain/storage.js';
import type { RdmaPlace } from '../../domain/transport.js';
import type { VmSpec, VmView } from '../../domain/vm.js';

/**
 * The questions of other hosts, most of them of pre-flight. They change nothing, and each reads the current facts. The
 * one exception is offerStorage, whose markers a host removes again by itself.
 */
export interface InventoryPort {
  inventory(): Promise<HostInventory>;
  /** Throws NOT_FOUND if the VM is not here. */
  vmInventory(vm: string): Promise<VmInventory>;
  /**
   * Says what this host knows of the names and UUIDs of VMs: one answer for each, in their order. Hosts of build 0.1.0
   * do not know this call.
   */
  vmClaims(vms: readonly VmIdentity[]): Promise<{ readonly claims: readonly VmClaims[] }>;
  /**
   * Returns what on this host needs one of these disk files (an image, a saved image, a VM), for a host that wants to
   * change or remove them. Empty: nothing. `flattened` is the VM for whose disks the caller asks, or null: what only
   * waits for its overlays does not count. A host of build 0.1.0 does not know this call.
   */
  layerHolders(paths: readonly string[], flattened: string | null): Promise<{ readonly holders: readonly string[] }>;
  /** All VMs of this host, as its users see them. Hosts of earlier builds do not know this call. */
  vmViews(): Promise<{ readonly vms: readonly VmView[] }>;
  /** `source` is the RDMA address of the source, if this host shall check whether it can connect to it; else null. */
  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks>;
  /**
   * Describes the files of a running VM, and leaves a marker beside each that the VM may write. The markers stay until
   * endStorage, or until the host's own deadline.
   */
  offerStorage(vm: string): Promise<StorageOffer>;
  /** Describes what this host sees under the same paths, with the markers of that proof: one view for each file. */
  viewStorage(proof: string, files: readonly StorageFile[]): Promise<readonly FileView[]>;
  /** Removes the markers. Idempotent. */
  endStorage(proof: string): Promise<void>;
}
