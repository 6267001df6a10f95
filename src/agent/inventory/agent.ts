/** Implements InventoryPort on this host. */
import type { HostInventory, TargetChecks, VmClaims, VmIdentity, VmInventory } from '../../domain/host.js';
import type { FileView, StorageFile, StorageOffer } from '../../domain/storage.js';
import type { RdmaPlace } from '../../domain/transport.js';
import type { VmSpec, VmView } from '../../domain/vm.js';
import type { InventoryPort } from '../../engine/ports/inventory.js';
import type { ImageContext } from '../image/context.js';
import type { Markers } from '../storage/markers.js';
import { offerStorage, viewStorage } from '../storage/storage.js';
import { checkTarget, type HostInfo, hostInventory, vmInventory } from './inventory.js';

type Holders = (paths: readonly string[], flattened: string | null) => Promise<readonly string[]>;

export class InventoryAgent implements InventoryPort {
  readonly #context: ImageContext;
  readonly #markers: Markers;
  readonly #hostInfo: HostInfo;
  /** Returns the job that is still transferring pages of this VM to this host, or null. */
  readonly #arriving: (vm: string) => Promise<string | null>;
  /** Returns the host that the missing pages of this VM come from, or null. */
  readonly #arrivingFrom: (vm: string) => string | null;

  readonly #claims: InventoryPort['vmClaims'];
  /** Returns what on this host needs one of the disk files. */
  readonly #holders: Holders;
  readonly #views: () => readonly VmView[];

  constructor(
    context: ImageContext,
    parts: {
      readonly markers: Markers;
      readonly hostInfo: HostInfo;
      readonly arriving: (vm: string) => Promise<string | null>;
      readonly arrivingFrom: (vm: string) => string | null;
      readonly claims: InventoryPort['vmClaims'];
      readonly holders: Holders;
      readonly views: () => readonly VmView[];
    },
  ) {
    this.#context = context;
    this.#markers = parts.markers;
    this.#hostInfo = parts.hostInfo;
    this.#arriving = parts.arriving;
    this.#arrivingFrom = parts.arrivingFrom;
    this.#claims = parts.claims;
    this.#holders = parts.holders;
    this.#views = parts.views;
  }

  async layerHolders(paths: readonly string[], flattened: string | null): Promise<{ holders: readonly string[] }> {
    return { holders: await this.#holders(paths, flattened) };
  }

  inventory(): Promise<HostInventory> {
    return hostInventory(this.#context, this.#hostInfo);
  }

  async vmInventory(vm: string): Promise<VmInventory> {
    const inventory = await vmInventory(this.#context, vm);
    const arrivingFrom = this.#arrivingFrom(vm);
    const job = inventory.job ?? (await this.#arriving(vm));
    return { ...inventory, job, ...(arrivingFrom === null ? {} : { arrivingFrom }) };
  }

  vmClaims(vms: readonly VmIdentity[]): Promise<{ readonly claims: readonly VmClaims[] }> {
    return this.#claims(vms);
  }

  async vmViews(): Promise<{ readonly vms: readonly VmView[] }> {
    return { vms: this.#views() };
  }

  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks> {
    return checkTarget(this.#context, spec, source);
  }

  offerStorage(vm: string): Promise<StorageOffer> {
    return offerStorage({ vms: this.#context.vms, markers: this.#markers }, vm);
  }

  viewStorage(proof: string, files: readonly StorageFile[]): Promise<readonly FileView[]> {
    return viewStorage(this.#context, proof, files);
  }

  endStorage(proof: string): Promise<void> {
    return this.#markers.end(proof);
  }

  /** Called when the daemon exits. */
  close(): Promise<void> {
    return this.#markers.close();
  }
}
