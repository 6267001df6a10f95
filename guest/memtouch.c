// The guest's proof of its own memory: visits pages in random order for ever, checks each against a shadow
// copy, and rewrites some of them.
//
//   memtouch MB WRITE_PERCENT THREADS [REST_PERCENT | idle]
//
// It rests for REST_PERCENT (0 to 99) of the time, after every 10 ms of work: emulated guests that are many
// need not fill the processors of whoever tests something else than speed.
//
// Each page has a version in the shadow. Every 512 bytes (and in the last word) stands a mix of page, version
// and word number, so that a stale, foreign, zeroed or half-updated page is seen; all other words are filled
// once with a pattern of page and word number alone, and only `verify` reads them. The sum of all versions
// must equal the number of writes each thread counted in a register: page and shadow cannot grow old together
// unnoticed.
//
// Each thread owns a range of pages. Thread 0 also reports, so that on one vCPU nothing but the workload
// runs.
//
// Out, one line each, key=value:
//   VMG READY mb=256 pages=65536 threads=1 writepct=20
//   VMG WORK t=12.345 window_ms=100.1 ops=12345 gap_ms=1.23 total=999999 bad=0   every 100 ms (idle: every
//   second) VMG BAD page=7 word=64 expected=0x... seen=0x... version=3                    the first 64 bad
//   words only VERIFY pages 65536 bad 0                                                      the answer to
//   `verify`
// t is the guest's monotonic clock. gap_ms is the longest time within the window in which one thread finished
// no operation, the time to print excluded. bad counts bad pages seen by visits since start. In: the line
// `verify` stops all threads, checks every word of every page, answers, and goes on; other lines go to
// clone.c.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
  page_bytes = 4096,
  page_words = page_bytes / 8,
  checked_words = 9,  // every 512 bytes, and the last word
  threads_max = 64,
  bad_lines_max = 64,
  report_interval_ms = 100,
  idle_interval_ms = 1000,
  stretch_ms = 10,
};

struct worker {
  _Alignas(64) atomic_ulong ops;
  atomic_ulong last_op_ns;
  atomic_ulong gap_ns_max;
  atomic_ulong bad_pages;
  size_t page_first, page_count;
  uint64_t random_state;
  uint64_t stretch_start_ns;
  uint64_t write_count;
  uint64_t verify_bad;
  pthread_t thread;
};

static uint64_t* memory;
static uint32_t* versions;
static struct worker workers[threads_max];
static int worker_count, write_percent, rest_percent, idle;
static atomic_int verify_wanted, bad_lines;
static pthread_barrier_t verify_begins, verify_ends;

