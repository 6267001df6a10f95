/** Cuts a byte stream into lines of bounded length. Work is linear in the bytes, however they are cut into chunks. */
export class LineSplitter {
  readonly #lineBytesMax: number;
  #parts: Buffer[] = [];
  #heldBytes = 0;

  constructor(lineBytesMax: number) {
    this.#lineBytesMax = lineBytesMax;
  }

  /**
   * The lines that this chunk completes, without their end; null if a line is too long (then the splitter is of no more
   * use).
   */
  push(chunk: Buffer): string[] | null {
    const lines: string[] = [];
    let begin = 0;
    for (;;) {
      const end = chunk.indexOf(0x0a, begin);
      const part = chunk.subarray(begin, end === -1 ? chunk.length : end);
      if (this.#heldBytes + part.length > this.#lineBytesMax) return null;
      if (part.length > 0) {
        this.#parts.push(part);
        this.#heldBytes += part.length;
      }
      if (end === -1) return lines;
      lines.push(Buffer.concat(this.#parts).toString('utf8').trim());
      this.#parts = [];
      this.#heldBytes = 0;
      begin = end + 1;
    }
  }
}
