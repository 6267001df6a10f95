// memtouch without an operating system: for emulators inside emulators, where Linux would boot for a minute.
// A multiboot kernel (QEMU's -kernel) that runs on one 32-bit CPU without paging, interrupts or libraries.
//
//   -kernel nano -append 'vmg.mb=24 vmg.writepct=20'       (those are the defaults)
//
// What it checks and what it prints are memtouch's (see there), with words of 32 bits and one thread. Input
// on the serial port is looked at once a window. The clock is the time-stamp counter, set against the timer
// chip at start; like Linux's it stands still while the VM does not run.

#include <stdint.h>

enum {
  page_bytes = 4096,
  page_words = page_bytes / 4,
  checked_words = 9,  // every 512 bytes, and the last word
  bad_lines_max = 64,
  report_interval_us = 100000,
  serial_port = 0x3f8,
  timer_hz = 1193182,
};

struct multiboot_header {
  uint32_t magic, flags, checksum;
};
struct multiboot_info {
  uint32_t flags, lower_kib, upper_kib, boot_device, command_line;
};
enum { multiboot_magic = 0x1badb002, multiboot_started = 0x2badb002, multiboot_wants_memory_map = 2 };

__attribute__((section(".multiboot"), used)) static const struct multiboot_header header = {
    multiboot_magic, multiboot_wants_memory_map, 0u - multiboot_magic - multiboot_wants_memory_map};

__asm__(
    ".globl start\n"
    "start: movl $stack_end, %esp\n"
    "  pushl %ebx\n"
    "  pushl %eax\n"
    "  call run\n"
    "1: hlt\n"
    "  jmp 1b\n"
    ".local stack\n"
    ".comm stack, 16384, 16\n"
    ".set stack_end, stack + 16384\n");

extern char image_end[];  // nano.ld

static uint32_t *memory, *versions;
static uint32_t page_count, write_percent = 20, touch_mib = 24;
static uint32_t ticks_per_ms, bad_lines;
static uint64_t random_state = 88172645463325252u, write_count, bad_count;

static inline void out8(uint16_t port, uint8_t value) {
  __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}
