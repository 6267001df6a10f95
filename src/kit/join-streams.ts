import type { Duplex } from 'node:stream';

/**
 * Passes the bytes of each stream to the other one. The end of one becomes the end of the other after its last byte;
 * a stream that breaks destroys the other one. Each must be able to be half open.
 */
export function joinStreams(one: Duplex, other: Duplex): void {
  pass(one, other);
  pass(other, one);
}

function pass(from: Duplex, to: Duplex): void {
  from.pipe(to);
  from.on('error', () => from.destroy());
  from.once('close', () => {
    if (!from.readableEnded) to.destroy();
    // Nobody takes what comes from there any more. Read on, so that its end is seen.
    else to.resume();
  });
}
