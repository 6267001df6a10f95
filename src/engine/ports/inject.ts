/**
 * Where a test may crash, park or fail the coordinator: before and after each step ("before:commit", "after:commit",
 * "undo:stopSource").
 */
export interface FaultPort {
  hit(point: string): Promise<void>;
}
