/** What the parts of cloning share. */
import type { ImageContext } from '../image/context.js';
import type { ForkStore } from './record.js';

export interface ForkContext extends ImageContext {
  readonly forkStore: ForkStore;
}
