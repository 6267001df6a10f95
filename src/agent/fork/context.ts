/** The dependencies that all modules of forking share. */
import type { ImageContext } from '../image/context.js';
import type { ForkStore } from './record.js';

export interface ForkContext extends ImageContext {
  readonly forkStore: ForkStore;
}
