/**
 * One host as the engine sees it: a port for each role that it can have in a job. The daemon plugs in its own agent
 * and other hosts' (src/api/peers), test/sim plugs in simulated ones; the engine cannot tell.
 *
 * Rules that every implementation keeps:
 *  - Each call is idempotent for the same session or fork: the coordinator may repeat it after a crash, or when an
 *    answer was lost.
 *  - A call that throws may or may not have taken effect; the engine undoes as if it had.
 *  - An error carries a MigrationError code. UNREACHABLE, TIMEOUT and DISCONNECTED may pass; others are final.
 *  - `discard`, `unexpose`, `release` and `discardFork` are final for their session or fork: a `prepare`, `connect`,
 *    `expose` or `prepareClones` that arrives late (its caller has long given up) fails with CONFLICT and brings
 *    nothing back. An undo call for something that is not there succeeds.
 *  - No two roles have a call of the same name: between hosts the name alone says which is meant.
 */
import type { ForkPort } from './fork.js';
import type { InventoryPort } from './inventory.js';
import type { SourcePort } from './source.js';
import type { TargetPort } from './target.js';

export interface HostPort {
  readonly host: string;
  /** What is here, for pre-flight. */
  readonly inventory: InventoryPort;
  /** VMs that leave. */
  readonly source: SourcePort;
  /** VMs that arrive. */
  readonly target: TargetPort;
  /** VMs that become many. */
  readonly forks: ForkPort;
}

export type HostRole = Exclude<keyof HostPort, 'host'>;
