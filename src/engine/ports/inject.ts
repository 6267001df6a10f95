/**
 * Where a test may crash, park or fail the coordinator or an agent: before and after each step ("before:commit",
 * "after:commit", "undo:stopSource"), and at the agent's own points ("agent:fork:arm"). Outside of tests every point is
 * a call that does nothing.
 */
export interface InjectPort {
  hit(point: string): Promise<void>;
}
