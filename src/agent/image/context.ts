/** The dependencies that all modules working on images share. */
import type { HostContext } from '../vm/context.js';
import type { FileSigner } from './file-signature.js';
import type { ImageStore } from './store.js';

export interface ImageContext extends HostContext {
  readonly images: ImageStore;
  /** Null: this host has no certificate. Its files are unsigned, and it knows no signatures. */
  readonly signer: FileSigner | null;
}
