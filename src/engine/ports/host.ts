/**
 * One host as the engine sees it: a port for each role that it can have in a job. The daemon passes its own agent and
 * those of other hosts (src/api/peers). test/sim passes simulated ones. The engine cannot tell them apart.
 *
 * Rules for every implementation:
 *  - Each call is idempotent for the same session or fork. The coordinator may repeat it after a crash, or if an answer
 *    was lost. The one exception is noteDirty (source.ts).
 *  - A call that throws may or may not have taken effect. The engine undoes it in both cases.
 *  - An error carries a MigrationError code. UNREACHABLE, TIMEOUT and DISCONNECTED may be transient; others are final.
 *  - `discard`, `unexpose`, `release` and `discardFork` are final for their session or fork. A `prepare`, `connect`,
 *    `expose` or `prepareClones` that arrives later, after its caller has given up, fails with CONFLICT and creates
 *    nothing. An undo call for something that does not exist succeeds.
 *  - No two roles have a call of the same name, because a call between hosts is identified by its name alone.
 */
import type { FanoutPort } from './fanout.js';
import type { ForkPort } from './fork.js';
import type { ImagesPort } from './images.js';
import type { InventoryPort } from './inventory.js';
import type { SourcePort } from './source.js';
import type { TargetPort } from './target.js';

export interface HostPort {
  readonly host: string;
  /** Facts for pre-flight. */
  readonly inventory: InventoryPort;
  /** Calls for VMs that leave this host. */
  readonly source: SourcePort;
  /** Calls for VMs that arrive at this host. */
  readonly target: TargetPort;
  /** Calls for VMs that are forked on this host. */
  readonly forks: ForkPort;
  /** Calls by which the image of a fork gets to many hosts. */
  readonly fanout: FanoutPort;
  /** Calls for the images of this host and the clones on them. */
  readonly images: ImagesPort;
}

export type HostRole = Exclude<keyof HostPort, 'host'>;
