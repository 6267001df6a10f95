/** What the two halves of a migration share on a host. */
import type { HostContext } from '../vm/context.js';
import type { SessionStore } from './session-store.js';

export interface MigrationContext extends HostContext {
  readonly store: SessionStore;
}
