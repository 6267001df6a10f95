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
  /** Returns the host that the missing pages of this VM come from, or null. */
  readonly #arrivingFrom: (vm: string) => string | null;

  readonly #claims: InventoryPort['vmClaims'];

  constructor(
    context: ImageContext,
    options: {
      hostInfo: HostInfo;
      arriving: (vm: string) => Promise<string | null>;
      arrivingFrom: (vm: string) => string | null;
      claims: InventoryPort['vmClaims'];
    },
  ) {
    this.#context = context;
    this.#hostInfo = options.hostInfo;
    this.#arriving = options.arriving;
    this.#arrivingFrom = options.arrivingFrom;
    this.#claims = options.claims;
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

  vmClaims(name: string, uuid: string): Promise<VmClaims> {
    return this.#claims(name, uuid);
  }

  checkTarget(spec: VmSpec, source: RdmaPlace | null): Promise<TargetChecks> {
    return checkTarget(this.#context, spec, source);
  }
}
