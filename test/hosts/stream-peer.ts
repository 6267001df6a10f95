/**
 * The peer of guest/stream.c: streams a computed byte sequence to the guest, checks every byte that comes back, and
 * reports when its standard input closes. It runs as a separate program inside the client's network namespace.
 *
 *   stream-peer ADDRESS PORT RATE_BYTES_PER_S
 *
 * It prints one JSON document: {sent, received, bad, guestReceived, guestBad, longestGapMs}
 */
import { connect } from 'node:net';

const MASK = (1n << 64n) - 1n;
const SIDE_PEER = 0x70656572n;
const SIDE_GUEST = 0x67756573n;
const TRAILER_BYTES = 24;
const TICK_MS = 20;

function mix(seed: bigint, k: bigint): bigint {
  let z = (seed + (k + 1n) * 0x9e3779b97f4a7c15n) & MASK;
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & MASK;
  return z ^ (z >> 31n);
}

function sequence(seed: bigint, offset: number, count: number): Buffer {
  const first = Math.floor(offset / 8);
  const words = Math.ceil((offset + count) / 8) - first;
  const bytes = Buffer.alloc(words * 8);
  for (let n = 0; n < words; n++) bytes.writeBigUInt64LE(mix(seed, BigInt(first + n)), n * 8);
  return bytes.subarray(offset - first * 8, offset - first * 8 + count);
}

function main(): void {
  const [address = '', port = '', rateText = ''] = process.argv.slice(2);
  const rate = Number(rateText);
  const seed = 0x1234_5678_9abc_def0n;
  let sent = 0;
  let received = 0;
  let bad = 0;
  let lastAt = performance.now();
  let longestGapMs = 0;
  // The last bytes may be the trailer, so they are checked only when more bytes follow.
  let held = Buffer.alloc(0);
  const socket = connect({ host: address, port: Number(port), noDelay: true });
  socket.on('error', (error) => {
    console.log(JSON.stringify({ error: error.message, sent, received, bad }));
    process.exit(1);
  });
  socket.on('connect', () => {
    const header = Buffer.alloc(24);
    header.write('VMGSTRM1', 'latin1');
    header.writeBigUInt64LE(seed, 8);
    header.writeBigUInt64LE(BigInt(rate), 16);
    socket.write(header);
    const startedAt = performance.now();
    const sending = setInterval(() => {
      const due = Math.floor(((performance.now() - startedAt) / 1000) * rate) - sent;
      if (due <= 0 || socket.writableLength > 1 << 20) return;
      const count = Math.min(due, 1 << 16);
      socket.write(sequence(seed ^ SIDE_PEER, sent, count));
      sent += count;
    }, TICK_MS);
    process.stdin.resume();
    process.stdin.on('end', () => {
      clearInterval(sending);
      socket.end();
    });
    console.error('connected');
  });
  const check = (bytes: Buffer) => {
    const expected = sequence(seed ^ SIDE_GUEST, received, bytes.length);
    if (!bytes.equals(expected)) for (let n = 0; n < bytes.length; n++) if (bytes[n] !== expected[n]) bad++;
    received += bytes.length;
  };
  socket.on('data', (data) => {
    const now = performance.now();
    longestGapMs = Math.max(longestGapMs, now - lastAt);
    lastAt = now;
    const all = Buffer.concat([held, data]);
    const checkable = Math.max(0, all.length - TRAILER_BYTES);
    check(all.subarray(0, checkable));
    held = Buffer.from(all.subarray(checkable));
  });
  socket.on('end', () => {
    const hasTrailer = held.length === TRAILER_BYTES && held.toString('latin1', 0, 8) === 'VMGSDONE';
    const guestReceived = hasTrailer ? Number(held.readBigUInt64LE(8)) : -1;
    const guestBad = hasTrailer ? Number(held.readBigUInt64LE(16)) : -1;
    console.log(
      JSON.stringify({ sent, received, bad, guestReceived, guestBad, longestGapMs: Math.round(longestGapMs) }),
    );
    socket.end();
  });
}

main();
