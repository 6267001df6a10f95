/**
 * The files that a VM uses, as each of two hosts sees them. A move compares the views, because the VM's disks must be
 * the same on both hosts. Imports only its neighbours in domain/; every layer may import it.
 */
import type { DiskFormat } from './vm.js';

/** prove: a move is refused unless the hosts see the same files. assume: the user says that they do. */
export const SHARED_STORAGES = ['prove', 'assume'] as const;
export type SharedStorage = (typeof SHARED_STORAGES)[number];

/** One file of a VM. */
export interface StorageFile {
  /** Absolute. */
  readonly path: string;
  /** For a person: "disk vda", "-fw_cfg". */
  readonly use: string;
  readonly isWritable: boolean;
  /** null: its content is not known to be a disk image. */
  readonly format: DiskFormat | null;
}

/** One image of a disk's backing chain. */
export interface ChainLink {
  /** As the back end names it: a path, or the address of a network disk. */
  readonly path: string;
  readonly format: string;
  readonly virtualSizeBytes: number;
}

/** What one host sees under the path of a StorageFile. */
export interface FileView {
  readonly path: string;
  /** Why the file cannot be used here; null if it can. The other members then say nothing. */
  readonly problem: string | null;
  readonly kind: 'file' | 'block';
  readonly sizeBytes: number;
  /** The last part of the path after all symbolic links. */
  readonly realName: string;
  /** The file itself is a mount point, so that a marker beside it says nothing about it. */
  readonly isMountPoint: boolean;
  /** Names the file among all files of one running kernel. */
  readonly inode: string;
  /** A block device's own id, which is the same on every host that is attached to it; null if it has none. */
  readonly deviceId: string | null;
  /** The secret in the marker beside the file; null if there is no marker. */
  readonly marker: string | null;
  /** Why the source has no marker beside the file; null on the target. */
  readonly markerProblem: string | null;
  /** Digest of the content, or of samples of it, keyed by the proof; null for a writable file. */
  readonly digest: string | null;
  readonly isSampled: boolean;
  /** The file's image and the images behind it, if it has a format; else empty. */
  readonly chain: readonly ChainLink[];
}

/** What the source says about all files of a VM. Its markers stay until the proof ends. */
export interface StorageOffer {
  /** 128 bits in hexadecimal. It names the markers and keys the digests. */
  readonly proof: string;
  readonly files: readonly StorageFile[];
  /** One for each file. */
  readonly views: readonly FileView[];
}

/** A file that an argument of a spec names. */
export interface ArgumentFile {
  /** As it is written: it may be relative to the VM's directory. */
  readonly path: string;
  /** The option that names it, for a person. */
  readonly use: string;
  readonly isWritable: boolean;
  /** A drive: the guest may read it at any time. Other files are read when the VM starts. */
  readonly isDrive: boolean;
  /** The format that the argument gives to a drive; null if it gives none. */
  readonly format: DiskFormat | null;
}

/** A file that the drives of a running VM use, as a disk or behind one. */
export interface OpenFile {
  /** A relative path is relative to the VM's directory. */
  readonly path: string;
  readonly isReadOnly: boolean;
}
