export interface OwnerRecord {
  readonly vm: string;
  readonly owner: string;
  /** Grows by one with each change of owner. */
  readonly epoch: number;
  /** Session whose commit made it so; null for a VM started here. */
  readonly session: string | null;
}

/**
 * Small durable records with compare-and-swap. What `swapOwner` and `removeOwner` have done when they resolve survives
 * a crash of the machine.
 */
export interface Registry {
  owner(vm: string): Promise<OwnerRecord | null>;
  /**
   * Makes `next` the record if the present one has `expectedEpoch` (null: there is none). OWNER_CHANGED otherwise.
   */
  swapOwner(vm: string, expectedEpoch: number | null, next: OwnerRecord): Promise<void>;
  removeOwner(vm: string, expectedEpoch: number): Promise<void>;
  /**
   * Of the present record, or of the last one that there was; 0 if none is known. A VM that is started goes on from it.
   */
  lastEpoch(vm: string): Promise<number>;
}
