/** What those share who look at images. */
import type { HostContext } from '../vm/context.js';
import type { ImageStore } from './store.js';

export interface ImageContext extends HostContext {
  readonly images: ImageStore;
}
