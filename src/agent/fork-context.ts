/** What the parts of cloning share, beside context.ts. */
import type { AgentContext } from './context.js';
import type { ForkStore } from './fork-record.js';
import type { ImageStore } from './image-store.js';

export interface ForkContext extends AgentContext {
  readonly images: ImageStore;
  readonly forkStore: ForkStore;
}
