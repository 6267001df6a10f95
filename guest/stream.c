// A TCP server in the guest that proves a connection: both sides send a byte sequence that the other can
// compute, so a lost, repeated, changed or reordered byte anywhere is seen.
//
//   stream PORT
//
// Protocol, all numbers little-endian:
//   1. The peer connects and sends 24 bytes: the magic "VMGSTRM1", u64 seed, u64 rate (bytes/s the guest may
//   send, 0: no
//      bound).
//   2. Both sides send. Word k (u64) of a side's sequence is mix(seed ^ side, k), side being 0x70656572
//   ("peer") for what
//      the peer sends and 0x67756573 ("gues") for what the guest sends, and
//        mix(s, k):  z = s + (k + 1) * 0x9e3779b97f4a7c15
//                    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
//                    z = (z ^ (z >> 27)) * 0x94d049bb133111eb
//                    z ^ (z >> 31)
//      all modulo 2^64. A sequence may stop within a word.
//   3. The peer shuts down its sending side. The guest checks what is left, stops its sequence, sends 24
//   bytes: the magic
//      "VMGSDONE", u64 bytes received, u64 bytes bad; and closes. What precedes these 24 bytes is the guest's
//      sequence.
//
// On the console, per connection: a line a second while bytes flow, the first bad byte, and an end line:
//   VMG STREAM n=1 rx=123 tx=456 bad=0
//   VMG STREAM n=1 bad offset=77 expected=0x12 seen=0x34
//   VMG STREAM n=1 end rx=123 tx=456 bad=0

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { chunk_bytes = 32768, backlog = 8, tick_ms = 20 };
static const uint64_t side_peer = 0x70656572, side_guest = 0x67756573;

struct header {
  char magic[8];
  uint64_t seed, rate_bytes_per_s;
};
struct trailer {
  char magic[8];
  uint64_t received_bytes, bad_bytes;
};

static uint64_t now_ms(void) {
  struct timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static uint64_t mix(uint64_t seed, uint64_t k) {
  uint64_t z = seed + (k + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

static void make_sequence(uint64_t seed, uint64_t offset, uint8_t* bytes, size_t count) {
  for (size_t n = 0; n < count;) {
    uint64_t word = mix(seed, (offset + n) / 8);
    for (size_t b = (offset + n) % 8; b < 8 && n < count; b++, n++) bytes[n] = (uint8_t)(word >> (8 * b));
  }
}

static int transfer_all(int fd, void* data, size_t count, int sending) {
  for (size_t done = 0; done < count;) {
    uint8_t* at = (uint8_t*)data + done;
    ssize_t n = sending ? send(fd, at, count - done, MSG_NOSIGNAL) : recv(fd, at, count - done, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return -1;
    done += (size_t)n;
  }
  return 0;
}

static uint64_t check_received(int number, uint64_t seed, uint64_t offset, const uint8_t* seen, size_t count,
                               uint64_t bad_before) {
  static uint8_t expected[chunk_bytes];
  make_sequence(seed, offset, expected, count);
  if (memcmp(seen, expected, count) == 0) return 0;
  uint64_t bad = 0;
  for (size_t n = 0; n < count; n++) {
    if (seen[n] == expected[n]) continue;
    if (bad_before + bad++ == 0)
      printf("VMG STREAM n=%d bad offset=%lu expected=0x%02x seen=0x%02x\n", number, offset + n, expected[n],
             seen[n]);
  }
  return bad;
}

static void serve(int fd, int number) {
  static uint8_t in[chunk_bytes], out[chunk_bytes];
  struct header header;
  if (transfer_all(fd, &header, sizeof header, 0) || memcmp(header.magic, "VMGSTRM1", 8) != 0) {
    printf("VMG STREAM n=%d refused: no header\n", number);
    return;
  }
  uint64_t rx = 0, tx = 0, bad = 0, start_ms = now_ms(), reported_ms = start_ms, reported_rx = 0,
           reported_tx = 0;
  int open = 1;
  while (open) {
    uint64_t now = now_ms(), allowed = chunk_bytes;
    if (header.rate_bytes_per_s) {
      // 128 bits: any rate a peer names times any time must not wrap.
      unsigned __int128 due = (unsigned __int128)header.rate_bytes_per_s * (now - start_ms) / 1000;
      allowed = due > tx ? (due - tx > chunk_bytes ? chunk_bytes : (uint64_t)(due - tx)) : 0;
    }
    struct pollfd poller = {.fd = fd, .events = (short)(POLLIN | (allowed ? POLLOUT : 0))};
    if (poll(&poller, 1, tick_ms) < 0 && errno != EINTR) break;
    if (poller.revents & (POLLIN | POLLHUP | POLLERR)) {
      ssize_t n = recv(fd, in, sizeof in, MSG_DONTWAIT);
      if (n == 0) break;
      if (n < 0 && errno != EAGAIN && errno != EINTR) open = 0;
      if (n > 0) {
        bad += check_received(number, header.seed ^ side_peer, rx, in, (size_t)n, bad);
        rx += (uint64_t)n;
      }
    }
    if (open && allowed && (poller.revents & POLLOUT)) {
      make_sequence(header.seed ^ side_guest, tx, out, allowed);
      ssize_t n = send(fd, out, allowed, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (n < 0 && errno != EAGAIN && errno != EINTR) open = 0;
      if (n > 0) tx += (uint64_t)n;
    }
    if (now - reported_ms >= 1000 && (rx != reported_rx || tx != reported_tx)) {
      printf("VMG STREAM n=%d rx=%lu tx=%lu bad=%lu\n", number, rx, tx, bad);
      reported_ms = now, reported_rx = rx, reported_tx = tx;
    }
  }
  if (open) {
    struct trailer trailer = {
        .magic = {'V', 'M', 'G', 'S', 'D', 'O', 'N', 'E'}, .received_bytes = rx, .bad_bytes = bad};
    open = transfer_all(fd, &trailer, sizeof trailer, 1) == 0;
  }
  printf("VMG STREAM n=%d %s rx=%lu tx=%lu bad=%lu\n", number, open ? "end" : "broken", rx, tx, bad);
}

int main(int argc, char** argv) {
  int port = argc > 1 ? atoi(argv[1]) : 0, one = 1;
  if (port < 1 || port > 65535) {
    fprintf(stderr, "usage: stream PORT\n");
    return 2;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  signal(SIGCHLD, SIG_IGN);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (listener < 0 || bind(listener, (struct sockaddr*)&address, sizeof address) ||
      listen(listener, backlog)) {
    fprintf(stderr, "stream: port %d: %s\n", port, strerror(errno));
    return 1;
  }
  printf("VMG STREAM listening on port %d\n", port);
  for (int number = 1;; number++) {
    int fd = accept(listener, NULL, NULL);
    if (fd < 0) continue;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (fork() == 0) {
      close(listener);
      serve(fd, number);
      close(fd);
      _exit(0);
    }
    close(fd);
  }
}
