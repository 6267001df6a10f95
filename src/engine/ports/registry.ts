export interface OwnerRecord {
  readonly vm: string;
  readonly owner: string;
  /** Grows by one with each change of owner. */
  readonly epoch: number;
  /** The session whose commit wrote this record. Null for a VM started here. */
  readonly session: string | null;
  /**
   * The session that may move the VM away next. It is noted before anything of the move happens. So a record without
   * it, or no record at all, is older than a journal that knows of the session, and does not prove that the session
   * has not been committed.
   */
  readonly leaving?: string;
  /**
   * A random id of this start of the VM, which moves keep. It tells two records of one epoch apart. Absent in old ones.
   */
  readonly incarnation?: string;
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
  /** Notes durably which session may move the VM away. Throws OWNER_CHANGED if the record does not have that epoch. */
  announceMove(vm: string, epoch: number, session: string): Promise<void>;
  removeOwner(vm: string, expectedEpoch: number): Promise<void>;
  /**
   * Returns the epoch of the current record or of the last removed one, and 0 if none is known. A VM that is started
   * continues from it.
   */
  lastEpoch(vm: string): Promise<number>;
}
