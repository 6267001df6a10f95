/**
 * What the agent asks of the back end about disk images. No VM may have the image open for writing, except for
 * virtualSizeBytes, openProblem, chainLinks, chain and isWritten.
 */
import type { ChainLink } from '../domain/storage.js';
import type { DiskSpec } from '../domain/vm.js';

export interface DiskFiles {
  /** Returns the size of the disk as the guest sees it. */
  virtualSizeBytes(path: string, format: DiskSpec['format']): Promise<number>;
  /** Creates a qcow2 without content of its own. The call does not open the base. */
  createOverlay(path: string, base: Pick<DiskSpec, 'path' | 'format'>, sizeBytes: number): Promise<void>;
  /** Writes the overlay's content into its base. Throws NO_SPACE if the file system is full. */
  commitOverlay(path: string, basePath: string): Promise<void>;
  /** Returns the reason why the file and its backing files do not open as a disk of that format, or null. */
  openProblem(path: string, format: DiskSpec['format']): Promise<string | null>;
  /**
   * Returns the image and the images behind it, the front one first, whatever they are: for comparing two hosts' views.
   * Throws QEMU_FAILED if one does not open.
   */
  chainLinks(path: string, format: DiskSpec['format']): Promise<readonly ChainLink[]>;
  /**
   * Returns the file and its backing files, the top first. The files may be in use. Throws UNSUPPORTED if one of them
   * is not a file with an absolute path.
   */
  chain(path: string, format: DiskSpec['format']): Promise<readonly DiskFile[]>;
  /** Opens the file alone, and says what it names. Throws UNSUPPORTED if that are no files with absolute paths. */
  layer(path: string, format: DiskSpec['format']): Promise<DiskLayerFile>;
  /** True if another process has the file open for writing. Knows only processes that lock the file as QEMU does. */
  isWritten(path: string, format: DiskSpec['format']): Promise<boolean>;
  /** Changes the name of the overlay's backing file, and no content. */
  rebase(path: string, base: DiskFile): Promise<void>;
}

/** One file of a disk. */
export type DiskFile = Pick<DiskSpec, 'path' | 'format'>;

/** What a file of a disk names. */
export interface DiskLayerFile {
  /** The file that has its content. Null: it has its content itself. */
  readonly contentPath: string | null;
  /** The file that it lies on, or null. */
  readonly base: DiskFile | null;
}
