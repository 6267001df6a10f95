/** Which pages of an image's memory files a clone's QEMU has touched, by the kernel's page tables (root only). */
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';

const PAGE_BYTES = 4096;
const ENTRY_BYTES = 8;
/** Top byte of an entry: bit 63 present, bit 62 swapped. */
const THERE = 0xc0;

/**
 * Returns the bytes of the files below `folder` that at least one of these processes has touched. A page that a clone
 * has written counts, too: it was read from the image first.
 */
export function touchedBytes(pids: readonly number[], folder: string): number {
  const touched = new Set<string>();
  for (const pid of pids) {
    const pagemap = openSync(`/proc/${pid}/pagemap`, 'r');
    try {
      for (const { start, pages, offset, path } of mappingsBelow(pid, folder)) {
        const entries = Buffer.alloc(pages * ENTRY_BYTES);
        const read = readSync(pagemap, entries, 0, entries.length, (start / PAGE_BYTES) * ENTRY_BYTES);
        for (let page = 0; page < read / ENTRY_BYTES; page++)
          if (((entries[page * ENTRY_BYTES + 7] ?? 0) & THERE) !== 0)
            touched.add(`${path}:${offset / PAGE_BYTES + page}`);
      }
    } finally {
      closeSync(pagemap);
    }
  }
  return touched.size * PAGE_BYTES;
}

function mappingsBelow(pid: number, folder: string): { start: number; pages: number; offset: number; path: string }[] {
  return readFileSync(`/proc/${pid}/maps`, 'utf8')
    .split('\n')
    .flatMap((line) => {
      const [, from, to, offset, path = ''] =
        /^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(.*)$/.exec(line) ?? [];
      if (from === undefined || to === undefined || offset === undefined || !path.startsWith(folder)) return [];
      const start = Number.parseInt(from, 16);
      const pages = (Number.parseInt(to, 16) - start) / PAGE_BYTES;
      return [{ start, pages, offset: Number.parseInt(offset, 16), path }];
    });
}
