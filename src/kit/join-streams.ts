import type { Duplex } from 'node:stream';

/**
 * Passes the bytes of each stream to the other one. The end of one becomes the end of the other after its last byte.
 * When one has closed, the other is destroyed once it has all of what came from there: nothing more can be passed, and
 * whoever writes to it must learn that. A stream that breaks destroys the other one at once.
 */
export function joinStreams(one: Duplex, other: Duplex): void {
  pass(one, other);
  pass(other, one);
}

function pass(from: Duplex, to: Duplex): void {
  const closed = (): void => {
    if (!from.readableEnded || to.writableFinished) to.destroy();
    else to.once('finish', () => to.destroy());
  };
  from.on('error', () => from.destroy());
  if (from.destroyed) return closed();
  from.pipe(to);
  from.once('close', closed);
}
