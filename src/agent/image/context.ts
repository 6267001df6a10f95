/** The dependencies that all modules working on images share. */
import type { HostContext } from '../vm/context.js';
import type { ImageStore } from './store.js';

export interface ImageContext extends HostContext {
  readonly images: ImageStore;
}
