/** What the parts of cloning share, beside context.ts. */

import type { ImageStore } from '../image/store.js';
import type { AgentContext } from '../vm/context.js';
import type { ForkStore } from './record.js';

export interface ForkContext extends AgentContext {
  readonly images: ImageStore;
  readonly forkStore: ForkStore;
}