static uint64_t now_ns(void) {
  struct timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline size_t checked_word(int n) {
  return n == checked_words - 1 ? page_words - 1 : (size_t)n * 64;
}

static inline uint64_t filler(size_t page, size_t word) {
  return (page + 1) * 0x9e3779b97f4a7c15u + word * 0xd1b54a32d192ed03u;
}

static inline uint64_t stamp(size_t page, uint32_t version, size_t word) {
  return filler(page, word) ^ ((uint64_t)version + 1) * 0xff51afd7ed558ccdu;
}

static void write_page(size_t page) {
  uint64_t* words = memory + page * page_words;
  for (int n = 0; n < checked_words; n++)
    words[checked_word(n)] = stamp(page, versions[page], checked_word(n));
}

static void report_bad(size_t page, size_t word, uint64_t expected, uint64_t seen) {
  if (atomic_fetch_add(&bad_lines, 1) >= bad_lines_max) return;
  printf("VMG BAD page=%zu word=%zu expected=0x%016lx seen=0x%016lx version=%u\n", page, word, expected, seen,
         versions[page]);
  fflush(stdout);
}

static int page_is_good(size_t page) {
  const uint64_t* words = memory + page * page_words;
  for (int n = 0; n < checked_words; n++) {
    uint64_t expected = stamp(page, versions[page], checked_word(n)), seen = words[checked_word(n)];
    if (seen != expected) {
      report_bad(page, checked_word(n), expected, seen);
      return 0;
    }
  }
  return 1;
}

static int every_word_is_good(size_t page) {
  if (!page_is_good(page)) return 0;
  const uint64_t* words = memory + page * page_words;
  for (size_t word = 0; word < page_words; word++) {
    if (word % 64 == 0 || word == page_words - 1) continue;
    if (words[word] != filler(page, word)) {
      report_bad(page, word, filler(page, word), words[word]);
      return 0;
    }
  }
  return 1;
}

static void verify_range(struct worker* self) {
  uint64_t bad = 0, version_sum = 0;
  for (size_t page = self->page_first; page < self->page_first + self->page_count; page++) {
    bad += !every_word_is_good(page);
    version_sum += versions[page];
  }
  if (version_sum != self->write_count) {
    printf("VMG BAD shadow of thread %ld: %lu writes recorded, %lu done\n", self - workers, version_sum,
           self->write_count);
    bad++;
  }
  self->verify_bad = bad;
}

static void fill_range(struct worker* self) {
  for (size_t page = self->page_first; page < self->page_first + self->page_count; page++) {
    for (size_t word = 0; word < page_words; word++) memory[page * page_words + word] = filler(page, word);
    write_page(page);
  }
}

static void visit_one(struct worker* self) {
  uint64_t s = self->random_state;
  s ^= s << 13, s ^= s >> 7, s ^= s << 17;
  self->random_state = s;
  size_t page = self->page_first + (size_t)(((s & 0xffffffffu) * self->page_count) >> 32);
  if (!page_is_good(page)) atomic_fetch_add_explicit(&self->bad_pages, 1, memory_order_relaxed);
  if ((int)((s >> 40) % 100) < write_percent) {
    versions[page]++;
    self->write_count++;
    write_page(page);
  }
  uint64_t now = now_ns();
  uint64_t gap = now - atomic_load_explicit(&self->last_op_ns, memory_order_relaxed);
  if (gap > atomic_load_explicit(&self->gap_ns_max, memory_order_relaxed))
    atomic_store_explicit(&self->gap_ns_max, gap, memory_order_relaxed);
  atomic_store_explicit(&self->last_op_ns, now, memory_order_relaxed);
  atomic_fetch_add_explicit(&self->ops, 1, memory_order_relaxed);
}

static void restart_gap(struct worker* self) {
  atomic_store(&self->last_op_ns, now_ns());
}

static void visit_or_rest(struct worker* self) {
  visit_one(self);
  if (rest_percent == 0) return;
  uint64_t now = atomic_load_explicit(&self->last_op_ns, memory_order_relaxed);
  uint64_t worked_ns = now - self->stretch_start_ns;
  if (worked_ns < stretch_ms * 1000000u) return;
  usleep((unsigned)(stretch_ms * 1000 * rest_percent / (100 - rest_percent)));
  restart_gap(self);
  self->stretch_start_ns = now_ns();
}

static void wait_if_verifying(struct worker* self) {
  if (!atomic_load(&verify_wanted)) return;
  pthread_barrier_wait(&verify_begins);
  verify_range(self);
  pthread_barrier_wait(&verify_ends);
  restart_gap(self);
}

static void* work(void* argument) {
  struct worker* self = argument;
  restart_gap(self);
  for (;;) {
    wait_if_verifying(self);
    if (idle)
      usleep(10000);
    else
      visit_or_rest(self);
  }
  return NULL;
}

static void verify_all(void) {
  uint64_t bad = 0;
  size_t pages = 0;
  atomic_store(&verify_wanted, 1);
  pthread_barrier_wait(&verify_begins);
  atomic_store(&verify_wanted, 0);
  verify_range(&workers[0]);
  pthread_barrier_wait(&verify_ends);
  for (int n = 0; n < worker_count; n++) {
    bad += workers[n].verify_bad;
    pages += workers[n].page_count;
  }
  printf("VERIFY pages %zu bad %lu\n", pages, bad);
  fflush(stdout);
}

// Other lines are for clone.c, which cannot read the console as well.
static void pass_on(const char* line) {
  int fd = open("/tmp/commands", O_WRONLY | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) return;
  dprintf(fd, "%s\n", line);
  close(fd);
}

static void read_commands(void) {
  static char line[64];
  static size_t length;
  static int at_end;
  char byte;
  // Not O_NONBLOCK: on a console that flag would be shared with the output, and lines would be lost.
  for (;;) {
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    if (at_end || poll(&input, 1, 0) <= 0) return;
    if (read(STDIN_FILENO, &byte, 1) != 1) {
      at_end = 1;
      return;
    }
    if (byte != '\n' && byte != '\r') {
      if (length < sizeof line - 1) line[length++] = byte;
      continue;
    }
    line[length] = 0;
    length = 0;
    if (strcmp(line, "verify") == 0)
      verify_all();
    else
      pass_on(line);
  }
}

static void report(uint64_t window_ns) {
  static uint64_t total;
  uint64_t ops = 0, bad = 0, gap_ns = 0, now = now_ns();
  for (int n = 0; n < worker_count; n++) {
    struct worker* w = &workers[n];
    ops += atomic_exchange(&w->ops, 0);
    bad += atomic_load(&w->bad_pages);
    uint64_t last = atomic_load(&w->last_op_ns), gap = atomic_exchange(&w->gap_ns_max, 0);
    uint64_t open_gap =
        now > last ? now - last : 0;  // a thread that is stuck right now has not recorded its gap
    if (n != 0 && open_gap > gap) gap = open_gap;
    if (gap > gap_ns) gap_ns = gap;
  }
  total += ops;
  if (idle) gap_ns = 0;
  printf("VMG WORK t=%.3f window_ms=%.1f ops=%lu gap_ms=%.2f total=%lu bad=%lu\n", (double)now * 1e-9,
         (double)window_ns * 1e-6, ops, (double)gap_ns * 1e-6, total, bad);
  fflush(stdout);
}

static void run_reporter(void) {
  struct worker* self = &workers[0];
  const uint64_t interval_ns = (uint64_t)(idle ? idle_interval_ms : report_interval_ms) * 1000000u;
  uint64_t window_start_ns = now_ns();
  restart_gap(self);
  for (;;) {
    if (idle) {
      usleep(20000);
      read_commands();
      restart_gap(self);
    } else {
      visit_or_rest(self);
    }
    uint64_t last = atomic_load_explicit(&self->last_op_ns, memory_order_relaxed);
    if (last - window_start_ns < interval_ns) continue;
    report(last - window_start_ns);
    read_commands();
    window_start_ns = now_ns();
    restart_gap(self);
  }
}

static long argument(char** argv, int n, long low, long high) {
  char* end;
  errno = 0;
  long value = strtol(argv[n], &end, 10);
  if (errno || *end || end == argv[n] || value < low || value > high) {
    fprintf(stderr, "memtouch: argument %d must be a number from %ld to %ld, not '%s'\n", n, low, high,
            argv[n]);
    exit(2);
  }
  return value;
}

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: memtouch MB WRITE_PERCENT THREADS [REST_PERCENT | idle]\n");
    return 2;
  }
  size_t mb = (size_t)argument(argv, 1, 1, 1 << 20);
  write_percent = (int)argument(argv, 2, 0, 100);
  worker_count = (int)argument(argv, 3, 1, threads_max);
  idle = argc > 4 && strcmp(argv[4], "idle") == 0;
  if (argc > 4 && !idle) rest_percent = (int)argument(argv, 4, 0, 99);

  size_t pages = mb << 8;
  memory = mmap(NULL, mb << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || !(versions = calloc(pages, sizeof *versions))) {
    fprintf(stderr, "memtouch: no memory for %zu MB: %s\n", mb, strerror(errno));
    return 1;
  }
  // 4 KiB pages in the guest too: with huge ones a single access could hide behind a neighbour's.
  madvise(memory, mb << 20, MADV_NOHUGEPAGE);
  pthread_barrier_init(&verify_begins, NULL, (unsigned)worker_count);
  pthread_barrier_init(&verify_ends, NULL, (unsigned)worker_count);

  for (int n = 0; n < worker_count; n++) {
    struct worker* w = &workers[n];
    w->page_first = pages * (size_t)n / (size_t)worker_count;
    w->page_count = pages * (size_t)(n + 1) / (size_t)worker_count - w->page_first;
    w->random_state = 88172645463325252u + (uint64_t)n * 0x9e3779b97f4a7c15u;
    fill_range(w);
  }
  printf("VMG READY mb=%zu pages=%zu threads=%d writepct=%d\n", mb, pages, worker_count, write_percent);
  fflush(stdout);
  for (int n = 1; n < worker_count; n++) {
    int error = pthread_create(&workers[n].thread, NULL, work, &workers[n]);
    if (error) {
      fprintf(stderr, "memtouch: thread %d: %s\n", n, strerror(error));
      return 1;
    }
  }
  run_reporter();
}
