/** The dependencies that the source side and the target side of migrations share on a host. */
import type { HostContext } from '../vm/context.js';
import type { SessionStore } from './session-store.js';

export interface MigrationContext extends HostContext {
  readonly store: SessionStore;
}