static inline uint8_t in8(uint16_t port) {
  uint8_t value;
  __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
static inline uint64_t now_ticks(void) {
  uint64_t ticks;
  __asm__ volatile("rdtsc" : "=A"(ticks));
  return ticks;
}

/// The compiler calls a library for this; there is none.
static uint64_t divide(uint64_t value, uint32_t by, uint32_t* rest) {
  uint32_t high = (uint32_t)(value >> 32), quotient_high = high / by, remainder = high % by, quotient_low;
  __asm__("divl %4"
          : "=a"(quotient_low), "=d"(remainder)
          : "a"((uint32_t)value), "d"(remainder), "rm"(by)
          : "cc");
  if (rest) *rest = remainder;
  return (uint64_t)quotient_high << 32 | quotient_low;
}

static uint64_t to_us(uint64_t ticks) {
  return divide(ticks * 1000, ticks_per_ms, 0);
}

// --- serial port ---

static void put_char(char c) {
  while (!(in8(serial_port + 5) & 0x20)) {
  }
  out8(serial_port, (uint8_t)c);
}
static void put(const char* text) {
  for (; *text; text++) put_char(*text);
}
static void put_padded(uint64_t value, int digits_min) {
  char digits[20];
  int count = 0;
  do {
    uint32_t digit;
    value = divide(value, 10, &digit);
    digits[count++] = (char)('0' + digit);
  } while (value || count < digits_min);
  while (count) put_char(digits[--count]);
}
static void put_number(const char* label, uint64_t value) {
  put(label);
  put_padded(value, 1);
}
/// `unit` fractions make one.
static void put_decimal(const char* label, uint64_t value, uint32_t unit, int digits) {
  uint32_t fraction;
  put_number(label, divide(value, unit, &fraction));
  put_char('.');
  put_padded(fraction, digits);
}
static void put_hex(const char* label, uint32_t value) {
  put(label);
  for (int shift = 28; shift >= 0; shift -= 4) put_char("0123456789abcdef"[value >> shift & 15]);
}
static void start_serial(void) {
  static const uint8_t settings[][2] = {{1, 0}, {3, 0x80}, {0, 1}, {1, 0}, {3, 3}, {2, 0xc7}, {4, 3}};
  for (unsigned n = 0; n < sizeof settings / sizeof *settings; n++)
    out8((uint16_t)(serial_port + settings[n][0]), settings[n][1]);
}

/// Channel 2 of the timer counts 50 ms down; no interrupt is needed to see its end.
static void calibrate_clock(void) {
  const uint32_t count = timer_hz / 20;
  out8(0x61, (in8(0x61) & 0xfc) | 1);
  out8(0x43, 0xb0);
  out8(0x42, (uint8_t)count);
  out8(0x42, (uint8_t)(count >> 8));
  const uint64_t start = now_ticks();
  while (!(in8(0x61) & 0x20)) {
  }
  ticks_per_ms = (uint32_t)divide(now_ticks() - start, 50, 0);
  if (!ticks_per_ms) ticks_per_ms = 1;
}

// --- the pages ---

static inline uint32_t checked_word(int n) {
  return n == checked_words - 1 ? page_words - 1 : (uint32_t)n * 128;
}
static inline uint32_t filler(uint32_t page, uint32_t word) {
  return (page + 1) * 0x9e3779b9u + word * 0xd1b54a33u;
}
static inline uint32_t stamp(uint32_t page, uint32_t version, uint32_t word) {
  return filler(page, word) ^ (version + 1) * 0x85ebca6bu;
}

static void write_page(uint32_t page) {
  uint32_t* words = memory + page * page_words;
  for (int n = 0; n < checked_words; n++)
    words[checked_word(n)] = stamp(page, versions[page], checked_word(n));
}

static void fill_all(void) {
  for (uint32_t page = 0; page < page_count; page++) {
    uint32_t* words = memory + page * page_words;
    for (uint32_t word = 0; word < page_words; word++) words[word] = filler(page, word);
    versions[page] = 0;  // the BIOS leaves traces of itself
    write_page(page);
  }
}

static void report_bad(uint32_t page, uint32_t word, uint32_t expected, uint32_t seen) {
  if (bad_lines++ >= bad_lines_max) return;
  put_number("VMG BAD page=", page);
  put_number(" word=", word);
  put_hex(" expected=0x", expected);
  put_hex(" seen=0x", seen);
  put_number(" version=", versions[page]);
  put("\n");
}

static int page_is_good(uint32_t page) {
  const volatile uint32_t* words = memory + page * page_words;
  for (int n = 0; n < checked_words; n++) {
    uint32_t expected = stamp(page, versions[page], checked_word(n)), seen = words[checked_word(n)];
    if (seen != expected) {
      report_bad(page, checked_word(n), expected, seen);
      return 0;
    }
  }
  return 1;
}

static int every_word_is_good(uint32_t page) {
  if (!page_is_good(page)) return 0;
  const volatile uint32_t* words = memory + page * page_words;
  for (uint32_t word = 0; word < page_words; word++) {
    if (word % 128 == 0 || word == page_words - 1) continue;
    uint32_t seen = words[word];
    if (seen != filler(page, word)) {
      report_bad(page, word, filler(page, word), seen);
      return 0;
    }
  }
  return 1;
}

static void verify_all(void) {
  uint64_t bad = 0, version_sum = 0;
  for (uint32_t page = 0; page < page_count; page++) {
    bad += !every_word_is_good(page);
    version_sum += versions[page];
  }
  if (version_sum != write_count) {
    put_number("VMG BAD shadow: ", version_sum);
    put_number(" writes recorded, ", write_count);
    put(" done\n");
    bad++;
  }
  put_number("VERIFY pages ", page_count);
  put_number(" bad ", bad);
  put("\n");
}

static void visit_one(void) {
  uint64_t s = random_state;
  s ^= s << 13, s ^= s >> 7, s ^= s << 17;
  random_state = s;
  uint32_t page = (uint32_t)(((s & 0xffffffffu) * page_count) >> 32);
  if (!page_is_good(page)) bad_count++;
  if ((uint32_t)(s >> 40) % 100 < write_percent) {
    versions[page]++;
    write_count++;
    write_page(page);
  }
}

// --- commands and parameters ---

static int is_same(const char* left, const char* right) {
  while (*left && *left == *right) left++, right++;
  return *left == *right;
}

static void read_commands(void) {
  static char line[16];
  static uint32_t length;
  while (in8(serial_port + 5) & 1) {
    char c = (char)in8(serial_port);
    if (c != '\n' && c != '\r') {
      if (length < sizeof line - 1) line[length++] = c;
      continue;
    }
    line[length] = 0;
    length = 0;
    if (is_same(line, "verify")) verify_all();
  }
}

/// The number after `name` in the command line, if it is there.
static void read_parameter(const char* command_line, const char* name, uint32_t* value) {
  for (; *command_line; command_line++) {
    const char *at = command_line, *wanted = name;
    while (*wanted && *at == *wanted) at++, wanted++;
    if (*wanted) continue;
    for (*value = 0; *at >= '0' && *at <= '9'; at++) *value = *value * 10 + (uint32_t)(*at - '0');
    return;
  }
}

static void work(void) {
  uint64_t total = 0, ops = 0, gap_max = 0, last = now_ticks(), window_start = last;
  for (;;) {
    visit_one();
    ops++;
    uint64_t now = now_ticks();
    if (now - last > gap_max) gap_max = now - last;
    last = now;
    uint64_t window_us = to_us(now - window_start);
    if (window_us < report_interval_us) continue;
    total += ops;
    put_decimal("VMG WORK t=", divide(to_us(now), 1000, 0), 1000, 3);
    put_decimal(" window_ms=", divide(window_us, 100, 0), 10, 1);
    put_number(" ops=", ops);
    put_decimal(" gap_ms=", divide(to_us(gap_max), 10, 0), 100, 2);
    put_number(" total=", total);
    put_number(" bad=", bad_count);
    put("\n");
    read_commands();
    ops = gap_max = 0;
    window_start = last = now_ticks();
  }
}

__attribute__((used)) void run(uint32_t magic, const struct multiboot_info* info) {
  start_serial();
  put("\nVMG BOOT nano\n");
  if (magic != multiboot_started || !(info->flags & 1)) {
    put("VMG ERROR no multiboot loader\n");
    return;
  }
  if (info->flags & 4) {
    const char* command_line = (const char*)info->command_line;
    read_parameter(command_line, "vmg.mb=", &touch_mib);
    read_parameter(command_line, "vmg.writepct=", &write_percent);
  }
  // Shadow first, pages behind it.
  versions = (uint32_t*)(((uint32_t)image_end + page_bytes - 1) & ~(uint32_t)(page_bytes - 1));
  page_count = touch_mib << 8;
  memory = versions + page_count;
  if (touch_mib == 0 || touch_mib > 2048 ||
      (uint64_t)(uint32_t)memory + ((uint64_t)touch_mib << 20) > (uint64_t)(info->upper_kib + 1024) << 10) {
    put("VMG ERROR vmg.mb does not fit the memory\n");
    return;
  }
  calibrate_clock();
  fill_all();
  put_number("VMG READY mb=", touch_mib);
  put_number(" pages=", page_count);
  put_number(" threads=1 writepct=", write_percent);
  put("\n");
  work();
}
