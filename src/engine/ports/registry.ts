export interface OwnerRecord {
  readonly vm: string;
  readonly owner: string;
  /** Grows by one with each change of owner. */
  readonly epoch: number;
  /** The session whose commit wrote this record. Null for a VM started here. */
  readonly session: string | null;
}

/**
 * Small durable records with compare-and-swap. Once `swapOwner` or `removeOwner` has resolved, the change survives a
 * crash of the machine.
 */
export interface Registry {
  owner(vm: string): Promise<OwnerRecord | null>;
  /**
   * Replaces the current record by `next` if it has `expectedEpoch`, or if there is no record and `expectedEpoch` is
   * null. Throws OWNER_CHANGED otherwise.
   */
  swapOwner(vm: string, expectedEpoch: number | null, next: OwnerRecord): Promise<void>;
  removeOwner(vm: string, expectedEpoch: number): Promise<void>;
  /**
   * Returns the epoch of the current record or of the last removed one, and 0 if none is known. A VM that is started
   * continues from it.
   */
  lastEpoch(vm: string): Promise<number>;
}
