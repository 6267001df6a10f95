/** Implements InventoryPort on this host. */
import type { HostInventory, TargetChecks, VmClaims, VmInventory } from '../../domain/host.js';
import type { RdmaPlace } from '../../domain/transport.js';
import type { VmSpec } from '../../domain/vm.js';
import type { InventoryPort } from '../../engine/ports/inventory.js';
import type { ImageContext } from '../image/context.js';
import { checkTarget, type HostInfo, hostInventory, vmInventory } from './inventory.js';

export class InventoryAgent implements InventoryPort {
  readonly #context: ImageContext;
  readonly #hostInfo: HostInfo;
  /** Returns the job that is still transferring pages of this VM to this host, or null. */
  readonly #arriving: (vm: string) => Promise<string | null>;

  readonly #claims: InventoryPort['vmClaims'];

  constructor(
    context: ImageContext,
    options: {
      hostInfo: HostInfo;
      arriving: (vm: string) => Promise<string | null>;
      claims: InventoryPort['vmClaims'];
    },
  ) {
    this.#context = context;
    this.#hostInfo = options.hostInfo;
    this.#arriving = options.arriving;
    this.#claims = options.claims;
  }

  inventory(): Promise<HostInventory> {
    return hostInventory(this.#context, this.#hostInfo);
  }

  async vmInventory(vm: string): Promise<VmInventory> {
    const inventory = await vmInventory(this.#context, vm);
    return { ...inventory, job: inventory.job ?? (await this.#arriving(vm)) };
  }

  vmClaims(name: string, uuid: string): Promise<VmClaims> {
    return this.#claims(name, uuid);
  }

  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks> {
    return checkTarget(this.#context, spec, source);
  }
}
