/**
 * One open descriptor in reserve. If the process may open no more files, it is given up for the moment of a read, so
 * that the daemon can still find out whether a process lives. Without that it could neither end a VM, which would give
 * descriptors back, nor tell a VM that has ended from one that it cannot look at.
 */
import { closeSync, openSync, readFileSync } from 'node:fs';

let spare: number | null = null;

/** To be called once, early. Without it the calls below still work while a descriptor is free. */
export function keepSpareDescriptor(): void {
  try {
    spare ??= openSync('/dev/null', 'r');
  } catch {
    // It is taken with the next call, when descriptors are free again.
  }
}

export function isOutOfDescriptors(error: unknown): boolean {
  const { code } = (error ?? {}) as { code?: unknown };
  return code === 'EMFILE' || code === 'ENFILE';
}

/** Reads a small file of /proc with the spare descriptor. Throws as readFileSync does, also EMFILE. */
export function readWithSpare(path: string): string {
  if (spare !== null) {
    closeSync(spare);
    spare = null;
  }
  try {
    return readFileSync(path, 'utf8');
  } finally {
    keepSpareDescriptor();
  }
}
