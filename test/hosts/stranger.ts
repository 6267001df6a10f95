/**
 * A stranger in the group of a multicast: it knows neither key nor seat. It sends noise, and every datagram that it
 * hears once more, some of them changed. It ends when its input does, and prints how many datagrams it has sent.
 *
 *   stranger GROUP PORT ADDRESS
 */
import { randomBytes, randomInt } from 'node:crypto';
import { createSocket } from 'node:dgram';

const NOISE_MS = 5;
const NOISE_BYTES_MAX = 1_400;
/** A header that is right from its first byte on costs a receiver most. */
const HEARD_HEADER_BYTES = 32;
const KEPT_MAX = 64;

const [group = '', port = '0', address = ''] = process.argv.slice(2);
const socket = createSocket({ type: 'udp4', reuseAddr: true });
const kept: Buffer[] = [];
let sent = 0;

function send(datagram: Buffer): void {
  socket.send(datagram, Number(port), group, (error) => {
    if (error === null) sent++;
  });
}

function noise(): void {
  const bytes = randomBytes(randomInt(1, NOISE_BYTES_MAX));
  const like = kept[randomInt(0, Math.max(1, kept.length))];
  like?.copy(bytes, 0, 0, HEARD_HEADER_BYTES);
  send(bytes);
  // An old one, as it was, and with one byte changed.
  if (like === undefined) return;
  send(like);
  const changed = Buffer.from(like);
  const at = randomInt(0, changed.length);
  changed.writeUInt8(changed.readUInt8(at) ^ 1, at);
  send(changed);
}

socket.on('message', (datagram) => {
  if (kept.length < KEPT_MAX) kept.push(datagram);
  else if (randomInt(0, 4) === 0) kept[randomInt(0, KEPT_MAX)] = datagram;
});
socket.bind(Number(port), () => {
  socket.setMulticastLoopback(false);
  socket.setMulticastInterface(address);
  socket.addMembership(group, address);
  console.log('ready');
  const timer = setInterval(noise, NOISE_MS);
  process.stdin.resume().on('end', () => {
    clearInterval(timer);
    socket.close(() => console.log(`sent ${sent}`));
  });
});
