/**
 * Inject points, at which a test can crash, park or fail the coordinator or an agent. They lie before and after each
 * step ("before:commit", "after:commit", "undo:stopSource"), and inside the agent ("agent:fork:arm"). Outside of tests
 * a point does nothing.
 */
export interface InjectPort {
  hit(point: string): Promise<void>;
}
