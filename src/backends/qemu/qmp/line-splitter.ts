/** Splits a byte stream into lines of bounded length, in linear time for any sizes of chunks. */
export class LineSplitter {
  readonly #lineBytesMax: number;
  #parts: Buffer[] = [];
  #heldBytes = 0;

  constructor(lineBytesMax: number) {
    this.#lineBytesMax = lineBytesMax;
  }

  /**
   * Returns the lines that this chunk completes, without line ends. Returns null if a line is too long. The splitter
   * must not be used after that.
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
